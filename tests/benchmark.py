"""How fast, and with how much memory, against the reference's recipe: GPT-2 124M, random weights, no network.

    python tests/benchmark.py                    # training, scoring, answers, the whole job
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

import torch
from datasets import Dataset
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
    "+ loss in chunks, frozen weights in bf16, padded shapes, eager attention": TRAINING["ours"] | {"4 x 4"},
    "+ 1 x 16 rows instead of 4 x 4 (ours)": TRAINING["ours"],
    "ours in fp32": TRAINING["ours"] - {"bf16"},
}
MATMUL_PARAMETERS = 12 * 12 * 768**2 + 50257 * 768  # of the blocks and the LM head


def make_tokenizer(size=50257):
    """A word for each token, among them those of the prompt; as fast a tokenizer as GPT-2's, and without its files."""
    words = dict.fromkeys(["<|endoftext|>", *script.format_prompt("What is this ?").split(), "</s>"])
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


def make_model(variant):
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if "no dropout" in variant else {}
    activation = "gelu_pytorch_tanh" if "fused gelu" in variant else "gelu_new"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(activation_function=activation, **dropout))
    model.requires_grad_(False)
    if "own loss" in variant:
        return script.speed_up(model, "bf16" if "bf16" in variant and has_bf16() else "fp32")
    return model


def has_bf16():
    """Whether the hardware multiplies in bf16, as the script decides it but without its allocator."""
    return torch.cuda.is_available() or script.cpu_has_bf16()


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
    tokenizer = make_tokenizer()
    encoded = script.encode(tokenizer, texts or make_texts(16 * (steps + 1)), 512, end=True)
    data = Dataset.from_dict({"input_ids": [ids for ids, _, _ in encoded], "labels": [ids for ids, _, _ in encoded]})
    rows, trainer_class, more = 4, SFTTrainer, {}
    if "own loss" in variant:
        trainer_class, more = script.LoRATrainer, {"validate": None}
        rows = 4 if "4 x 4" in variant or torch.cuda.is_available() else 1  # as fine_tune has it
    model = make_model(variant)
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps + 1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=16 // rows,
        learning_rate=1e-4,
        max_grad_norm=0.3,
        max_length=512,
        bf16="bf16" in variant and has_bf16(),
        gradient_checkpointing="checkpointing" in variant,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        include_num_input_tokens_seen="non_padding",
        logging_steps=1000,
        pad_to_multiple_of=script.round_up(1, script.is_rounded(model)) if "own loss" in variant else None,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.1, fan_in_fan_out=True)
    clock = Clock()
    trainer = trainer_class(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora, **more
    )
    trainer.add_callback(clock)
    trainer.train()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else memory
    return {"rate": clock.tokens / clock.seconds, "memory": memory, "tokens": clock.tokens}


def measure_scoring(ours, rows):
    device = script.choose_hardware()[0] if ours else ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, texts = make_tokenizer(), make_texts(rows)
    model = make_model(TRAINING["ours"] if ours else set()).to(device).eval()
    tokens = sum(len(ids) for ids, _, _ in script.encode(tokenizer, texts, 512))
    began = time.perf_counter()
    if ours:
        script.score_rows(model, tokenizer, texts, max_length=512)
    else:
        with torch.no_grad():
            for text in texts:
                ids = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")["input_ids"].to(device)
                model(ids, labels=ids).loss.item()
    return {"rate": tokens / (time.perf_counter() - began)}


def measure_generation(ours, new_tokens):
    device = script.choose_hardware()[0] if ours else ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, model = make_tokenizer(), make_model(TRAINING["ours"] if ours else set()).to(device).eval()
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
    script.choose_hardware()
    device, rates = "cuda" if torch.cuda.is_available() else "cpu", {}
    for dtype in (torch.float32, torch.bfloat16)[: 1 + has_bf16()]:
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
    result = measure_training(TRAINING["ours"], steps, train["text"][:])
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


def print_training(variants, matmul, steps, checkout):
    """The table of training; returns tokens/s of every line."""
    print("| training | tokens/s | ratio | peak memory | share of the best matmul rate |\n|---|---|---|---|---|")
    rates = {}
    for label, variant in variants.items():
        beside = checkout if label == BESIDE else None
        result = in_own_process("measure_training", variant, steps, checkout=beside)
        rates[label] = rate = result["rate"]
        # a LoRA step: forward and the gradient of the activations, none of the weights; attention left out
        share = 4 * MATMUL_PARAMETERS * rate / 1e9 / max(matmul.values())
        ratio = rate / rates[REFERENCE]
        print(f"| {label} | {rate:,.0f} | {ratio:.1f} | {result['memory']:.1f} GiB | {share:.0%} |", flush=True)
    return rates


def print_whole_job(rates, scoring_rows, checkout):
    """The tables of scoring and of answers, and the whole reference job as projected from all three."""
    print("\n| scoring and generation | tokens/s | ratio |\n|---|---|---|")
    tokens = sum(min(512, 105 + n) for n in ANSWER_TOKENS) / len(ANSWER_TOKENS)  # of a row, roughly
    base, projected = {}, []
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
        projected.append(f"- {label}, perplexity of {scored // 2} rows: {seconds / 3600:.2f} hours")
    print("\nThe whole job (386 steps of 16 rows, 3 validations of 687 rows, perplexity twice, 10 answers), projected:")
    print("\n".join(projected))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", action="store_true")
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--beside", metavar="CHECKOUT", help="another checkout of this project")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of 16 rows to time, after a first one")
    parser.add_argument("--scoring-rows", type=int, default=687, help="rows that this script scores")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        function, *values = json.loads(args.call)
        print(json.dumps(globals()[function](*[set(value) if isinstance(value, list) else value for value in values])))
        return
    matmul = in_own_process("measure_matmul")
    name, cores = script.choose_hardware()[2], torch.get_num_threads()
    fp32, bf16 = matmul["torch.float32"], matmul.get("torch.bfloat16", 0)
    print(f"GPT-2 124M, random weights, on {name}, {cores} cores, torch {torch.__version__};")
    print(f"matrix multiplication at its shapes {fp32:,.0f} GFLOP/s in fp32, {bf16 or 'none'} in bf16.\n")
    if args.rows:
        print("| rows | read, clean, split | training tokens/s | peak memory |\n|---|---|---|---|")
        for n in (500, 2000, 6000):
            result = in_own_process("measure_rows", n, args.steps)
            cost = f"{result['seconds']:.1f} s | {result['rate']:,.0f} | {result['memory']:.1f} GiB"
            print(f"| {n:,} | {cost} |", flush=True)
        return
    if args.pieces:
        print_training({REFERENCE: set()} | PIECES, matmul, args.steps, None)
        return
    variants = dict(TRAINING)
    if args.beside:
        variants[BESIDE] = TRAINING["ours"]
    rates = print_training(variants, matmul, args.steps, args.beside)
    print_whole_job(rates, args.scoring_rows, args.beside)


if __name__ == "__main__":
    main()
