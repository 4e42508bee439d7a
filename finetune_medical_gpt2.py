"""Fine-tune GPT-2 on medical text with LoRA, and measure honestly what that changed.

    python finetune_medical_gpt2.py                             # constants below; edit them, there are no flags
    torchrun --nproc_per_node=N finetune_medical_gpt2.py        # several processes: the same, data parallel

In order: the base model's perplexity on held-out text and its answers to five questions; LoRA fine-tuning with TRL's
SFTTrainer; the same two measurements, by the same functions, on the adapter as it was saved; plots and a report. It
writes OUTPUT_DIR/<run>/: results.json, report.md, training_loss.png, perplexity_comparison.png, adapter/ and, where
asked for, merged/. Killed at any moment, the same command goes on from where it was. Where the Hub can't be reached,
the same pipeline runs on a tiny model and data that ship in tests/, and everything says so.

None of what it writes is medical advice.
"""

import copy
import ctypes
import errno
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import textwrap
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import datasets
import filelock
import huggingface_hub
import matplotlib.pyplot as plt
import numpy as np
import psutil
import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList, TrainerCallback
from trl import SFTConfig, SFTTrainer

# model and data
MODEL_NAME = "gpt2"  # any causal LM: Hub id or local folder (safetensors)
MODEL_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"  # openai-community/gpt2; None for a local folder
DATASET_NAME = "aboonaji/wiki_medical_terms_llam2_format"  # Hub id, or a local .jsonl, .json, .csv, .parquet (also .gz)
DATASET_REVISION = None  # None: the newest; what was used is recorded in results.json
TEST_SIZE = 0.1  # share of the rows held out for validation and perplexity
MAX_LENGTH = 512  # tokens; longer rows are cut
SEED = 42
DROP_EMPTY_ANSWERS = True  # False: keep rows without an article, as the reference did
OFFLINE_FALLBACK = True  # Hub unreachable and nothing cached: run on the model and data in tests/; False: stop

# LoRA
LORA_R = 8
LORA_ALPHA = 32
LORA_DROPOUT = 0.1
LORA_TARGET_MODULES = None  # None: PEFT's default for the architecture (GPT-2: c_attn); a list, or "all-linear"

# training
NUM_EPOCHS = 1
MAX_STEPS = -1  # optimizer steps; -1: NUM_EPOCHS decides
LEARNING_RATE = 1e-4  # the reference's; 1e-3 learns far more in the same time, see README
BATCH_SIZE = 4  # rows per process and forward pass
GRADIENT_ACCUMULATION_STEPS = 4  # an optimizer step sees BATCH_SIZE x this x processes rows
WARMUP_RATIO = 0.03
MAX_GRAD_NORM = 0.3
LOGGING_STEPS = 10
EVAL_STEPS = 100  # validation loss and checkpoint; checkpoints also every CHECKPOINT_MINUTES
CHECKPOINT_MINUTES = 2
TRAIN_ON_PROMPT = True  # False: the loss sees the answers only
BASE_DROPOUT = 0.0  # the base model's own dropouts while training; None: as its config says (GPT-2: 0.1, slower)

# questions
QUESTIONS = {
    "Paracetamol poisoning": "What are the symptoms and treatment for paracetamol poisoning?",
    "Congenital adrenal hyperplasia": "Explain the causes and symptoms of Congenital adrenal hyperplasia.",
    "Anthrax": "Describe the transmission, symptoms, and treatment of Anthrax.",
    "Cachexia": "What is Cachexia, and how does it affect the body?",
    "Botulism": "Explain the causes, symptoms, and treatment of Botulism.",
}
MAX_NEW_TOKENS = 250
TEMPERATURE = 0.7  # 0: greedy

# output
OUTPUT_DIR = "outputs"
REPORT_TO = "none"  # or "tensorboard", "trackio", "wandb"
SAVE_MERGED = False  # True: also write merged/, a plain model folder with the adapter merged in

SETTINGS = [name for name in globals() if name.isupper()]
NO_MATTER = ("OUTPUT_DIR", "REPORT_TO", "SAVE_MERGED", "OFFLINE_FALLBACK", "CHECKPOINT_MINUTES")  # to a run's figures

# what the offline default sets apart; all other constants hold there too
OFFLINE_SETTINGS = {
    "MODEL_NAME": "tests/tiny_gpt2",
    "MODEL_REVISION": None,
    "DATASET_NAME": "tests/medical_terms.jsonl",
    "DATASET_REVISION": None,
    "NUM_EPOCHS": 6,
    "LEARNING_RATE": 5e-3,
    "EVAL_STEPS": 20,
}

PROMPT = (
    "<s> [INST] <<SYS>> You are a helpful, respectful, and honest assistant. Always answer as helpfully as possible, "
    "while being safe. Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
    "illegal content. Please ensure that your responses are socially unbiased and positive in nature. If a question "
    "does not make any sense or is not factually coherent, explain why instead of answering something not correct. If "
    "you don't know the answer to a question, please don't share false information. <</SYS>> {question} [/INST]"
)
ANSWER_MARK, END_MARK = "[/INST]", "</s>"  # the answer begins after the one and ends before the other
CHUNK = 512  # positions whose logits are in memory at a time
PACKAGES = ("torch", "transformers", "datasets", "peft", "trl", "accelerate")
HERE = Path(__file__).resolve().parent


class InputError(ValueError):
    """A setting, input or circumstance that the user can mend; ends the program with one line and exit code 2."""


# ---------------------------------------------------------------- data


def format_prompt(question):
    """The prompt of every row of the data set, up to where the answer begins; the same for training and asking."""
    return PROMPT.format(question=question)


def read_json(path):
    """The rows of a .json (one array, or a row a line) or .jsonl file, also gzipped."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            content = file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"DATASET_NAME: {path} can't be read: {last_line(error)}") from error
    is_array = content.lstrip().startswith("[")
    rows = []
    for number, line in enumerate([content] if is_array else content.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            where = f"{path}, line {number + error.lineno - 1}"
            raise InputError(f"DATASET_NAME: {where}: not JSON ({error.msg}); mend or remove that line") from error
    return rows[0] if is_array else rows


def read_texts(source, revision=None):
    """The `text` column of a Hub data set's train split or of a local file, not cleaned yet, and where it was loaded from."""
    path = Path(source)
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".jsonl", ".json", ".csv", ".parquet"):
        if looks_local(source):
            raise InputError(f"DATASET_NAME: {source} is no .jsonl, .json, .csv or .parquet file")
        rows = datasets.load_dataset(source, revision=revision, split="train")
    elif not path.is_file():
        raise InputError(f"DATASET_NAME: there is no file {path}; check the path")
    elif path.stat().st_size == 0:
        raise InputError(f"DATASET_NAME: {path} is empty")
    elif kind in (".jsonl", ".json"):
        rows = [row if isinstance(row, dict) else {} for row in read_json(path)]
    else:
        try:
            rows = datasets.load_dataset(kind[1:], data_files=str(path), split="train")
        except Exception as error:
            raise InputError(f"DATASET_NAME: {path} can't be read as {kind[1:]}: {last_line(error)}") from error
    columns = rows.column_names if isinstance(rows, datasets.Dataset) else sorted({key for row in rows for key in row})
    if "text" not in columns:
        raise InputError(f"DATASET_NAME: {source} needs a column `text`; it has {', '.join(columns) or 'none'}")
    if isinstance(rows, datasets.Dataset):
        return rows["text"][:], rows.info.download_checksums
    return [row.get("text") for row in rows], None


