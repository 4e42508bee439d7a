"""Fine-tune GPT-2 on medical text with LoRA, and measure honestly what that changed.

    python finetune_medical_gpt2.py                         # settings: the constants below; there are no flags
    torchrun --nproc_per_node=N finetune_medical_gpt2.py    # several processes: the same, data parallel

In order: the base model's perplexity on held-out text and its answers to five questions; LoRA fine-tuning with TRL's
SFTTrainer; the same two measurements, by the same functions, of the adapter as it was saved; plots and a report. Writes
OUTPUT_DIR/<run>/ with results.json, report.md, two plots and adapter/. Killed at any moment, the same command goes on
where it was. Where the Hub can't be reached, the same pipeline runs on a tiny model and data from tests/, and says so.

Measured on 2 cores of an AMD EPYC with avx512_bf16, torch 2.13, by tests/benchmark.py: GPT-2 124M (random weights)
trains at 8.2 times the tokens/s of the reference's recipe, in 2.3 GiB instead of 7.7. Without a network this command
takes the tiny model's answer perplexity from 46.34 to 23.69, in about two minutes.

None of what the models write is medical advice.
"""

import contextlib
import copy
import ctypes
import errno
import functools
import gc
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if __name__ == "__main__":  # the imports below take seconds, and would answer Ctrl-C with a traceback
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: (sys.stderr.write("interrupted: nothing was done yet\n"), os._exit(130)))

import datasets
import filelock
import huggingface_hub
import matplotlib.pyplot as plt
import numpy as np
import pandas
import psutil
import pyarrow.parquet
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import errors as hub_errors
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.pytorch_utils import Conv1D
from trl import SFTConfig, SFTTrainer

# model and data
MODEL_NAME = "gpt2"  # any causal LM: Hub id or local folder (safetensors)
MODEL_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"  # openai-community/gpt2; None for a local folder
DATASET_NAME = "aboonaji/wiki_medical_terms_llam2_format"  # Hub id, or a local .jsonl, .json, .csv, .parquet (also .gz)
DATASET_REVISION = None  # None: the newest; results.json says which that was
TEST_SIZE = 0.1  # share of the rows that is held out
MAX_LENGTH = 512  # tokens; longer rows are cut
SEED = 42
DROP_EMPTY_ANSWERS = True  # False: keep rows without an article, as the reference did
OFFLINE_FALLBACK = True  # Hub unreachable and nothing cached: True: run on the model and data in tests/; False: stop

# LoRA
LORA_R = 8
LORA_ALPHA = 32
LORA_DROPOUT = 0.1
LORA_TARGET_MODULES = None  # None: PEFT's default for the architecture (GPT-2: c_attn); or a list, or "all-linear"

# training
NUM_EPOCHS = 1
MAX_STEPS = -1  # optimizer steps; -1: NUM_EPOCHS decides
LEARNING_RATE = 1e-4  # the reference's; README has what higher ones do
BATCH_SIZE = 4  # rows per process and forward pass
GRADIENT_ACCUMULATION_STEPS = 4  # a step sees BATCH_SIZE x this x processes rows
WARMUP_RATIO = 0.03
MAX_GRAD_NORM = 0.3
LOGGING_STEPS = 10
EVAL_STEPS = 100  # validation and checkpoint; a checkpoint also every CHECKPOINT_MINUTES
TRAIN_ON_PROMPT = True  # False: the loss sees the answers only
BASE_DROPOUT = 0.0  # the base model's own dropouts in training; None: as its config says (GPT-2: 0.1, and slower)

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
OFFLINE_SETTINGS = {  # what the offline default sets apart; all else is as above
    "MODEL_NAME": "tests/tiny_gpt2",
    "MODEL_REVISION": None,
    "DATASET_NAME": "tests/medical_terms.jsonl",
    "DATASET_REVISION": None,
    "NUM_EPOCHS": 8,
    "LEARNING_RATE": 2e-3,
    "EVAL_STEPS": 40,
}
TRACKERS = ("none", "tensorboard", "trackio", "wandb")
CHECKPOINT_MINUTES = 2
CHUNK = 1024  # positions whose logits are in memory at a time
ATTENTION_BLOCK = 256  # queries that `causal_attention` takes at a time
SHAPE_STEP = 64  # lengths are padded to multiples: each new shape leaves a compiled kernel for good, on a CPU
ANSWER_MARK, END_MARK = "[/INST]", "</s>"  # an answer starts after the one and ends before the other
PROMPT = (
    "<s> [INST] <<SYS>> You are a helpful, respectful, and honest assistant. Always answer as helpfully as possible, "
    "while being safe. Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
    "illegal content. Please ensure that your responses are socially unbiased and positive in nature. If a question "
    "does not make any sense or is not factually coherent, explain why instead of answering something not correct. If "
    "you don't know the answer to a question, please don't share false information. <</SYS>> {question} [/INST]"
)


class InputError(ValueError):
    """Something that the user can mend; ends the program with one line and exit code 2."""


class HubUnreachable(Exception):
    """The Hub can't be reached, and its cache does not hold what was asked for."""


# -------------------------------------------------------------------------------------------------------- small helpers


def on_first(function):
    """What `function` returns on the first process, for every process."""
    return broadcast_object_list([function() if PartialState().is_main_process else None])[0]


def say(message):
    """A line on the screen, from the first process alone."""
    if PartialState().is_main_process:
        print(message, flush=True)


def last_line(error):
    """The last line of what an exception says, of its innermost cause."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def digest(path):
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path):
    """Have a written file on the disk, and not only on its way there: a power cut may follow."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def write_text(path, text):
    """Write a file that appears whole or not at all."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    sync(f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def save_folder(folder, *savers):
    """Let `savers` write a folder that appears whole or not at all."""
    part = Path(f"{folder}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    for save in savers:
        save(part)
    for path in filter(Path.is_file, part.rglob("*")):
        sync(path)
    part.rename(folder)


# --------------------------------------------------------------------------------------------------
# Model and data: from this disk, from the Hub, or from the Hub's cache

DATA_FILE = re.compile(r"\.(jsonl|json|csv|parquet)(\.gz)?$")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # `gpt2`, or `owner/name`
CONTENT_FREE = {"model": (".json", ".txt", ".model"), "dataset": (".md", "")}  # endings


def is_local(kind, name):
    """Whether a model's or a data set's name is a path on this disk rather than a Hub id.

    A folder that only happens to be called like a Hub id doesn't count: `gpt2` without a model in it.
    """
    path = Path(name).expanduser()
    if not HUB_ID.fullmatch(name):
        return True
    if kind == "dataset":
        return path.is_file() or DATA_FILE.search(name) is not None
    return (path / "config.json").is_file() or ("/" in name and path.is_dir())


def short_name(name):
    """The last part of a Hub id or a path, without a data file's ending."""
    return DATA_FILE.sub("", Path(name).name)


def ask_hub(kind, name, revision):
    """Ask the Hub once for a repository: None if it has it, the reason if it can't be reached.

    Raises InputError where it says that there is no such thing. A download would not do to find out:
    it retries for long when the Hub doesn't answer.
    """
    constant = kind.upper()
    try:
        huggingface_hub.HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=5)
    except hub_errors.RevisionNotFoundError as error:
        raise InputError(f"{constant}_REVISION: {name} has no {revision!r}; None takes the newest") from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise InputError(f"{constant}_NAME: the Hub has no {name!r} that you may read; `hf auth login`?") from error
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(f"{constant}_NAME: the Hub refuses {name!r} ({status}); `hf auth login`") from error
        return f"it answered {status}"
    except (huggingface_hub.utils.httpx.RequestError, hub_errors.OfflineModeIsEnabled) as error:
        return f"{type(error).__name__}: {last_line(error)}"
    except ValueError as error:  # the answer is no JSON: a hotel's login page, say
        return f"{type(error).__name__}: {last_line(error)}"
    return None


def fetch(kind, name, revision=None):
    """Where a model or a data set is on this disk, and its commit -> (Path, commit or None if local).

    `kind` is "model" or "dataset". What is not local is downloaded, or taken from the cache if the
    Hub can't be reached. Raises InputError where the Hub has no such thing, HubUnreachable where it
    does not answer and the cache lacks it.
    """
    if is_local(kind, name):
        return Path(name).expanduser(), None
    unreachable = ask_hub(kind, name, revision)

    # A model's repository often holds the same weights in several formats: one is enough.
    patterns = {}
    if kind == "model":
        patterns["allow_patterns"] = ["*.json", "*.safetensors", "*.txt", "*.model"]
        patterns["ignore_patterns"] = ["*/*", "consolidated*"]
    try:
        snapshot = huggingface_hub.snapshot_download(
            name,
            repo_type=kind,
            revision=revision,
            local_files_only=unreachable is not None,
            **patterns,
        )
        files = [path for path in Path(snapshot).rglob("*") if path.is_file()]
    except (hub_errors.LocalEntryNotFoundError, huggingface_hub.utils.httpx.RequestError) as error:
        unreachable = unreachable or last_line(error)
        files = []

    # Other programs fill the same cache, too, some with no more than a model's config.json.
    contents = [path for path in files if path.suffix not in CONTENT_FREE[kind]]
    if unreachable and not contents:
        raise HubUnreachable(f"the Hub can't be reached ({unreachable}) and {name} is not in the cache")
    return Path(snapshot), Path(snapshot).name


