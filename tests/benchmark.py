"""How fast, and with how much memory, against the reference's recipe: GPT-2 124M, random weights, no network.

    python tests/benchmark.py                    # training, scoring, answers, all that is measured, the whole job
    python tests/benchmark.py --beside CHECKOUT  # another checkout of this project in the same run
    python tests/benchmark.py --pieces           # what every single measure gives
    python tests/benchmark.py --rows             # cost over the size of the data set

Every line is a process of its own. Tokens are real ones, not padding; training counts the optimizer steps after the
first. Row lengths are drawn between the deciles of 4,302 articles of MedQuAD in the real set's format. Prints Markdown.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetune_medical_gpt2 as script  # noqa: E402

ANSWER_TOKENS = (54, 302, 354, 425, 516, 618, 732, 875, 1056, 1495, 3000)  # deciles, in GPT-2 tokens; the last capped
REFERENCE, BESIDE = "reference recipe (fp32, stock SFTTrainer)", "the other checkout"
TRAINING = {  # what a variant does otherwise than the reference recipe
    REFERENCE: set(),
    "TRL's defaults (bf16 if the hardware has it, gradient checkpointing)": {"bf16", "checkpointing"},
    "ours": {"bf16", "no dropout", "fused gelu", "allocator", "own loss"},
}
PIECES = {
    "reference recipe + bf16 where the hardware has it": {"bf16"},
    "+ base dropouts off": {"bf16", "no dropout"},
    "+ fused GELU": {"bf16", "no dropout", "fused gelu"},
    "+ freed memory kept": {"bf16", "no dropout", "fused gelu", "allocator"},
    "+ the Trainer's loss, frozen weights in bf16, padded shapes, eager attention": TRAINING["ours"] | {"4 x 4"},
    "+ 1 x 16 rows instead of 4 x 4 (ours)": TRAINING["ours"],
    "ours in fp32": TRAINING["ours"] - {"bf16"},
}
# What script.measure scores of the real data before training: in this order, so many rows each.
MEASURED = {
    "held-out rows": 687,
    "everyday text": len(script.read_lines(script.EVERYDAY)),
    "training rows": script.SAMPLE_ROWS,
    "facts, four endings each": 4 * len(script.read_lines(script.FACTS)),
    "held-out rows after a training row": script.SAMPLE_ROWS,
}
MATMUL_PARAMETERS = 12 * 12 * 768**2 + 50257 * 768  # of the blocks and the LM head


def make_tokenizer(size=50257):
    """A word for each token, among them those of the prompt; as fast a tokenizer as GPT-2's, and without its files."""
    words = dict.fromkeys(["<|endoftext|>", *script.format_prompt("What is this ?").split(), "</s>"])
    words |= {"abcdef": None}  # transformers tries it with each word, to find where "</s>" may begin
    words |= dict.fromkeys(f"w{i}" for i in range(size - len(words)))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def make_texts(n, seed=0):
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        low = rng.randrange(10)
        length = rng.randint(ANSWER_TOKENS[low], ANSWER_TOKENS[low + 1])
        answer = " ".join(f"w{rng.randrange(50000)}" for _ in range(length))
        texts.append(script.format_prompt("What is this ?") + f" {answer} </s>")
    return texts


def make_model(variant, device):
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if "no dropout" in variant else {}
    activation = "gelu_pytorch_tanh" if "fused gelu" in variant else "gelu_new"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(activation_function=activation, **dropout)).requires_grad_(False).to(device)
    return script.speed_up(model, "bf16" if "bf16" in variant else "fp32") if "own loss" in variant else model