def load_splits(source, revision=None, *, test_size, seed, drop_empty=True):
    """Read, clean, shuffle and split a data set.

    `source` is a Hub id or a local .jsonl, .json, .csv or .parquet file (also .gz) with a column `text`. Exact duplicates
    go first, so that no row is on both sides. Returns (train, test, stats): two `datasets.Dataset` with a `text` column,
    and the row counts. Raises InputError where nothing can be trained on.
    """
    texts, origin = read_texts(source, revision)
    sound = [text for text in texts if isinstance(text, str) and ANSWER_MARK in text]
    unique = list(dict.fromkeys(sound))
    kept = [text for text in unique if answer_of(text) or not drop_empty]
    stats = {"rows": len(texts), "train_rows": 0, "test_rows": 0, "dropped_empty": len(unique) - len(kept)}
    stats |= {"dropped_duplicate": len(sound) - len(unique), "dropped_malformed": len(texts) - len(sound)}
    if len(kept) < 2 or not 1 <= math.ceil(len(kept) * test_size) < len(kept):
        raise InputError(
            f"DATASET_NAME: {source} has too few rows to train on and hold out: of {len(texts):,}, "
            f"{stats['dropped_malformed']:,} are no text with {ANSWER_MARK}, {stats['dropped_duplicate']:,} duplicates, "
            f"{stats['dropped_empty']:,} without an answer; {len(kept):,} left for TEST_SIZE = {test_size}"
        )
    info = datasets.DatasetInfo(download_checksums=origin)
    splits = datasets.Dataset.from_dict({"text": kept}, info=info).train_test_split(test_size=test_size, seed=seed)
    stats |= {"train_rows": len(splits["train"]), "test_rows": len(splits["test"])}
    return splits["train"], splits["test"], stats


def answer_of(text):
    """The article of a row, without its end mark."""
    return text.split(ANSWER_MARK, 1)[1].replace(END_MARK, "").strip()


def encode(tokenizer, texts, max_length, end=""):
    """Token ids of each text + `end`, cut at `max_length` -> a list of (ids, first, answer_bytes).

    `first` is the index of the answer's first token: the first that starts at or after the end of [/INST], len(ids) where
    there is none. `answer_bytes` is the UTF-8 length of the answer text that the ids cover.
    """
    batch = tokenizer([text + end for text in texts], truncation=True, max_length=max_length, return_offsets_mapping=True)
    encoded = []
    for text, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True):
        mark = text.find(ANSWER_MARK)
        begin = mark + len(ANSWER_MARK) if mark >= 0 else len(text) + 1
        first = next((i for i, (start, stop) in enumerate(offsets) if start >= begin and stop > start), len(ids))
        covered = text[begin : offsets[-1][1]] if first < len(ids) else ""
        encoded.append((ids, first, len(covered.encode())))
    return encoded


# ---------------------------------------------------------------- scoring


class ChunkedNLL(torch.autograd.Function):
    """Cross-entropy under a frozen LM head: hidden (n, d), weight (vocabulary, d), labels (n,) -> NLL (n,) in fp32.

    Works on CHUNK positions at a time and takes the gradient for `hidden` along, so that the logits of a batch, by far
    the largest tensor of a small language model's training step, never exist as a whole.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        nll = torch.empty(len(hidden), device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            log_probs = (hidden[part] @ weight.T).float().log_softmax(-1)
            nll[part] = -log_probs.gather(1, labels[part, None])[:, 0]
            if grad is not None:
                probs = log_probs.exp_()
                probs.scatter_add_(1, labels[part, None], probs.new_full((len(probs), 1), -1.0))
                grad[part] = probs.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx, grad_nll):
        (grad,) = ctx.saved_tensors
        return grad * grad_nll[:, None].to(grad.dtype), None, None


def head_weight(base, dtype):
    """The LM head (vocabulary, d) for ChunkedNLL, or None where logits are more than hidden states times this matrix.

    In 16 bits it is centred over the vocabulary: that adds the same number to all logits of a position, which no
    probability notices, but GPT-2's logits sit near -100, where bfloat16 counts in halves.
    """
    ids = torch.arange(8, device=base.device)[None]
    weight = base.get_output_embeddings().weight.detach()
    with torch.no_grad():
        logits = type(base).forward(base, input_ids=ids).logits
        plain = base.base_model(input_ids=ids).last_hidden_state @ weight.T
    if logits.shape != plain.shape or not torch.allclose(logits, plain, rtol=1e-3, atol=1e-3):
        return None
    return weight if dtype == torch.float32 else (weight - weight.mean(0)).to(dtype)


def label_nll(base, weight, input_ids, labels, **unused):
    """NLL in nats of every label that is not -100, flat (n,): the forward pass of scoring and of training.

    Rows are padded on the right: there a causal model needs no padding mask.
    """
    live = labels[:, 1:] != -100
    if weight is None:
        return torch.nn.functional.cross_entropy(base(input_ids).logits[:, :-1][live].float(), labels[:, 1:][live], reduction="none")
    hidden = base.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
    return ChunkedNLL.apply(hidden[live].to(weight.dtype), weight, labels[:, 1:][live])


@torch.no_grad()
def score_rows(model, tokenizer, texts, *, max_length, batch_size=8, dtype=torch.float32, progress=None):
    """Score every text once, shared out over all processes -> float64 array (len(texts), 5).

    Its columns: NLL in nats and predicted tokens of the row; the same of its answer; the answer's UTF-8 bytes.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    was_training = base.training
    base.eval()
    weight = head_weight(base, dtype)
    rows = encode(tokenizer, texts, max_length)
    rank, processes = process_rank()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))[rank::processes]  # little padding
    scored = []
    with tqdm(total=len(order), desc=progress, unit="row", disable=rank > 0 or not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            ids = [torch.tensor(rows[i][0]) for i in part]
            input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(base.device)
            labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100).to(base.device)
            with torch.autocast(base.device.type, dtype=dtype, enabled=dtype != torch.float32):
                nll = label_nll(base, weight, input_ids, labels).double().cpu()
            for i, row in zip(part, nll.split([len(x) - 1 for x in ids]), strict=True):
                if not row.isfinite().all():
                    raise InputError(f"the model's loss on held-out row {i} is not finite: {texts[i][-60:]!r}")
                answer = row[max(rows[i][1] - 1, 0) :]
                scored.append((i, row.sum().item(), len(row), answer.sum().item(), len(answer), rows[i][2]))
            bar.update(len(part))
    base.train(was_training)
    if processes > 1:
        gathered = [None] * processes
        dist.all_gather_object(gathered, scored)
        scored = [row for part in gathered for row in part]
    return np.array(sorted(scored), dtype=np.float64).reshape(-1, 6)[:, 1:]


def bootstrap_ci95(statistic, n):
    """95 % interval of `statistic(weights)` under resampling of n rows; weights (1000, n) count how often each is drawn."""
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)
    return [float(bound) for bound in np.percentile(statistic(weights), (2.5, 97.5))]