def check_model_folder(folder):
    """Raise InputError for a folder that holds no plain model."""
    if not (folder / "config.json").is_file():
        raise InputError(f"MODEL_NAME: {folder} is no model folder: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"MODEL_NAME: {folder} has no .safetensors weights, and pickled ones aren't loaded")
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"MODEL_NAME: {folder} also holds an adapter, which would be loaded with the model: "
            "move adapter_config.json away, or merge the adapter first"
        )


def load_tokenizer(folder):
    """The tokenizer in a model's folder, with a padding token. Raises InputError if it won't do."""
    check_model_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"MODEL_NAME: the tokenizer in {folder} can't be loaded: {last_line(error)}") from error
    if not tokenizer.is_fast or tokenizer.eos_token is None or not tokenizer(PROMPT)["input_ids"]:
        raise InputError(f"MODEL_NAME: {folder} needs a fast tokenizer (tokenizer.json) and an end-of-sequence token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def not_json(line, error):
    return InputError(f"line {line}: not JSON ({error.msg}); mend or remove it")


def parse_json(text):
    """The values in a text of JSON lines, or of one JSON value that spans several lines."""
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:
            if values:
                raise not_json(number, error) from error
            break  # not even the first line is a value by itself
    if values or not text.strip():
        return values
    try:
        return [json.loads(text)]
    except json.JSONDecodeError as error:
        raise not_json(error.lineno, error) from error


def read_json(content):
    """(columns, texts) of JSON lines, of one array of rows, or of one object of columns, as bytes."""
    rows = parse_json(content.decode(json.detect_encoding(content)))
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    if len(rows) == 1 and isinstance(rows[0], dict):
        texts = rows[0].get("text")
        if isinstance(texts, dict):  # as pandas' DataFrame.to_json writes a table
            texts = list(texts.values())
        if isinstance(texts, list):
            return list(rows[0]), texts
    rows = [row if isinstance(row, dict) else {} for row in rows]
    columns = sorted({column for row in rows for column in row})
    return columns, [row.get("text") for row in rows]


def read_csv(content):
    """(columns, texts) of a CSV file's bytes; the other columns are not even looked at."""
    columns = pandas.read_csv(io.BytesIO(content), nrows=0, encoding="utf-8-sig").columns.tolist()
    if "text" not in columns:
        return columns, []
    table = pandas.read_csv(
        io.BytesIO(content),
        usecols=["text"],
        dtype=str,
        keep_default_na=False,
        encoding="utf-8-sig",
    )
    return columns, table["text"].tolist()


def read_parquet(content):
    """(columns, texts) of a Parquet file's bytes."""
    columns = pyarrow.parquet.read_schema(io.BytesIO(content)).names
    if "text" not in columns:
        return columns, []
    table = pyarrow.parquet.read_table(io.BytesIO(content), columns=["text"])
    return columns, table["text"].to_pylist()


READERS = {".jsonl": read_json, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def read_texts(path):
    """The `text` column of a data file (see READERS, also .gz) or of a data set's folder, uncleaned.

    A file is read by its content alone: not through a cache whose key is its path and time, and not
    as a glob pattern, which is how `datasets` would take it. Raises InputError.
    """
    kind = Path(path.name.removesuffix(".gz")).suffix
    if not path.is_dir() and kind not in READERS:
        raise InputError(f"DATASET_NAME: {path} is no .jsonl, .json, .csv or .parquet file")
    if not path.exists():
        raise InputError(f"DATASET_NAME: {path} is no file")
    if path.is_file() and not path.stat().st_size:
        raise InputError(f"DATASET_NAME: {path} is empty")
    try:
        if path.is_dir():
            data = datasets.load_dataset(str(path), split="train")
            columns = data.column_names
            texts = data["text"][:] if "text" in columns else []
        else:
            content = path.read_bytes()
            if path.suffix == ".gz":
                content = gzip.decompress(content)
            columns, texts = READERS[kind](content)
    except InputError as error:
        raise InputError(f"DATASET_NAME: {path}, {error}") from error
    except Exception as error:
        what = kind.removeprefix(".") or "a data set"
        raise InputError(f"DATASET_NAME: {path} can't be read as {what}: {last_line(error)}") from error
    if "text" not in columns:
        found = ", ".join(columns) or "no rows"
        raise InputError(f"DATASET_NAME: {path} has no column `text`, only {found}")
    return texts


def format_prompt(question):
    """The prompt of every row, up to where the answer begins: in training, scoring and asking."""
    return PROMPT.replace("{question}", question)


def is_sound(text):
    """Whether a row is a text that tokenizers can take, with one question and one answer."""
    if not isinstance(text, str) or text.count(ANSWER_MARK) != 1:
        return False
    return not re.search("[\ud800-\udfff]", text)  # halves of characters, which JSON can hold


def load_splits(source, revision=None, *, test_size, seed, drop_empty=True):
    """Read, clean, shuffle and split a data set -> (train, test, stats).

    `source` is a Hub id or a local .jsonl, .json, .csv or .parquet file (also .gz) with a column
    `text`; train and test are datasets with that column; stats are the counts of rows. Duplicates
    go before the split, so that no row is on both sides. Raises InputError where too little is left.
    """
    path, _ = fetch("dataset", str(source), revision)
    texts = read_texts(path)
    sound = [text for text in texts if is_sound(text)]
    unique = list(dict.fromkeys(sound))
    rows = unique
    if drop_empty:
        rows = [x for x in unique if x.split(ANSWER_MARK)[1].replace(END_MARK, "").strip()]
    malformed = len(texts) - len(sound)
    duplicate = len(sound) - len(unique)
    empty = len(unique) - len(rows)

    if not 1 <= math.ceil(len(rows) * test_size) < len(rows):
        raise InputError(
            f"DATASET_NAME: {source} has too few rows to split at TEST_SIZE = {test_size}: "
            f"{len(rows):,} of {len(texts):,}; {malformed:,} are no text with one {ANSWER_MARK}, "
            f"{duplicate:,} duplicates, {empty:,} have no answer"
        )
    data = datasets.Dataset.from_dict({"text": rows})
    train, test = data.train_test_split(test_size=test_size, seed=seed).values()
    stats = {
        "rows": len(texts),
        "train_rows": len(train),
        "test_rows": len(test),
        "dropped_empty": empty,
        "dropped_duplicate": duplicate,
        "dropped_malformed": malformed,
    }
    return train, test, stats


class Row(NamedTuple):
    """A text as a model sees it."""

    ids: list  # of the tokens
    first: int  # index of the answer's first token; len(ids) if there is none
    answer_bytes: int  # UTF-8 length of the part of the answer that the ids cover


def leading_bos(tokenizer):
    """[BOS] where the tokenizer puts that in front of every text, as Llama's do; else []."""
    return [id for id in tokenizer("a")["input_ids"][:1] if id == tokenizer.bos_token_id]


def encode(tokenizer, texts, max_length, end=False):
    """Texts as Rows of at most `max_length` tokens; with `end`, EOS follows a text that isn't cut.

    The sequence is built here, and nothing that a tokenizer adds, cuts or pads by itself takes part:
    a BOS that the model expects comes first, once; what is too long is cut at its end.
    """
    if not texts:
        return []
    bos = leading_bos(tokenizer)
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    rows = []
    for text, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True):
        if ids[:1] != bos:
            ids = bos + ids
            offsets = [(0, 0)] * len(bos) + offsets
        if end and ids[-1:] != [tokenizer.eos_token_id]:
            ids = ids + [tokenizer.eos_token_id]
        ids, offsets = ids[:max_length], offsets[:max_length]

        # the answer's first token is the first that starts at or after the end of [/INST]
        mark = text.find(ANSWER_MARK)
        begin = mark + len(ANSWER_MARK) if mark >= 0 else len(text)
        starts = (i for i, (start, stop) in enumerate(offsets) if begin <= start < stop)
        covered = max((stop for _, stop in offsets), default=0)
        rows.append(Row(ids, next(starts, len(ids)), len(text[begin:covered].encode())))
    return rows


# ---------------------------------------------------------------------------------------------------------- scoring


class ChunkedNLL(torch.autograd.Function):
    """Cross-entropy under a frozen LM head: hidden (n, d), weight (d, vocabulary), labels (n,) -> NLL (n,), fp32.

    CHUNK positions at a time, taking the gradient for `hidden` along: the logits of a whole batch, by far the largest
    tensor in the training step of a small language model, never exist. On a CPU the softmax takes as few positions at a
    time as keep all threads busy, for their fp32 logits to stay in the processor's cache.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        n, spare = len(hidden), -len(hidden) % SHAPE_STEP
        hidden, labels = torch.nn.functional.pad(hidden, (0, 0, 0, spare)), torch.nn.functional.pad(labels, (0, spare))
        nll = torch.empty(len(hidden), device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        few = 4 * torch.get_num_threads() if hidden.device.type == "cpu" else CHUNK
        for start in range(0, len(hidden), CHUNK):
            logits = hidden[start : start + CHUNK] @ weight
            for i, part in enumerate(logits.split(few)):
                at = slice(start + i * few, start + i * few + len(part))
                log_probs = part.float().log_softmax(-1)
                nll[at] = -log_probs.gather(1, labels[at, None])[:, 0]
                if grad is not None:
                    probs = log_probs.exp_()
                    part.copy_(probs.scatter_add_(1, labels[at, None], probs.new_full((len(part), 1), -1.0)))
            if grad is not None:
                grad[start : start + CHUNK] = logits @ weight.T
        ctx.save_for_backward(None if grad is None else grad[:n])
        return nll[:n]

    @staticmethod
    def backward(ctx, grad_nll):
        return ctx.saved_tensors[0] * grad_nll[:, None].to(ctx.saved_tensors[0].dtype), None, None


def head_weight(base, dtype):
    """The LM head (d, vocabulary) for ChunkedNLL, or None where logits are more than hidden states times a matrix.

    In 16 bits it is centred over the vocabulary. That adds one number to all logits of a position, which no probability
    notices; but GPT-2's logits lie near -100, where bfloat16 has steps of a half.
    """
    ids, weight = torch.arange(8, device=base.device)[None], base.get_output_embeddings().weight.detach()
    with torch.no_grad():
        logits = type(base).forward(base, input_ids=ids).logits
        plain = base.base_model(input_ids=ids).last_hidden_state @ weight.T
    if logits.shape != plain.shape or not torch.allclose(logits.float(), plain.float(), rtol=1e-2, atol=1e-2):
        return None
    return weight.T if dtype == torch.float32 else (weight - weight.mean(0)).T.to(dtype).contiguous()


def matrix_layers(base):
    """The layers that multiply by a weight matrix."""
    return [module for module in base.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]


def hold_weights(base, dtype, head=None):
    """Hold the frozen weights in `dtype`, which autocast would round anew in every forward pass.

    `head`, from `head_weight`, replaces the LM head's weight; without it the LM head stays in fp32. Returns
    {module: weight}, to put them back.
    """
    if dtype == torch.float32:
        return {}
    kept = {module: module.weight for module in matrix_layers(base) if not module.weight.requires_grad}
    if head is None:
        kept.pop(base.get_output_embeddings(), None)
    for module, weight in kept.items():
        held = head.T if module is base.get_output_embeddings() else weight.detach().to(dtype)
        held = held.T.contiguous().T if isinstance(module, Conv1D) else held  # in memory as (out, in), as Linear's are
        module.weight = torch.nn.Parameter(held, requires_grad=False)
    return kept


def causal_attention(module, query, key, value, attention_mask, *, scaling, dropout=0.0, **unused):
    """Attention of query (b, h, n, d) over key and value (b, h or fewer, m, d), of which the last n are its own.

    Rows are padded on the right, if at all. By matrix products over blocks of queries, which see no key after their
    last: more than twice as fast, forward and back, as torch's fused kernel on a CPU without AMX.
    """
    (b, h, n, d), m = query.shape, key.shape[2]
    key, value = (x.repeat_interleave(h // x.shape[1], 1).flatten(0, 1) for x in (key, value))
    future = torch.full((min(n, ATTENTION_BLOCK),) * 2, -math.inf, dtype=query.dtype, device=query.device).triu(1)
    blocks = []
    for block, part in enumerate(query.flatten(0, 1).split(ATTENTION_BLOCK, 1)):
        width = part.shape[1]
        seen = m - n + block * ATTENTION_BLOCK + width
        mask = torch.nn.functional.pad(future[:width, :width], (seen - width, 0))
        scores = torch.baddbmm(mask, part, key[:, :seen].mT, alpha=scaling)
        blocks.append(torch.nn.functional.dropout(scores.softmax(-1), dropout) @ value[:, :seen])
    return torch.cat(blocks, 1).view(b, h, n, d).transpose(1, 2), None


def use_causal_attention(base):
    """Switch a model to `causal_attention` where that is faster, and where attention is plain causal softmax."""
    slow_kernel = base.device.type == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16")
    if slow_kernel and base.config._attn_implementation == "sdpa" and base.config.model_type in ("gpt2", "llama"):
        transformers.AttentionInterface.register("causal", causal_attention)
        base.set_attn_implementation("causal")


@contextlib.contextmanager
def inference(model, dtype):
    """Within: the model in evaluation mode, without gradients, under autocast to `dtype` -> (base model, LM head)."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    was_training, attention = model.training, base.config._attn_implementation
    model.eval()
    with torch.no_grad(), torch.autocast(base.device.type, dtype=dtype, enabled=dtype != torch.float32):
        head = head_weight(base, dtype)
        kept = hold_weights(base, dtype, head)
        try:
            yield base, head
        finally:
            for module, weight in kept.items():
                module.weight = weight
            base.set_attn_implementation(attention)
            model.train(was_training)


def label_nll(base, head, input_ids, labels, past=None, **unused):
    """NLL in nats of every label but the -100s, flat: the forward pass of scoring and of training.

    No padding mask: rows are padded on the right, where a causal model doesn't see it.
    """
    live, labels = labels[:, 1:] != -100, labels[:, 1:]
    inputs = {"input_ids": input_ids, "past_key_values": past, "use_cache": past is not None}
    if head is None:
        logits = base(**inputs).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits[live].float(), labels[live], reduction="none")
    hidden = base.base_model(**inputs).last_hidden_state[:, :-1]
    return ChunkedNLL.apply(hidden[live].to(head.dtype), head, labels[live])