def plain_device():
    """The device, without what script.choose_hardware sets on a CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def on_this_machine(variant, hardware):
    """A variant without what the hardware lacks."""
    return variant if hardware["precision"] == "bf16" else variant - {"bf16"}


def make_ours():
    """(device, tokenizer, model) as the script has them."""
    hardware = script.choose_hardware()
    model = make_model(on_this_machine(TRAINING["ours"], hardware), hardware["device"])
    return hardware["device"], make_tokenizer(), model.eval()


class Clock(TrainerCallback):
    """Seconds and tokens of the optimizer steps after the first."""

    seconds = tokens = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.began, self.before = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1:
            self.seconds += time.perf_counter() - self.began
            self.tokens += state.num_input_tokens_seen - self.before


def measure_training(variant, steps, texts=None):
    if "allocator" in variant:
        script.choose_hardware()
    device, tokenizer = plain_device(), make_tokenizer()
    model = make_model(variant, device)
    encoded = script.encode(tokenizer, texts or make_texts(16 * (steps + 1)), 512, end=True)
    rows, trainer_class = 4, SFTTrainer
    if "own loss" in variant:
        trainer_class = script.LoRATrainer
        if device == "cpu" and model.num_parameters() > script.LARGE and "4 x 4" not in variant:
            rows = 1  # as training_config has it
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps + 1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=16 // rows,
        learning_rate=1e-4,
        max_grad_norm=0.3,
        max_length=512,
        bf16="bf16" in variant,
        gradient_checkpointing="checkpointing" in variant,
        use_cpu=device == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        include_num_input_tokens_seen="non_padding",
        logging_steps=1000,
        pad_to_multiple_of=script.pad_multiple(model, 512) if "own loss" in variant else None,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.1, fan_in_fan_out=True)
    clock, data = Clock(), script.training_data(encoded, on_prompt=True)
    trainer = trainer_class(model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    trainer.add_callback(clock)
    trainer.train()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else memory
    return {"rate": clock.tokens / clock.seconds, "memory": memory, "tokens": clock.tokens}


def make_reference():
    """(device, tokenizer, model) as the reference has them."""
    return plain_device(), make_tokenizer(), make_model(set(), plain_device()).eval()


def measure_scoring(ours, rows):
    device, tokenizer, model = make_ours() if ours else make_reference()
    texts = make_texts(rows)
    tokens = sum(len(row.ids) for row in script.encode(tokenizer, texts, 512))
    began = time.perf_counter()
    if ours:
        script.score_rows(model, tokenizer, texts, max_length=512, batch_size=script.BATCH_SIZE)
    else:
        with torch.no_grad():
            for text in texts:
                ids = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")["input_ids"].to(device)
                model(ids, labels=ids).loss.item()
    return {"rate": tokens / (time.perf_counter() - began)}


def measure_measured(rows):
    """(Rows, seconds) of each part of script.measure, with `rows` articles or facts in each.

    Everyday text and facts are the real ones, but a token is a word here, which is longer than GPT-2's.
    """
    _, tokenizer, model = make_ours()
    settings = SimpleNamespace(MAX_LENGTH=512, BATCH_SIZE=script.BATCH_SIZE, TRAIN_ON_PROMPT=True)
    train, held_out = make_texts(rows, seed=1), make_texts(rows)
    encoded = script.encode(tokenizer, train, settings.MAX_LENGTH, end=True)
    read_lines, score_rows, parts = script.read_lines, script.score_rows, []

    def timed(model, tokenizer, texts, **options):
        began = time.perf_counter()
        scores = score_rows(model, tokenizer, texts, **options)
        parts.append((len(texts), time.perf_counter() - began))
        return scores

    with mock.patch.multiple(script, score_rows=timed, read_lines=lambda path: read_lines(path)[:rows]):
        script.measure(model, tokenizer, settings, train, held_out, encoded)
    return parts


def measure_generation(ours, new_tokens):
    device, tokenizer, model = make_ours() if ours else make_reference()
    questions = ["What is this ?"] * 5
    began = time.perf_counter()
    if ours:
        asked = {"max_new_tokens": new_tokens, "temperature": 0.7, "seed": 0}
        script.generate_answers(model, tokenizer, questions, **asked)
    else:
        for question in questions:
            inputs = tokenizer(script.format_prompt(question), return_tensors="pt").to(device)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            asked = {"max_new_tokens": new_tokens, "do_sample": True, "temperature": 0.7}
            model.generate(input_ids=ids, attention_mask=mask, pad_token_id=tokenizer.pad_token_id, **asked)
    return {"rate": 5 * new_tokens / (time.perf_counter() - began)}


def measure_matmul(repeats=5, tokens=2048):
    """GFLOP/s at the shapes of GPT-2's blocks in fp32 and, where the hardware has it, bf16."""
    hardware, rates = script.choose_hardware(), {}
    device = hardware["device"]
    for dtype in (torch.float32, torch.bfloat16)[: 1 + (hardware["precision"] == "bf16")]:
        best = 0
        for _ in range(repeats):
            work, seconds = 0, 0.0
            for k, n in ((768, 2304), (768, 768), (768, 3072), (3072, 768)):
                a, b = torch.randn(tokens, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
                (a @ b).sum().item()
                began = time.perf_counter()
                for _ in range(8):
                    c = a @ b
                c[0, 0].item()
                seconds += time.perf_counter() - began
                work += 8 * 2 * tokens * k * n
            best = max(best, work / seconds / 1e9)
        rates[str(dtype)] = best
    return rates


def measure_rows(n, steps):
    """The whole way from a file of n rows to some steps of training."""
    path = Path(tempfile.mkdtemp(), "rows.jsonl")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(n)))
    began = time.perf_counter()
    train, test, _ = script.load_splits(str(path), test_size=0.1, seed=42)
    prepared = time.perf_counter() - began
    variant = on_this_machine(TRAINING["ours"], script.choose_hardware())
    result = measure_training(variant, steps, train["text"][:])
    return {**result, "seconds": prepared, "train_rows": len(train), "test_rows": len(test)}