def summarize_scores(rows):
    """Perplexities of `score_rows`' array, as results.json has them: sum the NLL, count the tokens, divide once."""
    nll, tokens, answer_nll, answer_tokens, answer_bytes = rows.T
    first = rows[:100][tokens[:100] > 0]
    summary = {
        "full_text": math.exp(nll.sum() / tokens.sum()),
        "answer": None,
        "seed_protocol": math.exp(np.mean(first[:, 0] / first[:, 1])),  # the reference's mean of row means
        "bits_per_byte": None,
        "tokens": int(tokens.sum()),
        "answer_tokens": int(answer_tokens.sum()),
        "answer_ci95": None,
    }
    nll, count = answer_nll[answer_tokens > 0], answer_tokens[answer_tokens > 0]
    if len(nll):
        summary["answer"] = math.exp(nll.sum() / count.sum())
        summary["bits_per_byte"] = nll.sum() / math.log(2) / answer_bytes.sum()
        summary["answer_ci95"] = bootstrap_ci95(lambda w: np.exp((w @ nll) / (w @ count)), len(nll))
    return summary


def evaluate_perplexity(model, tokenizer, texts, *, max_length, batch_size=8, dtype=torch.float32):
    """Perplexities of `texts` under a causal LM, plain or PEFT, each text cut at `max_length` tokens.

    Returns full_text, answer (tokens after [/INST]), seed_protocol, bits_per_byte, tokens, answer_tokens, answer_ci95;
    None where no text has an answer. `dtype` other than float32 runs the model under autocast. Raises InputError where
    the model's loss is not finite.
    """
    texts = list(texts)
    return summarize_scores(score_rows(model, tokenizer, texts, max_length=max_length, batch_size=batch_size, dtype=dtype))


def paired_change(before, after):
    """Mean change of a row's answer NLL per token, in nats, between two `score_rows` arrays, and its 95 % interval."""
    has_answer = before[:, 3] > 0
    change = (after - before)[has_answer, 2] / before[has_answer, 3]
    interval = bootstrap_ci95(lambda w: (w @ change) / len(change), len(change))
    return {"rows": len(change), "mean": float(change.mean()), "ci95": interval, "improved": float((change < 0).mean())}


# ---------------------------------------------------------------- answers


@torch.no_grad()
def generate_answers(model, tokenizer, questions, *, max_new_tokens, temperature, seed, with_finished=False):
    """Ask all questions as one left-padded batch, in fp32 -> a list of answers without the prompt.

    Sampled at `temperature` (0: greedy) from the 50 likeliest tokens, seeded; cut at the first </s> or EOS.
    `with_finished` returns (answer, finished) pairs: whether it ended so by itself.
    """
    prompts = [format_prompt(question) for question in questions]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    width = inputs["input_ids"].shape[1]
    eos = model.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    was_training = model.training
    model.eval()
    bar = tqdm(total=max_new_tokens, desc="  answering", unit="token", leave=False)

    def ended(input_ids, scores, **unused):
        bar.update()
        tails = tokenizer.batch_decode(input_ids[:, max(width, input_ids.shape[1] - 8) :])
        return torch.tensor([END_MARK in tail for tail in tails], device=input_ids.device)

    with torch.random.fork_rng(), bar:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature else {"do_sample": False}
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([ended]),
            **sampling,
        )
    model.train(was_training)
    answers = []
    for ids in output[:, width:].tolist():
        stop = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
        text = tokenizer.decode(ids[:stop], skip_special_tokens=False)
        answers.append((text.split(END_MARK)[0].strip(), stop < len(ids) or END_MARK in text))
    return answers if with_finished else [answer for answer, _ in answers]


def answer_stats(text, *, finished=None):
    """Counts of words, sentences, unique words and distinct bigrams, case ignored.

    `finished`: whether generation ended by itself; where it isn't given, whether the text ends like a sentence.
    """
    words = re.findall(r"\w+(?:['’-]\w+)*", text.lower())
    return {
        "words": len(words),
        "sentences": sum(bool(re.search(r"\w", part)) for part in re.split(r"[.!?]+(?=\s|$)", text)),
        "unique_words": len(set(words)),
        "distinct_bigrams": len(set(zip(words, words[1:], strict=False))),
        "finished": bool(re.search(r"[.!?][\"')\]]*\s*$", text)) if finished is None else finished,
    }


# ---------------------------------------------------------------- training


class StepClock(TrainerCallback):
    """Times the optimizer steps alone; asks for checkpoints by the clock, and for a log line wherever one is saved."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds = next((entry["seconds"] for entry in reversed(state.log_history) if "seconds" in entry), 0.0)
        self.saved = time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.started
        # a checkpoint doesn't hold the loss summed up since the last log line: save only where there is none
        last = state.global_step >= state.max_steps
        control.should_log |= control.should_save or last
        control.should_evaluate &= not last  # the saved adapter is scored right after
        overdue = time.monotonic() - self.saved > CHECKPOINT_MINUTES * 60 and args.world_size == 1
        control.should_save |= control.should_log and overdue

    def on_save(self, args, state, control, **kwargs):
        self.saved = time.monotonic()


class LoRATrainer(SFTTrainer):
    """SFTTrainer with a faster loss where TRL's own kernel doesn't run, exact validation, and checkpoints that can be checked."""

    def __init__(self, *args, validate, **kwargs):
        self.clock = StepClock()
        super().__init__(*args, callbacks=[self.clock], **kwargs)
        self.validate = validate  # model -> mean NLL of the held-out split
        base = self.model.get_base_model()
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        weight = None if base.device.type == "cuda" else head_weight(base.eval(), dtype)
        self.own_loss = weight is not None
        if self.own_loss:  # as the model's forward, so that autocast, DDP and PEFT wrap it as they wrap any other
            base.forward = functools.partial(label_nll, base, weight)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.own_loss:
            nll = model(input_ids=inputs["input_ids"], labels=inputs["labels"])
            loss = nll.sum() / (max(len(nll), 1) if num_items_in_batch is None else num_items_in_batch)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes  # DDP averages gradients, the count is over all processes
        else:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if not loss.isfinite():
            raise InputError(
                f"the training loss is {loss.item()} at step {self.state.global_step + 1}: lower LEARNING_RATE "
                f"(now {self.args.learning_rate:g}); the last good checkpoint is kept in {self.args.output_dir}"
            )
        return loss

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": self.validate(self.model)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs, start_time=None):
        logs = {key: logs[key] for key in ("loss", "grad_norm", "learning_rate", "eval_loss") if key in logs}
        if logs:
            super().log(logs | {"seconds": round(self.clock.seconds, 3)})

    def create_model_card(self, *args, **kwargs):
        """Checkpoints need none; the adapter gets its own."""

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if dist.is_initialized():
            dist.barrier()
        if self.args.should_save:
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            write_json(folder / "complete.json", {file.name: digest(file) for file in sorted(folder.iterdir())})


def newest_checkpoint(folder):
    """The newest checkpoint of which every file is as it was written, or None; torn ones are removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            manifest = json.loads((checkpoint / "complete.json").read_text())
            if all(digest(checkpoint / name) == value for name, value in manifest.items()):
                return checkpoint
        except (OSError, ValueError):
            pass
        say(f"{checkpoint.name} was not written to its end; passing it over")
        shutil.rmtree(checkpoint, ignore_errors=True)


# ---------------------------------------------------------------- results