def score_rows(model, tokenizer, texts, *, max_length, batch_size=8, dtype=torch.float32, progress=None):
    """Score every text once, shared out over the processes -> float64 array (len(texts), 5).

    Columns: NLL in nats and predicted tokens of the row, the same of its answer, UTF-8 bytes of the answer scored.
    """
    rows, process, scored = encode(tokenizer, texts, max_length), PartialState(), []
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # by length: little padding
    order = order[process.process_index :: process.num_processes]
    total, quiet = sum(len(rows[i][0]) for i in order), not (progress and process.is_main_process)
    bar = tqdm(total=total, desc=progress, unit=" tokens", unit_scale=True, disable=quiet, leave=False)
    common = list(os.path.commonprefix([ids for ids, _, _ in rows]))  # the system prompt is run once, and then cached
    known = max(len(common) - 1, 0)  # all but its last token, which is to predict the first one that differs
    with bar, inference(model, dtype) as (base, head):
        use_causal_attention(base)  # until `inference` puts the model's own back
        prompt, cache = torch.tensor([common], device=base.device), None
        if known:
            prompt_nll = label_nll(base, head, prompt, prompt).cpu().double()
            cache = base.base_model(input_ids=prompt[:, :known], use_cache=True).get("past_key_values")
            known *= cache is not None  # a model without attention has none
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            ids = [torch.tensor(rows[i][0][known:]) for i in part]
            labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100).to(base.device)
            spare = min(-labels.shape[1] % SHAPE_STEP, max_length - known - labels.shape[1])
            labels = torch.nn.functional.pad(labels, (0, spare), value=-100)
            past = copy.deepcopy(cache)
            if known:
                past.batch_repeat_interleave(len(part))
            nll = label_nll(base, head, labels.clamp(min=0), labels, past).cpu().double()
            for i, row in zip(part, nll.split([max(len(rows[i][0]) - known - 1, 0) for i in part]), strict=True):
                row = torch.cat([prompt_nll, row]) if known else row
                answer = row[max(rows[i][1] - 1, 0) :]
                scored.append((i, row.sum().item(), len(row), answer.sum().item(), len(answer), rows[i][2]))
            bar.update(sum(len(rows[i][0]) for i in part))
    scored = gather_object(scored)
    for i, nll, *_ in scored:  # only now, for all processes to end alike
        if not math.isfinite(nll):
            raise InputError(f"the model's loss on row {i} is not finite; that row ends in {texts[i][-50:]!r}")
    return np.array(sorted(scored), dtype=np.float64).reshape(-1, 6)[:, 1:]


def bootstrap_ci95(statistic, n):
    """95 % interval of statistic(weights) over resamplings of n rows; weights (1000, n) count each row's draws."""
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)
    return np.percentile(statistic(weights), (2.5, 97.5)).tolist()