def in_own_process(function, *args, checkout=None):
    """Call a function of this file, or of another checkout's, in a new process: nothing is inherited."""
    file = Path(checkout, "tests", "benchmark.py") if checkout else __file__
    call = json.dumps([function, *[sorted(arg) if isinstance(arg, set) else arg for arg in args]])
    environment = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"} | os.environ  # as the script has it
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run([sys.executable, file, "--call", call], env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def print_training(variants, hardware, matmul, steps, checkout):
    """The table of training; returns tokens/s of every line."""
    print("| training | tokens/s | ratio | peak memory | share of the best matmul rate |\n|---|---|---|---|---|")
    rates = {}
    for label, variant in variants.items():
        beside = checkout if label == BESIDE else None
        variant = on_this_machine(variant, hardware)
        result = in_own_process("measure_training", variant, steps, checkout=beside)
        rates[label] = rate = result["rate"]
        # a LoRA step: forward and the gradient of the activations, none of the weights; attention left out
        share = 4 * MATMUL_PARAMETERS * rate / 1e9 / max(matmul.values())
        ratio = rate / rates[REFERENCE]
        print(f"| {label} | {rate:,.0f} | {ratio:.1f} | {result['memory']:.1f} GiB | {share:.0%} |", flush=True)
    return rates


def print_measured(rows):
    """The table of all that is measured before training; returns its seconds at the real data's size, in a dict."""
    print("\n| measured before training | rows | seconds | seconds at the real size |\n|---|---|---|---|")
    seconds = {}
    for (label, all_rows), (scored, took) in zip(
        MEASURED.items(), in_own_process("measure_measured", rows), strict=True
    ):
        seconds[label] = took * all_rows / scored
        print(f"| {label} | {scored:,} | {took:.1f} | {seconds[label]:,.0f} for {all_rows:,} |", flush=True)
    return seconds


def print_whole_job(rates, scoring_rows, measured_rows, checkout):
    """The tables of scoring, of answers and of what is measured, and the whole reference job as they project it."""
    print("\n| scoring and generation | tokens/s | ratio |\n|---|---|---|")
    tokens = sum(min(512, 105 + n) for n in ANSWER_TOKENS) / len(ANSWER_TOKENS)  # of a row, roughly
    base, projected = {}, {}
    for label in (REFERENCE, "ours", BESIDE):
        if label not in rates:
            continue
        ours, beside = label != REFERENCE, checkout if label == BESIDE else None
        scoring = in_own_process("measure_scoring", ours, scoring_rows if ours else 48, checkout=beside)["rate"]
        asking = in_own_process("measure_generation", ours, 250, checkout=beside)["rate"]
        for what, rate in (("scoring held-out rows", scoring), ("five answers", asking)):
            ratio = rate / base.setdefault(what, rate)
            print(f"| {what}, {label} | {rate:,.0f} | {ratio:.1f} |", flush=True)
        scored = 2 * (687 if ours else 100)
        seconds = 386 * 16 * tokens / rates[label] + (3 * 687 + scored) * tokens / scoring + 2500 / asking
        projected[f"{label}, perplexity of {scored // 2} rows"] = seconds
    *twice, once = print_measured(measured_rows).values()
    held_out, *rest = twice
    more = 2 * sum(rest) + once
    projected["ours, with all that it measures"] = projected["ours, perplexity of 687 rows"] + more
    print("\nThe whole job (386 steps of 16 rows, 3 validations of 687 rows, perplexity twice, 10 answers), projected:")
    print("\n".join(f"- {label}: {seconds / 3600:.2f} hours" for label, seconds in projected.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", action="store_true")
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--beside", metavar="CHECKOUT", help="another checkout of this project")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of 16 rows to time, after a first one")
    parser.add_argument("--scoring-rows", type=int, default=687, help="rows that this script scores")
    parser.add_argument(
        "--measured-rows", type=int, default=24, help="articles or facts in each part of what is measured"
    )
    parser.add_argument("--call", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        function, *values = json.loads(args.call)
        print(json.dumps(globals()[function](*[set(value) if isinstance(value, list) else value for value in values])))
        return
    matmul = in_own_process("measure_matmul")
    hardware, cores = script.choose_hardware(), torch.get_num_threads()
    fp32, bf16 = matmul["torch.float32"], matmul.get("torch.bfloat16", 0)
    print(f"GPT-2 124M, random weights, on {hardware['name']}, {cores} cores, torch {torch.__version__};")
    print(f"matrix multiplication at its shapes {fp32:,.0f} GFLOP/s in fp32, {bf16 or 'none'} in bf16.\n")
    if args.rows:
        print("| rows | read, clean, split | training tokens/s | peak memory |\n|---|---|---|---|")
        for n in (500, 2000, 6000):
            result = in_own_process("measure_rows", n, args.steps)
            cost = f"{result['seconds']:.1f} s | {result['rate']:,.0f} | {result['memory']:.1f} GiB"
            print(f"| {n:,} | {cost} |", flush=True)
        return
    if args.pieces:
        print_training({REFERENCE: set()} | PIECES, hardware, matmul, args.steps, None)
        return
    variants = dict(TRAINING)
    if args.beside:
        variants[BESIDE] = TRAINING["ours"]
    rates = print_training(variants, hardware, matmul, args.steps, args.beside)
    print_whole_job(rates, args.scoring_rows, args.measured_rows, args.beside)


if __name__ == "__main__":
    main()