def plot_training_loss(log_history, path, *, title="Fine-tuning"):
    """Training and validation loss, in nats per token, over optimizer steps; the first validation is the base model's."""
    train = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    fig, ax = plt.subplots(figsize=(8, 4.8))
    if train:
        ax.plot(*zip(*train, strict=True), color="#0072B2", marker="." if len(train) < 40 else None, label="training")
    if held_out:
        ax.plot(*zip(*held_out, strict=True), color="#D55E00", marker="o", label="validation (held-out rows)")
        ax.axhline(held_out[0][1], color="#D55E00", linestyle=":", linewidth=1, label=f"validation at step {held_out[0][0]}")
    ax.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)")
    ax.grid(alpha=0.3)
    ax.legend()
    save_plot(fig, path)


def plot_perplexity(before, after, path, *, title="Perplexity on held-out text"):
    """Three pairs of bars, before and after: full text, answers only (with its 95 % interval), reference protocol."""
    kinds = {"full_text": "full text\n(prompt + answer)", "answer": "answers only", "seed_protocol": "reference\nprotocol"}
    fig, ax = plt.subplots(figsize=(8, 4.8))
    for offset, (name, scores, color) in enumerate((("before", before, "#999999"), ("after", after, "#0072B2"))):
        for x, kind in enumerate(kinds):
            value, interval = scores[kind] or 0.0, scores["answer_ci95"] if kind == "answer" else None
            errors = None if interval is None else [[value - interval[0]], [interval[1] - value]]
            x += 0.4 * offset - 0.2
            ax.bar(x, value, 0.38, color=color, label=name if kind == "full_text" else None, yerr=errors, capsize=5)
            top = value if interval is None else interval[1]
            ax.annotate(f"{value:.2f}", (x, top), (0, 4), textcoords="offset points", ha="center", fontsize=11)
    ax.set_xticks(range(3), kinds.values())
    ax.set(title=title, ylabel="perplexity (lower is better)")
    ax.margins(y=0.15)
    ax.legend()
    save_plot(fig, path)


def save_plot(fig, path):
    fig.tight_layout()
    fig.savefig(f"{path}.tmp", format="png", dpi=150)
    plt.close(fig)
    os.replace(f"{path}.tmp", path)


def side_by_side(left, right, width=56):
    """Two texts as two columns in a Markdown fence that nothing inside can close."""
    columns = []
    for text in (left, right):
        text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
        columns.append([part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]])
    height = max(map(len, columns))
    before, after = ([*column, *[""] * (height - len(column))] for column in columns)
    lines = [f"{'BEFORE':{width}} | AFTER", "-" * width + "-+-" + "-" * width]
    lines += [f"{a:{width}} | {b}".rstrip() for a, b in zip(before, after, strict=True)]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", left + right)), default=0))
    return "\n".join([fence + "text", *lines, fence])


def short_name(name):
    """The last part of a Hub id or a path."""
    return Path(name).name.split(".")[0]