def summarize_scores(rows):
    """The perplexities in a `score_rows` array: sum the NLL, count the tokens, divide once. None without an answer."""
    nll, tokens, answer_nll, answer_tokens, answer_bytes = rows.T
    first = rows[:100][tokens[:100] > 0]
    scores = {
        "full_text": math.exp(nll.sum() / tokens.sum()),
        "answer": None,
        "seed_protocol": math.exp(np.mean(first[:, 0] / first[:, 1])),  # the reference's: mean of the rows' means
        "bits_per_byte": None,
        "tokens": int(tokens.sum()),
        "answer_tokens": int(answer_tokens.sum()),
        "answer_ci95": None,
    }
    nll, count = answer_nll[answer_tokens > 0], answer_tokens[answer_tokens > 0]
    if len(nll):
        scores["answer"] = math.exp(nll.sum() / count.sum())
        scores["bits_per_byte"] = float(nll.sum() / math.log(2) / answer_bytes.sum())
        scores["answer_ci95"] = bootstrap_ci95(lambda w: np.exp((w @ nll) / (w @ count)), len(nll))
    return scores


def evaluate_perplexity(model, tokenizer, texts, *, max_length, batch_size=8, dtype=torch.float32):
    """Perplexities of `texts` under a causal LM, plain or PEFT, each text cut at `max_length` tokens.

    Returns full_text, answer (tokens after [/INST]), seed_protocol, bits_per_byte, tokens, answer_tokens, answer_ci95.
    `dtype` other than float32 runs the model under autocast. Raises InputError where the loss is not finite.
    """
    kwargs = {"max_length": max_length, "batch_size": batch_size, "dtype": dtype}
    return summarize_scores(score_rows(model, tokenizer, list(texts), **kwargs))


def paired_change(before, after):
    """Mean change of a row's answer NLL per token, in nats, between two `score_rows` arrays, with its interval."""
    rows = before[:, 3] > 0
    change = (after - before)[rows, 2] / before[rows, 3]
    if not len(change):
        return None
    interval = bootstrap_ci95(lambda w: (w @ change) / len(change), len(change))
    return {"rows": len(change), "mean": float(change.mean()), "ci95": interval, "improved": float((change < 0).mean())}


# ---------------------------------------------------------------------------------------------------------- answers


@contextlib.contextmanager
def weights_first(base):
    """Within: frozen 16-bit layers compute (W x^T)^T for x W^T where x has few rows, as in a decoding step.

    On a CPU the right-hand matrix is reordered in every call: let it be the small one.
    """
    layers = [x for x in matrix_layers(base) if x.weight.dtype == torch.bfloat16 and x.weight.device.type == "cpu"]

    def forward(layer, weight, x):
        rows = x.flatten(0, -2)
        if len(rows) > 64:
            return type(layer).forward(layer, x)
        y = weight @ rows.T if layer.bias is None else torch.addmm(layer.bias[:, None], weight, rows.T)
        return y.T.contiguous().unflatten(0, x.shape[:-1])

    for layer in layers:
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        layer.forward = functools.partial(forward, layer, weight.contiguous())
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def generate_answers(
    model, tokenizer, questions, *, max_new_tokens, temperature, seed, dtype=None, with_finished=False
):
    """Ask all questions in one left-padded batch -> the answers, without prompts, cut at the first </s> or EOS.

    Sampled from the 50 likeliest tokens at `temperature` (0: greedy), seeded, under autocast to `dtype`; None: bfloat16
    where the hardware has it. `with_finished` gives (answer, finished) pairs: whether it ended by itself.
    """
    dtype = dtype or (torch.bfloat16 if has_bf16(model.device.type) else torch.float32)
    prompts = encode(tokenizer, [format_prompt(question) for question in questions], sys.maxsize)
    prompts = [torch.tensor(row.ids) for row in prompts]
    prompts = torch.nn.utils.rnn.pad_sequence(prompts, True, -1, padding_side="left").to(model.device)
    width, eos = prompts.shape[1], model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    bar = tqdm(total=max_new_tokens, desc="  answering", unit=" tokens", leave=False)

    def ended(input_ids, scores, **unused):
        bar.update()
        tails = tokenizer.batch_decode(input_ids[:, max(width, input_ids.shape[1] - 8) :])
        return torch.tensor([END_MARK in tail for tail in tails], device=input_ids.device)

    def draw(input_ids, scores):  # leaves the token drawn; `generate` would draw among the whole vocabulary
        top, ids = scores.float().topk(min(50, scores.shape[-1]))
        drawn = ids.gather(1, (top / temperature).softmax(-1).multinomial(1))
        return torch.full_like(scores, -math.inf).scatter_(1, drawn, 0.0)

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), bar, inference(model, dtype) as (base, _), weights_first(base):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=prompts.clamp(min=0),
            attention_mask=(prompts >= 0).long(),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            stopping_criteria=[ended],
            do_sample=False,
            logits_processor=[draw] * bool(temperature),
        )
    answers = []
    for ids in output[:, width:].tolist():
        stop = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        text = tokenizer.decode(ids[:stop])
        answers.append((text.split(END_MARK)[0].strip(), stop < len(ids) or END_MARK in text))
    return answers if with_finished else [answer for answer, _ in answers]


def answer_stats(text, *, finished=None):
    """Counts of words, sentences, unique words and distinct bigrams, case ignored.

    `finished`: whether generation ended by itself; if not given, whether the text ends like a sentence.
    """
    words = re.findall(r"\w+(?:['’-]\w+)*", text.lower())
    return {
        "words": len(words),
        "sentences": sum(bool(re.search(r"\w", part)) for part in re.split(r"[.!?]+(?=\s|$)", text)),
        "unique_words": len(set(words)),
        "distinct_bigrams": len(set(zip(words, words[1:], strict=False))),
        "finished": bool(re.search(r"[.!?][\"')\]]*\s*$", text)) if finished is None else finished,
    }


# --------------------------------------------------------------------------------------------------------- training


def fast_dropout(module, x):
    """Dropout for CPUs: torch draws a random number for each element, this gets four from each draw of 64 bits."""
    if not module.training or not module.p:
        return x
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = draws[: x.numel()].view(x.shape) >= round(module.p * 2**16) - 2**15
    return x * kept.to(x.dtype).div_(1 - module.p)


class StepClock(TrainerCallback):
    """Times the optimizer steps alone, saves every few minutes, and logs wherever it saves."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds = next((entry["seconds"] for entry in reversed(state.log_history) if "seconds" in entry), 0.0)
        self.saved = time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.started
        last = state.global_step >= state.max_steps
        control.should_evaluate &= not last  # the saved adapter is scored right after
        # a checkpoint does not hold the loss summed up since the last log line: save only where there is none
        control.should_log |= control.should_save or last
        # by the clock only in one process: several would disagree
        overdue = time.monotonic() - self.saved > 60 * CHECKPOINT_MINUTES and args.world_size == 1
        control.should_save |= control.should_log and overdue
        control.should_save &= not last  # the adapter is; and resumed there, the Trainer would take one step more

    def on_save(self, args, state, control, **kwargs):
        self.saved = time.monotonic()


class LoRATrainer(SFTTrainer):
    """SFTTrainer with a faster loss where TRL's own kernel can't run, exact validation, and verifiable checkpoints."""

    def __init__(self, *args, validate, **kwargs):
        self.clock, self.validate = StepClock(), validate  # validate: model -> mean NLL of the held-out rows
        super().__init__(*args, callbacks=[self.clock], **kwargs)
        base = self.model.get_base_model().eval()
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        head = None if base.device.type == "cuda" else head_weight(base, dtype)
        self.own_loss = head is not None
        if self.own_loss:  # as the model's forward, for autocast, DDP and PEFT to wrap it as they wrap any other
            base.forward = functools.partial(label_nll, base, head)
            use_causal_attention(base)
            hold_weights(base, dtype)
            for module in base.modules() if base.device.type == "cpu" else ():
                if isinstance(module, torch.nn.Dropout):
                    module.forward = functools.partial(fast_dropout, module)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.own_loss:
            nll = model(input_ids=inputs["input_ids"], labels=inputs["labels"])
            share = len(nll) if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
            loss = nll.sum() / max(share, 1)  # items are counted over all processes; DDP averages gradients
        else:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if not self.accelerator.gather(loss.detach()).isfinite().all():
            raise InputError(
                f"the training loss is not finite at step {self.state.global_step + 1}: lower LEARNING_RATE, now "
                f"{self.args.learning_rate:g}; the last good checkpoint stays in {self.args.output_dir}"
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
        """None in checkpoints; the adapter gets its own."""

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            write_json(folder / "complete.json", {file.name: digest(file) for file in sorted(folder.iterdir())})


def newest_checkpoint(folder):
    """The newest checkpoint of which every file is as it was written, or None; torn ones are removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            manifest = json.loads((checkpoint / "complete.json").read_text())
            if all(digest(checkpoint / name) == value for name, value in manifest.items()):
                return str(checkpoint)
        except (OSError, ValueError):
            pass
        say(f"{checkpoint.name} was not written to its end: passing it over")
        shutil.rmtree(checkpoint, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------- results


@contextlib.contextmanager
def figure(path, title, ylabel):
    """Within: the axes of a plot, which then appears at `path`, whole or not at all."""
    style = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "figure.figsize": (9, 5.4)}
    with plt.rc_context(style):
        fig, ax = plt.subplots()
        yield ax
        ax.set(title=title, ylabel=ylabel)
        ax.legend()
        fig.tight_layout()
        fig.savefig(f"{path}.tmp", format="png", dpi=150)
        plt.close(fig)
    sync(f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def plot_training_loss(log_history, path, *, title="Fine-tuning", loss_on="all tokens"):
    """Training and validation loss in nats per token over optimizer steps; the first validation marks the baseline."""
    with figure(path, title, f"loss on {loss_on} (nats per token)") as ax:
        for key, label, color, marker, offset in (
            ("loss", "training, mean since the point before", "#0072B2", ".", -22),
            ("eval_loss", "validation, held-out rows", "#D55E00", "o", 10),
        ):
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if not points:
                continue
            ax.plot(*zip(*points, strict=True), color=color, marker=marker, label=label)
            (step, first), last = points[0], points[-1]
            ax.annotate(f"{last[1]:.2f}", last, (0, offset), textcoords="offset points", ha="center", color=color)
            if key == "eval_loss":
                ax.axhline(first, color=color, linestyle=":", label=f"validation at step {step}: {first:.2f}")
        ax.set_xlabel("optimizer step")
        ax.margins(y=0.12)
        ax.grid(alpha=0.3)


def plot_perplexity(before, after, path, *, title="Perplexity on held-out text"):
    """Pairs of bars, before and after: answers only with their 95 % interval, full text, reference protocol."""
    kinds = {
        "answer": "answers only\n(95 % interval)",
        "full_text": "full text,\nprompts too",
        "seed_protocol": "reference\nprotocol",
    }
    kinds = {kind: label for kind, label in kinds.items() if before[kind]}
    with figure(path, title, "perplexity (lower is better)") as ax:
        for offset, name, scores, color in ((-0.2, "before", before, "#999999"), (0.2, "after", after, "#0072B2")):
            for x, kind in enumerate(kinds):
                value = scores[kind]
                low, high = scores["answer_ci95"] if kind == "answer" else (value, value)
                errors = [[value - low], [high - value]] if high > low else None
                ax.bar(x + offset, value, 0.38, color=color, label=None if x else name, yerr=errors, capsize=5)
                text = f"{value:.2f}" + f"\n({value / before[kind] - 1:+.0%})" * (scores is after)
                ax.annotate(text, (x + offset, high), (0, 4), textcoords="offset points", ha="center")
        ax.set_xticks(range(len(kinds)), kinds.values())
        ax.margins(y=0.18)


def side_by_side(left, right, width=48):
    """Two texts as two columns in a Markdown fence that nothing in them can close."""
    columns = []
    for text in (left, right):
        text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
        columns.append([part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]])
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", left + right)), default=0))
    lines = [("BEFORE", "AFTER"), ("-" * width, "-" * width), *itertools.zip_longest(*columns, fillvalue="")]
    return "\n".join([f"{fence}text", *(f"{a:{width}} | {b}".rstrip() for a, b in lines), fence])


def table(*rows):
    """A Markdown table from its head and rows: floats with two digits, None as a dash."""
    cells = [["–" if x is None else f"{x:,.2f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(cells[0]), *cells[1:]))


def observations(stats):
    """What `answer_stats` counted, as a line."""
    repeated = 1 - stats["distinct_bigrams"] / (stats["words"] - 1) if stats["words"] > 1 else 0
    return (
        f"{stats['words']} words ({stats['unique_words']} different) in {stats['sentences']} sentences, "
        f"{repeated:.0%} of the word pairs repeated, {'ended by itself' if stats['finished'] else 'cut at the limit'}"
    )


def write_report(results, path):
    """Write report.md from what results.json holds, and from that alone."""
    perplexity, settings, data, training, hardware = (
        SimpleNamespace(**results[key]) for key in ("perplexity", "settings", "data", "training", "hardware")
    )
    before, after, change = perplexity.before, perplexity.after, results["perplexity"].get("change")
    clip = f"at most {settings.MAX_GRAD_NORM:g}" if settings.MAX_GRAD_NORM else "not limited"
    batch = settings.BATCH_SIZE * settings.GRADIENT_ACCUMULATION_STEPS * hardware.processes
    loss_on = "all tokens" if settings.TRAIN_ON_PROMPT else "the answers only"
    losses = {}  # step -> the log entries of that step, as one
    for entry in training.log_history:
        losses.setdefault(entry["step"], {}).update(entry)
    # all held-out tokens, those of the answers, and the rest, the prompts: their number, their NLL before and after
    whole, answer = (
        np.array([before[n], *(scores[n] * math.log(scores[key] or 1) for scores in (before, after))])
        for n, key in (("tokens", "full_text"), ("answer_tokens", "answer"))
    )
    fall = whole[1] - whole[2]
    origin = [
        (
            kind,
            f"{n:,.0f}",
            one / max(n, 1),
            two / max(n, 1),
            f"{one - two:,.0f}",
            f"{(one - two) / fall:.0%}" if fall > 0 else None,
        )
        for kind, (n, one, two) in (("prompt", whole - answer), ("answer", answer), ("all", whole))
    ]
    kinds = {
        "answer": "answers only",
        "full_text": "full text",
        "seed_protocol": "reference protocol",
        "bits_per_byte": "answers, bits per byte",
    }
    parts = [
        f"# LoRA fine-tuning of {short_name(results['model'])} on {short_name(results['dataset'])}",
        results["offline_fallback"]
        and "**Offline default: a tiny model and a small data set that ship with the script. No figure is GPT-2's.**",
        "None of the text below is medical advice: language models state falsehoods fluently.",
        "## What was run",
        table(
            ("", ""),
            ("model", f"{results['model']}, revision {results['model_revision'] or 'none (local folder)'}"),
            ("data", f"{results['dataset']}, revision {results['dataset_revision'] or 'none (local file)'}"),
            (
                "rows",
                f"{data.train_rows:,} to train on and {data.test_rows:,} held out, of {data.rows:,}; dropped: "
                f"{data.dropped_empty:,} without an answer, {data.dropped_duplicate:,} duplicates, "
                f"{data.dropped_malformed:,} malformed; cut at {settings.MAX_LENGTH} tokens: "
                f"{data.truncated_train_rows:,} training rows ({data.truncated_train_rows / data.train_rows:.0%})",
            ),
            (
                "LoRA",
                f"r {settings.LORA_R}, alpha {settings.LORA_ALPHA}, dropout {settings.LORA_DROPOUT}, on "
                f"{settings.LORA_TARGET_MODULES or 'the default modules of PEFT'}: {training.trainable_parameters:,} "
                f"trainable of {training.total_parameters:,} parameters",
            ),
            (
                "training",
                f"{training.steps:,} steps, {training.log_history[-1]['epoch']:.2f} epochs; {batch:,} rows a "
                f"step; learning rate {settings.LEARNING_RATE:g}, linear, warm-up {settings.WARMUP_RATIO:.0%}; "
                f"gradient norm {clip}; seed {settings.SEED}; loss on {loss_on}",
            ),
            (
                "time",
                f"{training.seconds:,.0f} s of optimizer steps for {training.tokens:,} tokens, "
                f"{training.tokens_per_second:,.0f} a second",
            ),
            (
                "hardware",
                f"{hardware.name}, {hardware.precision}; processes: {hardware.processes}, each of "
                f"{hardware.threads} threads",
            ),
            ("versions", ", ".join(f"{name} {version}" for name, version in results["versions"].items())),
        ),
        "## Training",
        table(
            ("Step", "Training Loss", "Validation Loss"),
            *(
                (step, *(f"{entry[key]:.4f}" if key in entry else None for key in ("loss", "eval_loss")))
                for step, entry in losses.items()
                if "eval_loss" in entry
            ),
        ),
        f"In nats per token, on {loss_on}. Validation is the whole held-out split: step 0 the base model, the last "
        "line the saved adapter. The training loss is the mean over the steps since it was last logged, every "
        f"{settings.LOGGING_STEPS}; the plot shows them all.",
        "![Training and validation loss](training_loss.png)",
        "## Perplexity on the held-out rows",
        table(
            ("", "before", "after", "change"),
            *(
                (label, before[key], after[key], f"{after[key] / before[key] - 1:+.1%}" if before[key] else None)
                for key, label in kinds.items()
            ),
            (
                "answers, 95% interval",
                *("{:.2f} to {:.2f}".format(*x["answer_ci95"]) if x["answer_ci95"] else None for x in (before, after)),
                None,
            ),
        ),
        f"**Answers only** is how well the model predicts the articles: {before['answer_tokens']:,} tokens after "
        f"`[/INST]`. **Full text** adds the prompts, {before['tokens']:,} tokens in all; their boilerplate is the same "
        "in every row. The **reference protocol** is exp of the mean of the rows' mean losses, over the first 100 rows "
        "at most. **Bits per byte** can be compared between tokenizers. The interval is a bootstrap over rows.",
        change
        and f"Row by row, the answers' loss changed by {change['mean']:+.4f} nats per token on average (95% "
        f"interval {change['ci95'][0]:+.4f} to {change['ci95'][1]:+.4f}); it fell in {change['improved']:.0%} of "
        f"{change['rows']:,} rows.",
        "![Perplexity before and after](perplexity_comparison.png)",
        "## Where the improvement comes from",
        table(("tokens", "number", "nats/token before", "nats/token after", "fall in nats", "share"), *origin),
        f"The prompts, nearly the same in every row, are {1 - answer[0] / whole[0]:.0%} of the tokens. "
        + (
            f"They account for {origin[0][-1]} of the fall in loss, the answers for {origin[1][-1]}."
            if fall > 0
            else "The loss over all tokens did not fall."
        ),
        "## The questions",
        "Asked in the format of the training rows, "
        + (
            f"sampled from the 50 likeliest tokens at temperature {settings.TEMPERATURE:g} with seed {settings.SEED}"
            if settings.TEMPERATURE
            else "answered by the likeliest token each time"
        )
        + f", at most {settings.MAX_NEW_TOKENS} tokens; before and after alike. Where the data has an article on the "
        "topic, its perplexity is given, and whether the model was trained on it.",
    ]
    for item in results["answers"]:
        own = item["reference"]
        parts += [f"### {item['topic']}", f"> {item['question']}", side_by_side(item["before"], item["after"])]
        parts += [f"{when.capitalize()}: {observations(item[f'{when}_stats'])}." for when in ("before", "after")]
        parts += [
            f"The data's own article ({'held out' if own['split'] == 'test' else 'trained on'}): answer perplexity "
            f"{own['perplexity_before']:.2f} before, {own['perplexity_after']:.2f} after."
            if own
            else "The data has no article of this title."
        ]
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")


MODEL_CARD = """\
---
{metadata}
---

# LoRA adapter: {model} fine-tuned on {dataset}

{what}

None of what it writes is medical advice: a small language model states falsehoods fluently.

{scores}

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "."  # where this file is
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = {prompt!r}
inputs = tokenizer(prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.7)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer.split("</s>")[0])
```
"""


def write_model_card(results, path):
    """Write the adapter's README.md: metadata as the Hub reads it, the held-out scores, and how to load it."""
    before, after = results["perplexity"]["before"], results["perplexity"]["after"]
    names = {"model": short_name(results["model"]), "dataset": short_name(results["dataset"])}
    labels = {"answer": "Perplexity (answers)", "full_text": "Perplexity (full text)", "bits_per_byte": "Bits per byte"}
    settings, data = SimpleNamespace(**results["settings"]), SimpleNamespace(**results["data"])
    dataset = {  # the Hub's data set has one split, of which a seeded share was held out
        "dataset_type": results["dataset"] if results["dataset_revision"] else names["dataset"],
        "dataset_name": names["dataset"],
        "dataset_split": "train",
        "dataset_revision": results["dataset_revision"],
        "dataset_args": {"held_out": settings.TEST_SIZE, "seed": settings.SEED},
    }
    own_license = re.fullmatch(r"(openai-community/)?gpt2(-\w+)?", results["model"])
    metadata = huggingface_hub.ModelCardData(
        model_name=f"{names['model']}-{names['dataset']}-lora",
        library_name="peft",
        tags=["lora", "sft", "trl"],
        license="mit" if own_license else "other",
        license_name=None if own_license else "as-the-base-model",
        pipeline_tag="text-generation",
        base_model=results["model"] if results["model_revision"] else None,
        datasets=[results["dataset"]] if results["dataset_revision"] else None,
        eval_results=[
            huggingface_hub.EvalResult(
                "text-generation",
                metric_type=key if key == "bits_per_byte" else "perplexity",
                metric_name=label,
                metric_value=round(after[key], 4),
                **dataset,
            )
            for key, label in labels.items()
            if after[key]
        ],
    )
    what = (
        f"{results['training']['steps']:,} steps on {data.train_rows:,} rows, learning rate "
        f"{settings.LEARNING_RATE:g}, r {settings.LORA_R}, alpha {settings.LORA_ALPHA}; scored on {data.test_rows:,} "
        "rows that were held out."
        + " Offline default: a tiny model and a small data set, no figure is GPT-2's."
        * results["offline_fallback"]
    )
    rows = ((label, before[key], after[key]) for key, label in labels.items())
    scores, prompt = table(("held-out rows", "before", "after"), *rows), results["answers"][0]["prompt"]
    write_text(path, MODEL_CARD.format(metadata=metadata.to_yaml(), what=what, scores=scores, prompt=prompt, **names))


# --------------------------------------------------------------------------------------------- settings and machine


def check_settings(cfg):
    """Raise InputError for the first constant that is out of range, of the wrong type, or can't be followed here."""

    def name(x):
        return isinstance(x, str) and bool(x.strip())

    def whole(x):
        return type(x) is int and 1 <= x < 2**31

    def number(x):
        return type(x) in (int, float) and math.isfinite(x)

    def share(x):
        return number(x) and 0 <= x < 1

    rules = (
        ("MODEL_NAME DATASET_NAME OUTPUT_DIR", name, "a name"),
        ("REPORT_TO", TRACKERS.__contains__, " or ".join(map(repr, TRACKERS))),
        ("MODEL_REVISION DATASET_REVISION", lambda x: x is None or name(x), "None, or a commit, tag or branch"),
        ("OFFLINE_FALLBACK TRAIN_ON_PROMPT DROP_EMPTY_ANSWERS SAVE_MERGED", lambda x: type(x) is bool, "True or False"),
        ("MAX_LENGTH", lambda x: whole(x) and x > 1, "a whole number from 2"),
        (
            "LORA_R BATCH_SIZE GRADIENT_ACCUMULATION_STEPS LOGGING_STEPS EVAL_STEPS MAX_NEW_TOKENS",
            whole,
            "a whole number from 1",
        ),
        ("SEED", lambda x: x == 0 and type(x) is int or whole(x), "a whole number from 0"),
        ("MAX_STEPS", lambda x: x == -1 or whole(x), "-1, or a whole number from 1"),
        ("TEST_SIZE", lambda x: share(x) and x > 0, "a share between 0 and 1, such as 0.1"),
        ("NUM_EPOCHS LEARNING_RATE LORA_ALPHA", lambda x: number(x) and x > 0, "a number above 0"),
        ("MAX_GRAD_NORM TEMPERATURE", lambda x: number(x) and x >= 0, "a number from 0"),
        ("LORA_DROPOUT WARMUP_RATIO", share, "a share from 0 to below 1"),
        ("BASE_DROPOUT", lambda x: x is None or share(x), "None, or a share from 0 to below 1"),
        (
            "LORA_TARGET_MODULES",
            lambda x: x is None or name(x) or isinstance(x, list) and x and all(map(name, x)),
            "None, a name, or a list of names of modules",
        ),
        (
            "QUESTIONS",
            lambda x: isinstance(x, dict) and x and all(map(name, (*x, *x.values()))),
            "a dict {topic: question} with at least one question",
        ),
    )
    for names, test, wanted in rules:
        for constant in names.split():
            if not test(getattr(cfg, constant)):
                raise InputError(f"{constant} = {getattr(cfg, constant)!r}: must be {wanted}; edit it in the script")
    if cfg.REPORT_TO != "none" and importlib.util.find_spec(cfg.REPORT_TO) is None:
        raise InputError(f"REPORT_TO = {cfg.REPORT_TO!r}: not installed; pip install {cfg.REPORT_TO}, or use 'none'")
    try:
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.OUTPUT_DIR).close()
    except OSError as error:
        raise InputError(f"OUTPUT_DIR = {cfg.OUTPUT_DIR!r}: no folder to write to ({error.strerror})") from error
    launchers = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of srun and mpirun
    launched = max(int(os.environ.get(name, 1)) for name in launchers)
    if launched > 1 and "WORLD_SIZE" not in os.environ:
        raise InputError(f"{launched} processes that don't know of each other: start them with torchrun")


def has_bf16(device):
    """Whether the hardware multiplies matrices in bfloat16; where it only emulates that, fp32 is faster."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
    return bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))


def choose_hardware():
    """(device, precision, name) of this machine; on a CPU also its threads and allocator."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if count > processes == 1:
            raise InputError(f"{count} GPUs: use torchrun --nproc_per_node={count}, or one with CUDA_VISIBLE_DEVICES=0")
        return "cuda", "bf16" if has_bf16("cuda") else "fp16", torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "mps", "fp32", "Apple GPU"
    if platform.libc_ver()[0] == "glibc":  # half of a step is the mapping of fresh pages, unless freed ones are kept
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            ctypes.CDLL(None).mallopt(parameter, value)
    if processes > 1:  # torchrun sets one thread
        cores = psutil.cpu_count(logical=False) or os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return "cpu", "bf16" if has_bf16("cpu") else "fp32", name


def needs_checkpointing(model, batch_size, length):
    """Whether a step's activations, kept, would fill the free memory: recomputing them costs a third more time."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    per_token = 34 * config.hidden_size + 5 * heads * length  # bytes per layer in 16 bits
    free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else psutil.virtual_memory().available
    return batch_size * length * config.num_hidden_layers * per_token > 0.6 * free


# -------------------------------------------------------------------------------------------------------- the inputs


def load_model(folder, *, dropout=None):
    """A causal LM in fp32, from safetensors, without remote code; `dropout` replaces its own."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for key, value in config.to_dict().items():
            if dropout is not None and isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
                setattr(config, key, dropout)
            if value == "gelu_new":
                setattr(config, key, "gelu_pytorch_tanh")  # the same function, in one kernel
        kwargs = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, **kwargs)
    except Exception as error:
        raise InputError(f"MODEL_NAME: {folder} can't be loaded: {last_line(error)}") from error
    return model.requires_grad_(False)