def table(head, *rows):
    """A Markdown table; floats with two digits, None as a dash."""
    cells = [["–" if x is None else f"{x:,.2f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells))


def write_report(results, path):
    """Write report.md from the content of results.json alone (a dict as main() writes it)."""
    before, after, change = (results["perplexity"][key] for key in ("before", "after", "change"))
    settings, data, training, hardware = (results[key] for key in ("settings", "data", "training", "hardware"))
    steps = {}
    for entry in training["log_history"]:
        steps.setdefault(entry["step"], {}).update(entry)
    # NLL of the whole split, in nats: all tokens, the answers' tokens, and what is left, the prompts'
    nll = {key: [p["tokens"] * math.log(p["full_text"]), 0.0, 0.0] for key, p in (("before", before), ("after", after))}
    for key, p in (("before", before), ("after", after)):
        nll[key][1] = p["answer_tokens"] * math.log(p["answer"]) if p["answer"] else 0.0
        nll[key][2] = nll[key][0] - nll[key][1]
    fall = [b - a for b, a in zip(nll["before"], nll["after"], strict=True)]
    counts = [before["tokens"], before["answer_tokens"], before["tokens"] - before["answer_tokens"]]
    share = fall[2] / fall[0] if fall[0] else 0.0
    origin = [
        [kind, f"{n:,}", *(nll[key][i] / n if n else None for key in ("before", "after")), f"{fall[i]:,.0f}",
         f"{fall[i] / fall[0]:.0%}" if fall[0] else "–"]
        for kind, i, n in (("prompt", 2, counts[2]), ("answer", 1, counts[1]), ("all", 0, counts[0]))
    ]  # fmt: skip
    interval = lambda p: "–" if not p["answer_ci95"] else "{:.2f} to {:.2f}".format(*p["answer_ci95"])  # noqa: E731
    parts = [
        f"# LoRA fine-tuning of {short_name(results['model'])} on {short_name(results['dataset'])}",
        "**This is the offline default: a tiny model on a small data set, both shipped with the script. No figure here "
        "is one of GPT-2.**" if results["offline_fallback"] else "",
        "None of the text below is medical advice. Language models state falsehoods fluently.",
        "## What was run",
        table(
            ["", ""],
            ["model", f"{results['model']} (revision {results['model_revision'] or 'local folder'})"],
            ["data", f"{results['dataset']} (revision {results['dataset_revision'] or 'local file'})"],
            ["LoRA", f"r {settings['LORA_R']}, alpha {settings['LORA_ALPHA']}, dropout {settings['LORA_DROPOUT']}, "
             f"{training['trainable_parameters']:,} trainable of {training['total_parameters']:,} parameters"],
            ["training", f"{training['steps']:,} steps of {settings['BATCH_SIZE']} x "
             f"{settings['GRADIENT_ACCUMULATION_STEPS']} x {hardware['processes']} rows, learning rate "
             f"{settings['LEARNING_RATE']:g}, loss on {'all tokens' if settings['TRAIN_ON_PROMPT'] else 'answers only'}"],
            ["time", f"{training['seconds']:,.0f} s for {training['tokens']:,} tokens "
             f"({training['tokens_per_second']:,.0f} tokens/s)"],
            ["hardware", f"{hardware['name']}, {hardware['precision']}, {hardware['processes']} process(es), "
             f"{hardware['threads']} threads"],
            ["versions", ", ".join(f"{package} {version}" for package, version in results["versions"].items())],
        ),
        f"Data: {data['rows']:,} rows; dropped {data['dropped_empty']:,} without an answer, {data['dropped_duplicate']:,} "
        f"duplicates and {data['dropped_malformed']:,} malformed; {data['train_rows']:,} for training, "
        f"{data['test_rows']:,} held out. {data['truncated_train_rows']:,} of the training rows "
        f"({data['truncated_train_rows'] / data['train_rows']:.0%}) are longer than {settings['MAX_LENGTH']} tokens and cut.",
        "## Training",
        table(
            ["Step", "Training loss", "Validation loss"],
            *([n, *(f"{entry[key]:.4f}" if key in entry else None for key in ("loss", "eval_loss"))]
              for n, entry in steps.items() if "eval_loss" in entry),
        ),
        "Loss in nats per token. Validation is the whole held-out split; step 0 is the base model, the last line the adapter "
        "as saved. The training loss is the mean since the log line before.",
        "![Training and validation loss over optimizer steps](training_loss.png)",
        "## Perplexity on the held-out rows",
        table(
            ["", "before", "after", "change"],
            *([label, before[key], after[key], f"{after[key] / before[key] - 1:+.1%}" if before[key] else None]
              for label, key in (("answers only", "answer"), ("full text", "full_text"),
                                 ("reference protocol", "seed_protocol"), ("bits per byte of answer", "bits_per_byte"))),
            ["answers, 95 % interval", interval(before), interval(after), None],
        ),
        f"**Answers only** is what the model knows: every token after `[/INST]`, {before['answer_tokens']:,} of them. **Full "
        f"text** adds the prompts ({before['tokens']:,} tokens in all), whose boilerplate is the same in every row. The "
        "**reference protocol** is the mean over the first 100 rows of a row's mean loss. The interval is a bootstrap over rows. "
        "**Bits per byte** does not depend on the tokenizer.",
        f"Row by row, the answers' loss changed by {change['mean']:+.4f} nats per token on average (95 % interval "
        f"{change['ci95'][0]:+.4f} to {change['ci95'][1]:+.4f}); it fell in {change['improved']:.1%} of "
        f"{change['rows']:,} rows." if change else "",
        "![Perplexity before and after](perplexity_comparison.png)",
        "## Where the improvement comes from",
        table(["tokens", "number", "nats/token before", "nats/token after", "fall in nats", "share of the fall"], *origin),
        f"{share:.0%} of the fall in the held-out text's loss comes from the prompt, which is {counts[2] / counts[0]:.0%} of "
        f"its tokens: text that every training row repeats. The other {1 - share:.0%} is better prediction of the answers.",
        "## The five questions" if len(results["answers"]) == 5 else "## The questions",
        f"Asked in the prompt format of the training rows, sampled at temperature {settings['TEMPERATURE']:g} with seed "
        f"{settings['SEED']}, at most {settings['MAX_NEW_TOKENS']} tokens, before and after alike.",
    ]
    for answer in results["answers"]:
        one, two, reference = answer["before_stats"], answer["after_stats"], answer["reference"]
        rows = [[key.replace("_", " "), one[key], two[key]] for key in one if key != "finished"]
        rows.append(["ended by itself", *("yes" if stats["finished"] else "no" for stats in (one, two))])
        if reference:
            rows.append(["perplexity of the data's own article", reference["perplexity_before"], reference["perplexity_after"]])
        where = f"The data's own article is in the {reference['split']} split." if reference else "The data has no article on it."
        parts += [
            f"### {answer['topic']}",
            f"> {answer['question']}",
            side_by_side(answer["before"], answer["after"]),
            table(["", "before", "after"], *rows),
            where,
        ]
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")


def write_model_card(results, path):
    """Write the adapter's README.md: Hub metadata with the held-out results, and how to load it."""
    before, after = results["perplexity"]["before"], results["perplexity"]["after"]
    on_hub = results["model_revision"] is not None
    scores = [("answer", "Perplexity (answers only)"), ("full_text", "Perplexity (full text)")]
    scores += [("bits_per_byte", "Bits per byte (answers only)")]
    evaluations = [
        huggingface_hub.EvalResult(
            task_type="text-generation",
            dataset_type=results["dataset"],
            dataset_name=f"{results['dataset']}, held-out rows",
            dataset_split="test",
            metric_type="perplexity" if "perplexity" in label.lower() else key,
            metric_name=label,
            metric_value=round(after[key], 4),
        )
        for key, label in scores
        if after[key]
    ]
    metadata = huggingface_hub.ModelCardData(
        base_model=results["model"] if on_hub else None,
        datasets=[results["dataset"]] if results["dataset_revision"] else None,
        eval_results=evaluations,
        language="en",
        library_name="peft",
        license="mit" if results["model"] in ("gpt2", "openai-community/gpt2") or results["offline_fallback"] else "other",
        model_name=f"{short_name(results['model'])}-medical-lora",
        pipeline_tag="text-generation",
        tags=["lora", "sft", "trl"],
    )
    rows = [[label, before[key], after[key]] for key, label in scores]
    snippet = """import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "."  # this folder
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = PROMPT
inputs = tokenizer(prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.7, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:]).split("</s>")[0])
"""
    write_text(
        path,
        f"---\n{metadata.to_yaml()}\n---\n\n# LoRA adapter: {short_name(results['model'])} fine-tuned on {short_name(results['dataset'])}\n\n"
        "None of what it writes is medical advice. It is a small language model: it states falsehoods fluently.\n\n"
        + table(["held-out rows", "before", "after"], *rows)
        + f"\n\nTrained for {results['training']['steps']:,} steps with {', '.join(f'{k} = {v!r}' for k, v in results['settings'].items() if k.startswith('LORA') or k == 'LEARNING_RATE')}.\n\n"
        f"```python\n{snippet.replace('PROMPT', repr(format_prompt('What is Anthrax and explain in detail?')))}```\n",
    )


# ---------------------------------------------------------------- around it


def say(message, **kwargs):
    """One line on the screen, from the first process alone."""
    if process_rank()[0] == 0:
        tqdm.write(message, **kwargs)


def process_rank():
    """This process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_first(function):
    """What `function` returns on the first process, for every process."""
    rank, processes = process_rank()
    result = [function() if rank == 0 else None]
    if processes > 1:
        dist.broadcast_object_list(result)
    return result[0]


def last_line(error):
    """The last line of the innermost cause of an exception."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def looks_local(name):
    """Whether a model or data set name is a path rather than a Hub id such as `gpt2` or `owner/name`."""
    return Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)


def digest(path):
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path, text):
    """Write a file so that it appears whole or not at all."""
    part = Path(f"{path}.tmp")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def check_settings(cfg):
    """Raise InputError for the first constant that is out of range or of the wrong type."""
    whole = lambda low: lambda x: type(x) is int and low <= x < 2**32  # noqa: E731
    number = lambda test: lambda x: type(x) in (int, float) and test(x) and math.isfinite(x)  # noqa: E731
    name = lambda x: isinstance(x, str) and bool(x.strip())  # noqa: E731
    share = number(lambda x: 0 <= x < 1)
    rules = [
        ("MODEL_NAME DATASET_NAME OUTPUT_DIR REPORT_TO", name, "a name"),
        ("MODEL_REVISION DATASET_REVISION", lambda x: x is None or name(x), "None or a commit, tag or branch"),
        ("OFFLINE_FALLBACK TRAIN_ON_PROMPT DROP_EMPTY_ANSWERS SAVE_MERGED", lambda x: type(x) is bool, "True or False"),
        ("LORA_R BATCH_SIZE GRADIENT_ACCUMULATION_STEPS LOGGING_STEPS EVAL_STEPS MAX_NEW_TOKENS", whole(1), "a whole number from 1"),
        ("MAX_LENGTH", whole(2), "a whole number of tokens from 2"),
        ("SEED", whole(0), "a whole number from 0"),
        ("MAX_STEPS", lambda x: x == -1 or whole(1)(x), "-1 or a whole number from 1"),
        ("TEST_SIZE", number(lambda x: 0 < x < 1), "a share between 0 and 1, such as 0.1"),
        ("NUM_EPOCHS LEARNING_RATE LORA_ALPHA CHECKPOINT_MINUTES", number(lambda x: x > 0), "a number above 0"),
        ("MAX_GRAD_NORM TEMPERATURE", number(lambda x: x >= 0), "a number from 0"),
        ("LORA_DROPOUT WARMUP_RATIO", share, "a share from 0 to below 1"),
        ("BASE_DROPOUT", lambda x: x is None or share(x), "None or a share from 0 to below 1"),
        ("LORA_TARGET_MODULES", lambda x: x is None or name(x) or (isinstance(x, list) and x and all(map(name, x))),
         "None, a list of module names, or a name"),
        ("QUESTIONS", lambda x: isinstance(x, dict) and x and all(name(y) for y in (*x, *x.values())),
         "a dict {topic: question} with at least one question"),
    ]  # fmt: skip
    for names, test, wanted in rules:
        for constant in names.split():
            if not test(getattr(cfg, constant)):
                raise InputError(f"{constant} = {getattr(cfg, constant)!r}: it must be {wanted}; edit it at the top of the script")
    for tracker in set(cfg.REPORT_TO.split(",")) - {"none"}:
        if importlib.util.find_spec({"tensorboard": "tensorboard"}.get(tracker, tracker)) is None:
            raise InputError(f"REPORT_TO = {cfg.REPORT_TO!r}: {tracker} is not installed; pip install {tracker}, or use \"none\"")