def find_inputs(cfg):
    """Model and data on this disk -> (model path, commit, data path, commit, whether it is the offline default).

    Where the Hub is out of reach and nothing is cached, `cfg` gets the offline default's settings.
    """
    try:
        model_path, commit = on_first(lambda: fetch("model", cfg.MODEL_NAME, cfg.MODEL_REVISION))
        data_path, data_commit = on_first(lambda: fetch("dataset", cfg.DATASET_NAME, cfg.DATASET_REVISION))
        return model_path, commit, data_path, data_commit, False
    except HubUnreachable as error:
        if not cfg.OFFLINE_FALLBACK:
            raise InputError(f"{error}; go online once, or name local files") from error
        cause = error
    vars(cfg).update(OFFLINE_SETTINGS)
    changed = ", ".join(f"{k} = {v!r}" for k, v in OFFLINE_SETTINGS.items() if type(v) in (int, float))
    say(
        f"\n{'=' * 100}\n  OFFLINE DEFAULT: not the model and data that the constants name!\n\n  Why: {cause}.\n"
        f"  The same pipeline now runs on what ships with the script:\n  {cfg.MODEL_NAME}, a tiny GPT-2, and "
        f"{cfg.DATASET_NAME}, with {changed}.\n{'=' * 100}\n"
    )
    here = Path(__file__).resolve().parent
    return here / cfg.MODEL_NAME, None, here / cfg.DATASET_NAME, None, True