def probe_hub(cfg):
    """Ask the Hub once for what isn't local: None where it is there, the reason where the Hub can't be reached.

    Raises InputError where the Hub says that it doesn't exist.
    """
    for constant, name, revision in (
        ("MODEL", cfg.MODEL_NAME, cfg.MODEL_REVISION),
        ("DATASET", cfg.DATASET_NAME, cfg.DATASET_REVISION),
    ):
        reason = None if looks_local(name) else ask_hub(constant, name, revision)
        if reason:
            return reason


def ask_hub(constant, name, revision):
    repo_type, errors = constant.lower(), huggingface_hub.errors
    try:
        huggingface_hub.HfApi().repo_info(name, revision=revision, repo_type=repo_type, timeout=5)
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{constant}_REVISION: {name} has no revision {revision!r}; None takes the newest") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise InputError(
            f"{constant}_NAME: the Hub has no {repo_type} {name!r} that you may read; check the name, or `hf auth login`"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(f"{constant}_NAME: the Hub refuses {name!r} ({status}); `hf auth login` first") from error
        return f"the Hub answered {status} for {name}"
    except (huggingface_hub.utils.httpx.RequestError, errors.OfflineModeIsEnabled, ValueError) as error:
        return f"{type(error).__name__}: {last_line(error)}"


def set_offline(offline):
    """Let no library contact the Hub, or let them again; they read these when called."""
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline
    os.environ["HF_HUB_OFFLINE"] = "1" if offline else "0"


def load_model(name, revision, *, dropout=None):
    """The model in fp32, from safetensors and without remote code; `dropout` replaces the base model's own."""
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    for key, value in config.to_dict().items():
        if isinstance(value, float) and dropout is not None and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, dropout)
        if value == "gelu_new":
            setattr(config, key, "gelu_pytorch_tanh")  # the same function as one kernel
    return AutoModelForCausalLM.from_pretrained(
        name, config=config, revision=revision, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )


def load_inputs(cfg, folder=Path()):
    """Model, tokenizer and splits; LookupError where one is on the Hub, and neither reachable nor in the cache."""
    model_name, offline = cfg.MODEL_NAME, huggingface_hub.constants.HF_HUB_OFFLINE
    revision = None if looks_local(model_name) else cfg.MODEL_REVISION
    if looks_local(folder / model_name):
        model_name = str(folder / model_name)
        if not Path(model_name, "config.json").is_file():
            raise InputError(f"MODEL_NAME: {model_name} is no model folder: it has no config.json")
        if not any(Path(model_name).glob("*.safetensors")):
            raise InputError(f"MODEL_NAME: {model_name} has no .safetensors weights; pickled ones are not loaded")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name, revision=revision, trust_remote_code=False)
        model = load_model(model_name, revision, dropout=cfg.BASE_DROPOUT)
    except (OSError, ValueError, KeyError) as error:
        if offline and not looks_local(model_name):
            raise LookupError(f"{model_name} is not in the cache") from error
        raise InputError(f"MODEL_NAME: {model_name} can't be loaded: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise InputError(f"MODEL_NAME: {model_name} needs a fast tokenizer with an end-of-sequence token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    source = str(folder / cfg.DATASET_NAME) if looks_local(folder / cfg.DATASET_NAME) else cfg.DATASET_NAME
    try:
        splits = load_splits(
            source, cfg.DATASET_REVISION, test_size=cfg.TEST_SIZE, seed=cfg.SEED, drop_empty=cfg.DROP_EMPTY_ANSWERS
        )
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        if offline and not looks_local(source):
            raise LookupError(f"{source} is not in the cache") from error
        raise InputError(f"DATASET_NAME: {source} can't be loaded: {last_line(error)}") from error
    return model, tokenizer, *splits


def quiet_libraries():
    """Keep off the screen what a user can do nothing about; warnings of the model, the data and torch stay."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|trl")


def dataset_revision(split):
    """The commit of a Hub data set, None for local files."""
    found = re.search(r"@([0-9a-f]{40})/", " ".join(split.info.download_checksums or {}))
    return found.group(1) if found else None


def merge_adapter(model, tokenizer, folder):
    """Write a plain fp32 model folder with the adapter merged in; its logits are checked against the adapter's."""
    ids = torch.arange(8, device=model.device)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        if not torch.allclose(merged(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3):
            raise RuntimeError("the merged model's logits differ from the adapter's")
    part = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    merged.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def title_of(text):
    """The term that a row explains, in lower case."""
    found = re.search(r"What is (.+?) and explain in detail", text)
    return found.group(1).casefold() if found else ""


def needs_checkpointing(model, batch_size, length):
    """Whether a training step's activations may fill the free memory, so that recomputing them is worth a third more time."""
    size = model.config.hidden_size * 34 + model.config.num_attention_heads * length * 5  # bytes per token and layer, bf16
    needed = batch_size * length * size * model.config.num_hidden_layers
    free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else psutil.virtual_memory().available
    return needed > 0.7 * free


def run_folder(cfg, model, train, test):
    """The run's folder, named after the model and everything that its figures depend on."""
    weights = getattr(model.config, "_commit_hash", None)
    if not weights:
        weights = [digest(file) for file in sorted(Path(model.name_or_path).glob("*.safetensors"))]
    identity = {name: getattr(cfg, name) for name in SETTINGS if name not in NO_MATTER} | {"processes": process_rank()[1]}
    identity |= {"model": weights, "train": train["text"][:], "test": test["text"][:]}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return Path(cfg.OUTPUT_DIR, f"{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(cfg.MODEL_NAME).name)}-{key}")


def lock_run(run):
    """Make the run's folder and keep other processes out of it, for as long as the lock that this returns lives."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run / "checkpoints" / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(f"another process is at work in {run}: wait for it; to use several, start them with torchrun") from error
    return lock


def choose_hardware():
    """(device, precision, name) for this machine; on a Linux CPU also the allocator's settings."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        if torch.cuda.device_count() > processes == 1:
            raise InputError(
                f"{torch.cuda.device_count()} GPUs and one process: start it with torchrun --nproc_per_node="
                f"{torch.cuda.device_count()} {Path(sys.argv[0]).name}, or choose one with CUDA_VISIBLE_DEVICES=0"
            )
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "cuda", precision, torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "mps", "fp32", "Apple GPU"
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        # over half of a training step's time is fresh pages for large tensors, unless freed memory is kept
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            ctypes.CDLL(None).mallopt(parameter, value)
    if processes > 1 and "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    cpu = torch.cpu.get_capabilities()
    has_bf16 = cpu.get("amx_bf16") or cpu.get("avx512_bf16")  # without these, bf16 is slower than fp32
    return "cpu", "bf16" if has_bf16 else "fp32", cpu.get("cpu_name") or platform.machine()


def command(function):
    """Run `function` as a program: what the user can mend ends with one line and its exit code, and without a traceback."""

    @functools.wraps(function)
    def program():
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        try:
            return function()
        except InputError as error:
            code, message = 2, f"error: {error}"
        except KeyboardInterrupt:
            code, message = 130, f"interrupted: the same command goes on from the last checkpoint in {OUTPUT_DIR}/"
        except Exception as error:
            if getattr(error, "errno", None) != errno.ENOSPC and shutil.disk_usage(OUTPUT_DIR).free > 2**20:
                raise
            code, message = 2, f"error: no space left in {OUTPUT_DIR}/; free some, and the same command goes on"
        finally:
            set_offline(offline)
        if os.environ.get("RANK", "0") == "0":
            print(message, file=sys.stderr, flush=True)
        raise SystemExit(code)

    return program


@command
def main():
    """Run the whole story; returns the folder of the run."""
    # settings, hardware and the output folder: everything that can be checked before anything takes time
    cfg = SimpleNamespace(**{name: globals()[name] for name in SETTINGS})
    check_settings(cfg)
    device, precision, hardware_name = choose_hardware()
    if "WORLD_SIZE" in os.environ:
        PartialState(cpu=device == "cpu")
    quiet_libraries()
    say(f"{cfg.MODEL_NAME} on {cfg.DATASET_NAME}: {hardware_name}, {device}, {precision}, {process_rank()[1]} process(es)")

    # model, tokenizer and data: a folder, the Hub, its cache, or else the offline default
    reason = on_first(lambda: probe_hub(cfg))
    set_offline(reason is not None)
    try:
        model, tokenizer, train, test, counts = load_inputs(cfg)
        here = Path()
    except LookupError as error:
        if not cfg.OFFLINE_FALLBACK:
            raise InputError(f"the Hub can't be reached ({reason}) and {error.args[0]}; get online, or use local files") from error
        vars(cfg).update(OFFLINE_SETTINGS)
        changed = ", ".join(f"{name} = {value!r}" for name, value in OFFLINE_SETTINGS.items() if "_N" not in name)
        box = [
            "OFFLINE DEFAULT: not the model and data that the constants name",
            f"The Hub can't be reached ({reason}),",
            f"and {error.args[0]}. Instead, the same pipeline now runs on what ships with the script:",
            f"{cfg.MODEL_NAME}, a tiny GPT-2, and {cfg.DATASET_NAME}, a small data set.",
            f"Their own settings: {changed}",
        ]
        say("\n".join(["", "=" * 110, *(f"  {line}" for line in box), "=" * 110, ""]))
        here = HERE
        model, tokenizer, train, test, counts = load_inputs(cfg, here)
    set_offline(True)  # from here on nothing is fetched or sent
    model.to(device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    say(
        f"data: {counts['rows']:,} rows, dropped {counts['dropped_empty']:,} without an answer, {counts['dropped_duplicate']:,} "
        f"duplicates, {counts['dropped_malformed']:,} malformed; {counts['train_rows']:,} to train on, {counts['test_rows']:,} held out"
    )

    # what only the model can tell about the settings
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    prompts = [format_prompt(question) for question in cfg.QUESTIONS.values()]
    longest = max(map(len, tokenizer(prompts)["input_ids"]))
    if cfg.MAX_LENGTH > context or longest + cfg.MAX_NEW_TOKENS > context:
        raise InputError(
            f"MAX_LENGTH = {cfg.MAX_LENGTH} and a prompt of {longest} + MAX_NEW_TOKENS = {cfg.MAX_NEW_TOKENS} tokens must both fit "
            f"the context of {cfg.MODEL_NAME}, {context} tokens"
        )
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.LORA_R,
        lora_alpha=cfg.LORA_ALPHA,
        lora_dropout=cfg.LORA_DROPOUT,
        target_modules=cfg.LORA_TARGET_MODULES,
        fan_in_fan_out=model.config.model_type == "gpt2",  # its Conv1D keeps weights transposed
        revision=getattr(model.config, "_commit_hash", None),
    )
    try:
        with torch.device("meta"):
            shell = get_peft_model(AutoModelForCausalLM.from_config(model.config), copy.deepcopy(lora))
    except ValueError as error:
        raise InputError(f"LORA_TARGET_MODULES = {cfg.LORA_TARGET_MODULES!r}: {str(error).splitlines()[0]}") from error
    if isinstance(shell.get_output_embeddings(), BaseTunerLayer):
        raise InputError(f"LORA_TARGET_MODULES = {cfg.LORA_TARGET_MODULES!r}: the LM head can't be among them")
    trainable, total = shell.get_nb_trainable_parameters()

    # the run's folder; a run that was interrupted goes on in it
    run = run_folder(cfg, model, train, test)
    lock = lock_run(run) if process_rank()[0] == 0 else None
    checkpoints, adapter, results_file = run / "checkpoints", run / "adapter", run / "results.json"
    wanted = [results_file, run / "report.md", run / "training_loss.png", run / "perplexity_comparison.png", adapter / "README.md"]
    wanted += [run / "merged"] if cfg.SAVE_MERGED else []
    if on_first(lambda: all(path.exists() for path in wanted)):
        say(f"this run is finished: {run}/report.md; to repeat it, change a setting or move the folder away")
        return run

    # baseline: the base model, before any trainer exists
    questions, texts = list(cfg.QUESTIONS.values()), test["text"][:]
    articles = {title_of(text): (split, text) for split, rows in (("train", train), ("test", test)) for text in rows["text"]}
    articles = {topic: articles.get(topic.casefold()) for topic in cfg.QUESTIONS}

    def measure(model, name):
        """Score and ask a model, before and after alike; the result is kept in checkpoints/<name>.json."""
        if not on_first((checkpoints / f"{name}.json").exists):
            began = time.monotonic()
            rows = score_rows(model, tokenizer, texts, max_length=cfg.MAX_LENGTH, dtype=dtype, progress=f"  scoring {name}")
            known = [article[1] for article in articles.values() if article]
            own = score_rows(model, tokenizer, known, max_length=cfg.MAX_LENGTH, dtype=dtype).tolist() if known else []
            answers = on_first(
                lambda: generate_answers(
                    model, tokenizer, questions, max_new_tokens=cfg.MAX_NEW_TOKENS, temperature=cfg.TEMPERATURE,
                    seed=cfg.SEED, with_finished=True,
                )
            )  # fmt: skip
            measured = {"rows": rows.tolist(), "articles": own, "answers": answers}
            on_first(lambda: write_json(checkpoints / f"{name}.json", measured))
            say(f"{name}: scored {len(texts):,} rows and answered {len(questions)} questions in {time.monotonic() - began:.1f} s")
        return on_first(lambda: json.loads((checkpoints / f"{name}.json").read_text(encoding="utf-8")))

    before = measure(model, "before")
    loss_columns = [0, 1] if cfg.TRAIN_ON_PROMPT else [2, 3]  # of score_rows: what the training loss sees

    def mean_nll(rows):
        nll, tokens = np.asarray(rows)[:, loss_columns].sum(0)
        return float(nll / tokens)

    # LoRA fine-tuning
    if not on_first(adapter.exists):
        eos = tokenizer.eos_token
        encoded = encode(tokenizer, [text.removesuffix(eos) for text in train["text"]], cfg.MAX_LENGTH, end=eos)
        tokens = datasets.Dataset.from_list(
            [{"input_ids": ids, "labels": ids if cfg.TRAIN_ON_PROMPT else [-100] * first + ids[first:]} for ids, first, _ in encoded]
        )
        sft_config = SFTConfig(
            output_dir=str(checkpoints),
            seed=cfg.SEED,
            data_seed=cfg.SEED,
            num_train_epochs=cfg.NUM_EPOCHS,
            max_steps=cfg.MAX_STEPS,
            learning_rate=cfg.LEARNING_RATE,
            lr_scheduler_type="linear",
            warmup_steps=cfg.WARMUP_RATIO,  # below 1: a share of all steps
            per_device_train_batch_size=cfg.BATCH_SIZE,
            gradient_accumulation_steps=cfg.GRADIENT_ACCUMULATION_STEPS,
            max_grad_norm=cfg.MAX_GRAD_NORM,
            max_length=cfg.MAX_LENGTH,
            logging_steps=cfg.LOGGING_STEPS,
            eval_strategy="steps",
            eval_steps=cfg.EVAL_STEPS,
            save_strategy="steps",
            save_steps=cfg.EVAL_STEPS,
            save_total_limit=2,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=device == "cpu",
            gradient_checkpointing=needs_checkpointing(model, cfg.BATCH_SIZE, cfg.MAX_LENGTH),
            dataloader_pin_memory=device == "cuda",
            ddp_find_unused_parameters=False,
            include_num_input_tokens_seen="non_padding",
            logging_nan_inf_filter=False,
            report_to=cfg.REPORT_TO,
        )
        trainer = LoRATrainer(
            model=model,
            args=sft_config,
            train_dataset=tokens,
            eval_dataset=tokens.select([0]),  # a placeholder: `validate` scores the held-out texts
            processing_class=tokenizer,
            peft_config=lora,
            validate=lambda model: mean_nll(score_rows(model, tokenizer, texts, max_length=cfg.MAX_LENGTH, dtype=dtype)),
        )
        checkpoint = on_first(lambda: newest_checkpoint(checkpoints))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if process_rank()[0] == 0:
            write_json(
                checkpoints / "training.json",
                {
                    "steps": trainer.state.global_step,
                    "tokens": trainer.state.num_input_tokens_seen,
                    "seconds": trainer.clock.seconds,
                    "log_history": trainer.state.log_history,
                    "truncated_train_rows": sum(ids[-1] != tokenizer.eos_token_id for ids, _, _ in encoded),
                },
            )
            part = run / "adapter.tmp"
            shutil.rmtree(part, ignore_errors=True)
            trainer.model.save_pretrained(part, save_embedding_layers=False)
            tokenizer.save_pretrained(part)
            part.rename(adapter)
        on_first(lambda: None)
        del trainer
    del model

    # the same two measurements of the adapter as it was saved
    model_path = str(here / cfg.MODEL_NAME) if looks_local(here / cfg.MODEL_NAME) else cfg.MODEL_NAME
    revision = None if looks_local(model_path) else cfg.MODEL_REVISION
    model = PeftModel.from_pretrained(load_model(model_path, revision), str(adapter)).to(device)
    after = measure(model, "after")

    # results, plots, report, model card
    if process_rank()[0] > 0:
        return run
    training = json.loads((checkpoints / "training.json").read_text())
    history = [{key: x for key, x in entry.items() if key not in ("seconds", "num_input_tokens_seen")} for entry in training["log_history"]]
    history.insert(0, {"step": 0, "epoch": 0.0, "eval_loss": mean_nll(before["rows"])})
    history.append({"step": training["steps"], "epoch": history[-1]["epoch"], "eval_loss": mean_nll(after["rows"])})
    answers = []
    known = [topic for topic, article in articles.items() if article]
    for topic, prompt, (text_before, ended_before), (text_after, ended_after) in zip(
        cfg.QUESTIONS, prompts, before["answers"], after["answers"], strict=True
    ):
        own = None
        if topic in known:
            perplexity = [math.exp(scores["articles"][known.index(topic)][2] / scores["articles"][known.index(topic)][3]) for scores in (before, after)]
            own = {"split": articles[topic][0], "perplexity_before": perplexity[0], "perplexity_after": perplexity[1]}
        answers.append(
            {
                "topic": topic,
                "question": cfg.QUESTIONS[topic],
                "prompt": prompt,
                "before": text_before,
                "after": text_after,
                "before_stats": answer_stats(text_before, finished=ended_before),
                "after_stats": answer_stats(text_after, finished=ended_after),
                "reference": own,
            }
        )
    rows_before, rows_after = np.array(before["rows"]), np.array(after["rows"])
    results = {
        "model": cfg.MODEL_NAME,
        "model_revision": getattr(model.config, "_commit_hash", None),
        "dataset": cfg.DATASET_NAME,
        "dataset_revision": dataset_revision(train),
        "offline_fallback": here is HERE,
        "settings": {name: getattr(cfg, name) for name in SETTINGS},
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "hardware": {
            "name": hardware_name,
            "device": device,
            "precision": precision,
            "processes": process_rank()[1],
            "threads": torch.get_num_threads(),
        },
        "data": counts | {"truncated_train_rows": training["truncated_train_rows"]},
        "perplexity": {
            "before": summarize_scores(rows_before),
            "after": summarize_scores(rows_after),
            "change": paired_change(rows_before, rows_after),
        },
        "training": {
            "steps": training["steps"],
            "tokens": training["tokens"],
            "seconds": training["seconds"],
            "tokens_per_second": training["tokens"] / training["seconds"],
            "trainable_parameters": trainable,
            "total_parameters": total,
            "log_history": history,
        },
        "answers": answers,
    }
    if not results_file.exists():
        write_json(results_file, results)
    results = json.loads(results_file.read_text(encoding="utf-8"))
    title = f"{short_name(results['model'])} on {short_name(results['dataset'])}"
    plot_training_loss(history, run / "training_loss.png", title=f"LoRA fine-tuning of {title}")
    perplexity = results["perplexity"]
    plot_perplexity(perplexity["before"], perplexity["after"], run / "perplexity_comparison.png", title=f"Held-out perplexity: {title}")
    write_model_card(results, adapter / "README.md")
    write_report(results, run / "report.md")
    if cfg.SAVE_MERGED and not (run / "merged").exists():
        merge_adapter(model, tokenizer, run / "merged")

    say(f"{'held-out perplexity':24}{'before':>10}{'after':>10}{'change':>10}")
    for label, key in (("answers only", "answer"), ("full text", "full_text"), ("reference protocol", "seed_protocol")):
        old, new = perplexity["before"][key], perplexity["after"][key]
        say(f"{label:24}{old:10.2f}{new:10.2f}{new / old - 1:+10.1%}")
    for path in wanted:
        say(f"wrote {path.parent if path.parent == adapter else path}")
    if lock:
        lock.release()
    return run


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Slurm and spot machines say it so
    main()