def run_folder(cfg, model_path, commit, train, test):
    """The run's folder, named after the model and a hash of settings, prompt, model files and data."""
    files = sorted(path for path in model_path.glob("*") if path.suffix in (".safetensors", ".json"))
    ignored = ("OUTPUT_DIR", "REPORT_TO", "SAVE_MERGED", "OFFLINE_FALLBACK", "MODEL_NAME", "DATASET_NAME")
    identity = {name: getattr(cfg, name) for name in SETTINGS if name not in ignored}
    identity |= {"model": commit or [digest(path) for path in files], "prompt": PROMPT}
    identity |= {"processes": PartialState().num_processes, "train": train["text"][:], "test": test["text"][:]}
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    return Path(cfg.OUTPUT_DIR, f"{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(cfg.MODEL_NAME).name)}-{key}")


def lock_run(run):
    """Make the run's folder, and keep other processes out of it as long as the lock that this returns lives."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run / "checkpoints" / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(f"another process is at work in {run}: wait for it; start several with torchrun") from error
    return lock


@contextlib.contextmanager
def one_line_errors():
    """Around `main`: what the user can mend ends with one line on stderr and an exit code, without a traceback."""
    try:
        yield
        return
    except InputError as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, f"interrupted: the same command goes on from the last checkpoint in {OUTPUT_DIR}/"
    except torch.OutOfMemoryError:
        code, message = 2, "error: out of GPU memory: halve BATCH_SIZE, and double GRADIENT_ACCUMULATION_STEPS"
    except Exception as error:  # torch and safetensors don't pass the error number on
        if getattr(error, "errno", None) != errno.ENOSPC and shutil.disk_usage(OUTPUT_DIR).free > 2**20:
            raise
        code, message = 2, f"error: no space left in {OUTPUT_DIR}/: free some, and the same command goes on"
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
    raise SystemExit(code)


@one_line_errors()
def main():
    """The whole story, in order; returns the run's folder."""
    # settings and machine: all that can be checked before anything takes time
    cfg = SimpleNamespace(**{name: globals()[name] for name in SETTINGS})
    check_settings(cfg)
    device, precision, hardware_name = choose_hardware()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    process = PartialState(cpu=device == "cpu")  # joins the others, if torchrun started several
    rank, processes = process.process_index, process.num_processes
    for library in (transformers, datasets):  # what a user can do nothing about; warnings of torch and the data stay
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|trl")
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL's trainers would call home
    say(f"{cfg.MODEL_NAME} on {cfg.DATASET_NAME}; {hardware_name}, {device}, {precision}, {processes} process(es)")

    # model and data: from here on a folder and a file on this disk
    model_path, commit, data_path, data_commit, fallback = find_inputs(cfg)
    tokenizer = load_tokenizer(model_path)
    model = load_model(model_path, dropout=cfg.BASE_DROPOUT)
    kwargs = {"test_size": cfg.TEST_SIZE, "seed": cfg.SEED, "drop_empty": cfg.DROP_EMPTY_ANSWERS}
    train, test, counts = load_splits(data_path, **kwargs)
    model.to(device)
    say(
        f"data: {counts['rows']:,} rows; dropped {counts['dropped_empty']:,} without an answer, "
        f"{counts['dropped_duplicate']:,} duplicates, {counts['dropped_malformed']:,} malformed; "
        f"{counts['train_rows']:,} to train on, {counts['test_rows']:,} held out"
    )

    # what only the model can say of the settings
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    prompts = [format_prompt(question) for question in cfg.QUESTIONS.values()]
    longest = max(len(row.ids) for row in encode(tokenizer, prompts, sys.maxsize))
    if cfg.MAX_LENGTH > context or longest + cfg.MAX_NEW_TOKENS > context:
        raise InputError(
            f"MAX_LENGTH = {cfg.MAX_LENGTH}, and prompts of {longest} tokens + MAX_NEW_TOKENS = {cfg.MAX_NEW_TOKENS}, "
            f"must fit the context of {cfg.MODEL_NAME}: {context} tokens"
        )
    encoded = encode(tokenizer, train["text"][:], cfg.MAX_LENGTH, end=True)
    counts["truncated_train_rows"] = sum(ids[-1] != tokenizer.eos_token_id for ids, _, _ in encoded)
    if not cfg.TRAIN_ON_PROMPT and all(first == len(ids) for ids, first, _ in encoded):
        raise InputError(f"MAX_LENGTH = {cfg.MAX_LENGTH}: no room for answers, the rows' prompts alone are that long")
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.LORA_R,
        lora_alpha=cfg.LORA_ALPHA,
        lora_dropout=cfg.LORA_DROPOUT,
        target_modules=cfg.LORA_TARGET_MODULES,
        revision=commit,
        fan_in_fan_out=model.config.model_type == "gpt2",  # its Conv1D keeps weights transposed
    )
    try:
        with torch.device("meta"):  # costs nothing, and PEFT judges the settings now rather than after the baseline
            shell = get_peft_model(AutoModelForCausalLM.from_config(model.config), copy.deepcopy(lora))
    except (ValueError, re.error) as error:
        raise InputError(f"LORA_TARGET_MODULES = {cfg.LORA_TARGET_MODULES!r}: {str(error).splitlines()[0]}") from error
    if any(isinstance(x, BaseTunerLayer) for x in (shell.get_input_embeddings(), shell.get_output_embeddings())):
        raise InputError(f"LORA_TARGET_MODULES = {cfg.LORA_TARGET_MODULES!r}: not embeddings or the LM head")
    trainable, total = shell.get_nb_trainable_parameters()

    # the run's folder: an interrupted run goes on in it, a finished one is left alone
    run = run_folder(cfg, model_path, commit, train, test)
    lock = lock_run(run) if rank == 0 else None
    checkpoints, adapter = run / "checkpoints", run / "adapter"
    names = ["results.json", "report.md", "training_loss.png", "perplexity_comparison.png", "adapter/README.md"]
    products = [run / name for name in names + ["merged"] * cfg.SAVE_MERGED]
    if on_first(lambda: all(path.exists() for path in products)):
        say(f"already finished: {run}/report.md (to repeat it, move the folder away or change a setting)")
        return run
    if on_first(lambda: (run / "results.json").exists() and not (checkpoints / "training.json").exists()):
        raise InputError(f"{run} is finished, but its checkpoints/ are gone: move it away to run it again")

    # the baseline, from the base model itself, before any trainer exists
    texts, questions = test["text"][:], list(cfg.QUESTIONS.values())
    titles = {}
    for split, rows in (("train", train), ("test", test)):
        found = (re.search(r"What is (.+?) and explain in detail", text) for text in rows["text"])
        titles |= {x.group(1).casefold(): (split, text) for x, text in zip(found, rows["text"], strict=True) if x}
    articles = {topic: titles[topic.casefold()] for topic in cfg.QUESTIONS if topic.casefold() in titles}

    scoring = {"max_length": cfg.MAX_LENGTH, "dtype": dtype}

    def measure(model, name):
        """Score and ask a model, the same way before and after; kept in checkpoints/<name>.json."""
        path, began = checkpoints / f"{name}.json", time.monotonic()
        kept = on_first(lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
        if kept.get("precision") != precision:  # the run may go on on another machine
            rows = score_rows(model, tokenizer, texts, progress=f"  scoring, {name}", **scoring)
            own = score_rows(model, tokenizer, [text for _, text in articles.values()], **scoring)
            asked = {"max_new_tokens": cfg.MAX_NEW_TOKENS, "temperature": cfg.TEMPERATURE, "seed": cfg.SEED}
            asked |= {"dtype": dtype, "with_finished": True}
            answers = on_first(lambda: generate_answers(model, tokenizer, questions, **asked))
            kept = {"rows": rows.tolist(), "articles": own.tolist(), "answers": answers, "precision": precision}
            on_first(lambda: write_json(path, kept))
            perplexity, took = summarize_scores(rows)["answer"] or math.nan, time.monotonic() - began
            say(f"{name}: answer perplexity {perplexity:.2f} on {len(texts):,} rows, all questions asked; {took:.0f} s")
        return kept

    def mean_nll(rows):
        """Of what the training loss sees: whole rows, or answers."""
        nll, tokens = np.sum(rows, axis=0)[[0, 1] if cfg.TRAIN_ON_PROMPT else [2, 3]]
        return float(nll / tokens)

    before = measure(model, "before")

    # LoRA fine-tuning
    if not on_first(adapter.exists):
        labels = [ids if cfg.TRAIN_ON_PROMPT else [-100] * first + ids[first:] for ids, first, _ in encoded]
        tokens = datasets.Dataset.from_dict({"input_ids": [ids for ids, _, _ in encoded], "labels": labels})
        sft_config = SFTConfig(
            output_dir=str(checkpoints),
            seed=cfg.SEED,
            data_seed=cfg.SEED,
            max_length=cfg.MAX_LENGTH,
            num_train_epochs=cfg.NUM_EPOCHS,
            max_steps=cfg.MAX_STEPS,
            per_device_train_batch_size=cfg.BATCH_SIZE,
            gradient_accumulation_steps=cfg.GRADIENT_ACCUMULATION_STEPS,
            learning_rate=cfg.LEARNING_RATE,
            lr_scheduler_type="linear",
            warmup_steps=cfg.WARMUP_RATIO,  # below 1: a share of all steps
            max_grad_norm=cfg.MAX_GRAD_NORM,
            logging_steps=cfg.LOGGING_STEPS,
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=cfg.EVAL_STEPS,
            save_strategy="steps",
            save_steps=cfg.EVAL_STEPS,
            save_total_limit=2,
            report_to=cfg.REPORT_TO,
            run_name=run.name,
            include_num_input_tokens_seen="non_padding",
            use_cpu=device == "cpu",
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            gradient_checkpointing=needs_checkpointing(model, cfg.BATCH_SIZE, cfg.MAX_LENGTH),
            pad_to_multiple_of=math.gcd(SHAPE_STEP, cfg.MAX_LENGTH),
            dataloader_pin_memory=device == "cuda",
            ddp_find_unused_parameters=False,
        )

        trainer = LoRATrainer(
            model=model,
            args=sft_config,
            train_dataset=tokens,
            processing_class=tokenizer,
            peft_config=lora,
            eval_dataset=tokens.select([0]),  # a stand-in: it validates on `texts`
            validate=lambda model: mean_nll(score_rows(model, tokenizer, texts, **scoring)),
        )
        trainer.train(resume_from_checkpoint=on_first(lambda: newest_checkpoint(checkpoints)))
        if rank == 0:
            state, seconds, left_out = trainer.state, trainer.clock.seconds, ("seconds", "num_input_tokens_seen")
            history = [
                {k: v for k, v in entry.items() if k not in left_out and math.isfinite(v)}  # fp16 may scale to infinity
                for entry in state.log_history
            ]
            summary = {
                "steps": state.global_step,
                "tokens": state.num_input_tokens_seen,
                "seconds": seconds,
                "tokens_per_second": state.num_input_tokens_seen / seconds,
                "trainable_parameters": trainable,
                "total_parameters": total,
                "log_history": history,
            }
            write_json(checkpoints / "training.json", summary)
            # rather than a folder in the Hub's cache
            base_name = cfg.MODEL_NAME if commit else str(model_path.resolve())
            trainer.model.peft_config["default"].base_model_name_or_path = base_name
            save_folder(
                adapter,
                lambda folder: trainer.model.save_pretrained(folder, save_embedding_layers=False),
                tokenizer.save_pretrained,
            )
        on_first(lambda: None)  # the others wait
        del trainer

    # the same two measurements, of the adapter as it was saved
    del model
    gc.collect()
    model = PeftModel.from_pretrained(load_model(model_path), str(adapter)).to(device)
    after = measure(model, "after")
    if rank > 0:
        return run

    # results, report, plots and model card
    training = json.loads((checkpoints / "training.json").read_text(encoding="utf-8"))
    history = training["log_history"]
    history.insert(0, {"step": 0, "epoch": 0.0, "eval_loss": mean_nll(before["rows"])})
    history.append({"step": training["steps"], "epoch": history[-1]["epoch"], "eval_loss": mean_nll(after["rows"])})
    answers, own = [], {}
    for topic, one, two in zip(articles, before["articles"], after["articles"], strict=True):
        if one[3]:  # tokens of its answer
            perplexity = {"perplexity_before": math.exp(one[2] / one[3]), "perplexity_after": math.exp(two[2] / two[3])}
            own[topic] = {"split": articles[topic][0], **perplexity}
    for i, (topic, question) in enumerate(cfg.QUESTIONS.items()):
        (one, one_ended), (two, two_ended) = before["answers"][i], after["answers"][i]
        answers.append(
            {
                "topic": topic,
                "question": question,
                "prompt": prompts[i],
                "before": one,
                "after": two,
                "before_stats": answer_stats(one, finished=one_ended),
                "after_stats": answer_stats(two, finished=two_ended),
                "reference": own.get(topic),
            }
        )
    packages = ("torch", "transformers", "datasets", "peft", "trl", "accelerate")
    rows_before, rows_after = np.array(before["rows"]), np.array(after["rows"])
    results = {
        "model": cfg.MODEL_NAME,
        "model_revision": commit,
        "dataset": cfg.DATASET_NAME,
        "dataset_revision": data_commit,
        "offline_fallback": fallback,
        "settings": {name: getattr(cfg, name) for name in SETTINGS},
        "versions": {"python": platform.python_version()} | {x: importlib.metadata.version(x) for x in packages},
        "hardware": {
            "name": hardware_name,
            "device": device,
            "precision": precision,
            "processes": processes,
            "threads": torch.get_num_threads(),
        },
        "data": counts,
        "perplexity": {
            "before": summarize_scores(rows_before),
            "after": summarize_scores(rows_after),
            "change": paired_change(rows_before, rows_after),
        },
        "training": training,
        "answers": answers,
    }
    if not (run / "results.json").exists():
        write_json(run / "results.json", results)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    scores, title = results["perplexity"], f"{short_name(cfg.MODEL_NAME)} on {short_name(cfg.DATASET_NAME)}"
    title += " (offline default)" * fallback
    loss_on = "all tokens" if cfg.TRAIN_ON_PROMPT else "the answers only"
    history = results["training"]["log_history"]
    plot_training_loss(history, run / "training_loss.png", title=f"LoRA fine-tuning of {title}", loss_on=loss_on)
    plot = run / "perplexity_comparison.png"
    plot_perplexity(scores["before"], scores["after"], plot, title=f"{len(texts):,} held-out rows: {title}")
    write_model_card(results, adapter / "README.md")
    write_report(results, run / "report.md")
    if cfg.SAVE_MERGED and not (run / "merged").exists():
        ids = torch.arange(8, device=device)[None]
        with torch.no_grad():
            logits, merged = model(input_ids=ids).logits, model.merge_and_unload()
            same = torch.allclose(merged(input_ids=ids).logits, logits, rtol=1e-3, atol=1e-3)
        assert same, "merging the adapter changed the logits"
        save_folder(run / "merged", merged.save_pretrained, tokenizer.save_pretrained)

    say(f"\n{'perplexity, held-out rows':26}{'before':>10}{'after':>10}{'change':>10}")
    for label, key in (("answers only", "answer"), ("full text", "full_text"), ("reference protocol", "seed_protocol")):
        old, new = (scores[when][key] or math.nan for when in ("before", "after"))
        say(f"{label:26}{old:10.2f}{new:10.2f}{new / old - 1:+10.1%}")
    say(f"\nwrote {run}/: {', '.join(names[:-1])}, adapter/{', merged/' * cfg.SAVE_MERGED}")
    lock.release()
    return run


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # the latter is how Slurm and spot machines end a job
        signal.signal(number, signal.default_int_handler)
    main()
