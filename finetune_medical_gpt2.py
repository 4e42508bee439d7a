"""Fine-tune GPT-2 on medical text with LoRA, and measure honestly what that changed.

    python finetune_medical_gpt2.py --demo                  # a tiny model and data from tests/: minutes
    python finetune_medical_gpt2.py                         # GPT-2; settings: the constants below
    torchrun --nproc_per_node=N finetune_medical_gpt2.py    # several processes: data parallel

Start reading at `main`, at the end of the file. It measures the base model, fine-tunes it with LoRA through TRL's
SFTTrainer, measures the saved adapter with the same functions, asks both models the same questions, and writes
OUTPUT_DIR/<run>/: report.md, results.json, two plots and adapter/. Killed, it resumes with the same command. If the
Hugging Face Hub can't be reached and the model or the data set isn't cached, it runs the demo instead, and says so.

Measured on 2 cores of an AMD EPYC without bf16 instructions, torch 2.13: GPT-2 124M (random weights) trains at 144
tokens/s in 2.2 GiB (tests/benchmark.py); the demo takes a tiny model's answer perplexity from 46.26 to 19.41 in four
minutes. The script redoes github.com/rafael-caetano/GPT2_Medical_Language_Fine_Tuning, "the reference" below. None of
what the models write is medical advice.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import gzip
import hashlib
import html
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import unicodedata
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # exit quietly on Ctrl-C during the slow imports
    # OpenMP reads these when torch is imported: idle threads spin briefly, then sleep, and slow nobody down.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if "IPython" not in sys.modules:  # no notebook, but one may have started this, with a backend that is missing here
    os.environ.pop("MPLBACKEND", None)

import datasets
import filelock
import huggingface_hub
import jinja2
import matplotlib.style
import numpy as np
import pandas
import safetensors.torch
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.integrations import get_available_reporting_integrations
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.pytorch_utils import Conv1D
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import pad

# Model and data
MODEL_NAME = "gpt2"  # any causal LM: Hub id or local folder (safetensors)
MODEL_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"  # its commit on the Hub; None: the newest, or local
DATASET_NAME = "aboonaji/wiki_medical_terms_llam2_format"  # Hub id, or .jsonl, .json, .csv, .parquet
DATASET_REVISION = None  # None: the newest; results.json says which that was
TEST_SIZE = 0.1  # share of the rows that is held out, drawn at random
MAX_LENGTH = 512  # tokens; longer rows are cut
SEED = 42  # of the split, the adapter's first weights, the order of the rows, dropout and answers
DROP_EMPTY_ANSWERS = True  # False: keep rows without an article, as the reference did
OFFLINE_FALLBACK = True  # if the Hub can't be reached: True runs the demo, False stops

# LoRA
LORA_R = 8  # rank of the two thin matrices whose product is added to each target layer's weight
LORA_ALPHA = 32  # that product is scaled by alpha / r
LORA_DROPOUT = 0.1  # on the adapter's inputs, in training
LORA_TARGET_MODULES = None  # None: PEFT's choice (GPT-2: c_attn); or a list, or "all-linear"

# Training
NUM_EPOCHS = 1  # times that every training row is seen
MAX_STEPS = -1  # optimizer steps; -1: NUM_EPOCHS decides
LEARNING_RATE = 1e-4  # the reference's; README says what higher ones do
BATCH_SIZE = 4  # rows per process and forward pass; on a CPU a large model takes one at a time, with as many a step
GRADIENT_ACCUMULATION_STEPS = 4  # rows of an optimizer step: BATCH_SIZE x this x processes
WARMUP_RATIO = 0.03  # share of the steps in which the learning rate rises; then it falls to 0
MAX_GRAD_NORM = 0.3  # gradients with a larger norm are clipped to it; 0: no clipping
LOGGING_STEPS = 10  # every so many steps: a line with the training loss, and a checkpoint
EVAL_STEPS = 100  # every so many steps: validation on all held-out rows
TRAIN_ON_PROMPT = True  # False: the loss sees the answers only
BASE_DROPOUT = 0.0  # the base model's own dropouts; None: as its config says (GPT-2: 0.1, slower)
GRADIENT_CHECKPOINTING = False  # True: less memory, a third more time

# Questions; a finished run can answer new ones without training again
QUESTIONS = {
    "Paracetamol poisoning": "What are the symptoms and treatment for paracetamol poisoning?",
    "Congenital adrenal hyperplasia": "Explain the causes and symptoms of Congenital adrenal hyperplasia.",
    "Anthrax": "Describe the transmission, symptoms, and treatment of Anthrax.",
    "Cachexia": "What is Cachexia, and how does it affect the body?",
    "Botulism": "Explain the causes, symptoms, and treatment of Botulism.",
}
MAX_NEW_TOKENS = 250  # tokens of an answer at most
TEMPERATURE = 0.7  # below 1, likely tokens become likelier; 0: always the likeliest token

# Output
OUTPUT_DIR = "outputs"  # each run gets a folder of its own in it
REPORT_TO = "none"  # or an installed tracker, such as "tensorboard", "trackio", "wandb"

# All constants above. A new number needs a rule in RULES; what doesn't change the training goes into NOT_TRAINED.
SETTINGS = [name for name in list(globals()) if name.isupper()]

DEMO_SETTINGS = {  # what --demo, and the fallback if the Hub is unreachable, override
    "MODEL_NAME": "tests/tiny_gpt2",
    "MODEL_REVISION": None,
    "DATASET_NAME": "tests/medical_terms.jsonl",
    "DATASET_REVISION": None,
    "MAX_LENGTH": 512,  # the tiny model takes 1,024 tokens at most
    "LORA_TARGET_MODULES": "all-linear",
    "LORA_DROPOUT": 0.0,  # drawing its random numbers would take half of the time
    "NUM_EPOCHS": 1,
    "MAX_STEPS": -1,
    "LEARNING_RATE": 3e-3,  # three times what README advises, as there are only 57 steps
    "BATCH_SIZE": 6,
    "GRADIENT_ACCUMULATION_STEPS": 1,
    "EVAL_STEPS": 19,
    "TRAIN_ON_PROMPT": False,
    "MAX_NEW_TOKENS": 250,
}
HERE = Path(__file__).resolve().parent  # where tests/ is, whatever the current folder

# A row is the prompt (it ends with ANSWER_MARK), the answer and END_MARK. Rows in a column `text` must already look
# like that: if you edit PROMPT, edit them, too.
ANSWER_MARK = "[/INST]"
END_MARK = "</s>"
PROMPT = (
    "<s> [INST] <<SYS>> You are a helpful, respectful, and honest assistant. Always answer as "
    "helpfully as possible, while being safe. Your answers should not include any harmful, "
    "unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your "
    "responses are socially unbiased and positive in nature. If a question does not make any sense "
    "or is not factually coherent, explain why instead of answering something not correct. If you "
    "don't know the answer to a question, please don't share false information. <</SYS>> {question} "
    "[/INST]"
)


class InputError(ValueError):
    """Something that the user can fix; ends the program with one line and exit code 2."""


# --- Screen, files and processes --------------------------------------------------------------------------------------


def on_first(function):
    """Run `function` on the main process only; return its result, or raise its error, on all processes."""
    result = error = None
    if PartialState().is_main_process:
        try:
            result = function()
        except Exception as raised:
            error = raised
    # Errors are broadcast too, or the other processes would wait for hours. What can't be pickled is described.
    can_travel = isinstance(error, InputError | ConnectionError | torch.OutOfMemoryError | None)
    result, sent = broadcast_object_list([result, error if can_travel else RuntimeError(repr(error))])
    if error:
        raise error  # here with its traceback
    if sent:
        raise sent
    return result


def say(message):
    """Print a line, on the main process only, without breaking a progress bar."""
    if PartialState().is_main_process:
        with tqdm.external_write_mode():
            print(message, flush=True)


def progress_bar(items=None, **options):
    """A tqdm bar on the main process, if its output is a terminal."""
    hidden = None if PartialState().is_main_process else True  # None: tqdm hides it if there is no terminal
    return tqdm(items, leave=False, dynamic_ncols=True, disable=hidden, **options)


def reason(error):
    """The first line of an error's innermost cause: libraries wrap the reason in general words."""
    cause = error
    while cause is not None:
        error = cause
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def write_text(path, text):
    """Write a file that appears whole or not at all, even if the program is killed."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def load_json(path):
    """The content of a JSON file; None if it does not exist, or was torn by a power cut."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


class Progress:
    """What a run has done so far, in one JSON file. A stage is done again only if what it depends on has changed.

    Makes the run's folder, and keeps other processes out of it. Raises InputError if another one is using it, or if
    the run is finished but the files that new questions need are gone.
    """

    def __init__(self, run):
        self.path = run / "checkpoints/progress.json"
        self.stages = on_first(lambda: self.open(run))

    def open(self, run):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(self.path.with_name(".lock"), is_singleton=True)  # held until the end
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise InputError(f"another process is using {run}: wait for it to finish") from error
        stages = load_json(self.path) or {}
        # without a saved adapter, everything after the baseline is done again
        if not (run / "adapter/adapter_model.safetensors").exists():
            stages = {"before": stages.get("before", {})}
        if load_json(run / "results.json") and "training" not in stages:
            raise InputError(f"{run} is finished, but its checkpoints/ or adapter/ is gone: move it away to retrain")
        return stages

    def stage(self, name, make, **depends_on):
        """Return make(), or its earlier result if `depends_on` is unchanged. All processes must call this."""
        if self.stages.get(name, {}).get("depends_on") != depends_on:
            began = time.monotonic()
            result = make()
            seconds = round(time.monotonic() - began, 1)
            say(f"{name}: done in {tqdm.format_interval(seconds)}")
            self.stages[name] = {"depends_on": depends_on, "seconds": seconds, "result": result}
            on_first(lambda: write_json(self.path, self.stages))
        return self.stages[name]["result"]


# --- Model and data: from this disk, from the Hub, or from the Hub's cache --------------------------------------------

DATA_FILE = re.compile(r"\.(parquet|(jsonl|json|csv)(\.gz)?)$")
HUB_ID = re.compile(r"(?!.*(--|\.\.))[\w-][\w.-]*(/[\w.-]+)?")  # `gpt2`, or `owner/name`


def short_name(name):
    """The last part of a Hub id or a path, without a data file's ending."""
    return DATA_FILE.sub("", Path(name).absolute().name)


def fetch(kind, name, revision=None):
    """Where a "model" or "dataset" is on this disk, and its commit -> (Path, commit or None if local).

    Raises InputError if the Hub has no such thing, ConnectionError if it can't be reached and its cache lacks it.
    """
    constant = kind.upper()
    path = Path(name).expanduser().absolute()
    # A folder that merely has a Hub id's name is not a model: a config.json must be in it.
    is_there = path.exists() if kind == "dataset" else (path / "config.json").is_file()
    if is_there or DATA_FILE.search(name) or not HUB_ID.fullmatch(name):
        if revision:
            raise InputError(f"{constant}_NAME: {path} is local, so set {constant}_REVISION = None, or move it away")
        if kind == "dataset" and path.is_dir():
            raise InputError(f"DATASET_NAME: {path} is a folder: name the file in it")
        return path, None

    hub = {"repo_id": name, "revision": revision, "repo_type": kind}
    unreachable = None
    try:
        # Ask once, with a timeout: a download retries for long if the Hub doesn't answer.
        huggingface_hub.HfApi().repo_info(**hub, timeout=5)
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
            raise InputError(
                f"{constant}_NAME: the Hub has no {kind} {name!r} of {constant}_REVISION = {revision!r} (None: the "
                "newest), or you have no access to it (`hf auth login`)"
            ) from error
        unreachable = f"{type(error).__name__}: {reason(error)}"
        hub["local_files_only"] = True
    if kind == "model":  # its repository often holds the same weights in several formats
        hub |= {"allow_patterns": ["*.json", "*.safetensors", "*.txt"], "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        # by the user's revision, not by the commit: without the Hub the cache knows which commit it stood for
        folder = Path(huggingface_hub.snapshot_download(**hub))
    except Exception as error:
        if unreachable:
            raise ConnectionError(f"the Hub can't be reached ({unreachable}) and {name} is not in the cache") from error
        raise InputError(
            f"{name}: download failed ({reason(error)}); run the same command again, or `hf auth login` if it is gated"
        ) from error
    return folder, folder.name  # the folder is named after the commit


def load_tokenizer(folder):
    """The tokenizer in a model's folder, with a padding token. Raises InputError if it won't do."""
    try:
        # GPT-2's files name no EOS, but its tokenizer class does
        eos = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).eos_token
        if eos is None:
            raise ValueError("it names no end-of-sequence token")
        # AutoTokenizer builds some tokenizers anew from their vocabulary; this one takes tokenizer.json as it is.
        # EOS can serve as padding: padding has the label -100, which no loss counts.
        return PreTrainedTokenizerFast.from_pretrained(folder, eos_token=eos, pad_token=eos)
    except Exception as error:
        raise InputError(f"MODEL_NAME: {folder} has no usable tokenizer.json: {reason(error)}") from error


def load_model(folder, device="cpu", precision="fp32", *, dropout=None):
    """A frozen causal LM from safetensors, without remote code, made fast for its device.

    `dropout` replaces all dropouts at the top level of the model's config. Raises InputError.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError(f"MODEL_NAME: {folder} also holds an adapter, which would be loaded too: merge or move it")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for key, value in config.to_dict().items():
            if dropout is not None and re.search("dropout|pdrop$", key) and isinstance(value, float):
                setattr(config, key, dropout)
            if value == "gelu_new":
                setattr(config, key, "gelu_pytorch_tanh")  # the same function, in one kernel
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            # Answers follow the constants alone, not the penalties, beams and lengths of generation_config.json.
            generation_config=GenerationConfig(),
            dtype=torch.float32,  # whatever the folder was saved in; speed_up rounds to bf16 where that pays
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise InputError(f"MODEL_NAME: {folder} can't be loaded: {reason(error)}") from error
    missing = loaded["missing_keys"]  # transformers makes them up at random, and only warns
    if missing:
        raise InputError(f"MODEL_NAME: {folder} lacks {len(missing)} of the model's weights, such as {min(missing)}")
    model.loss_type = "ForCausalLM"  # so that the Trainer counts no first token, which nothing predicts
    model.size = model.num_parameters()  # before speed_up unties the head
    return speed_up(model.requires_grad_(False).to(device), precision)


def read_table(path):
    """The rows of a data file (also .gz) as a DataFrame."""
    # Not by `datasets`: it takes the path as a glob pattern, guesses types, and may answer from an outdated cache.
    name = path.name.removesuffix(".gz")
    if not DATA_FILE.search(path.name):
        raise InputError("it is not a .jsonl, .json, .csv or .parquet file")
    if name.endswith(".parquet"):
        return pandas.read_parquet(path).reset_index()  # keep the pandas index as a column
    if name.endswith(".csv"):
        # Fields beyond the header would be dropped: an article without quotes would end at its first comma.
        with warnings.catch_warnings(action="error", category=pandas.errors.ParserWarning):
            # as text: an article that reads "NA" or "007" is neither missing nor a number
            return pandas.read_csv(path, dtype=object, keep_default_na=False, index_col=False)
    content = path.read_bytes() if name == path.name else gzip.decompress(path.read_bytes())
    if name.endswith(".json"):
        return pandas.DataFrame(json.loads(content), dtype=object)
    rows = []
    for number, line in enumerate(content.decode(json.detect_encoding(content)).split("\n"), start=1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"line {number} is not valid JSON ({error.msg}): fix or remove it") from None
    return pandas.DataFrame(rows, dtype=object)


def read_texts(path):
    """The rows of a data file, or of a Hub data set's folder, in the form of PROMPT. Raises InputError."""
    try:
        table = datasets.load_dataset(str(path), split="train").to_pandas() if path.is_dir() else read_table(path)
    except Exception as error:
        raise InputError(f"DATASET_NAME: {path} can't be read: {reason(error)}") from error
    for pair in (["question", "answer"], ["prompt", "completion"]):
        if set(pair) <= set(table):
            texts = []
            for question, answer in table[pair].to_numpy():
                are_texts = isinstance(question, str) and isinstance(answer, str)
                row = f"{format_prompt(question.strip())} {answer.strip()} {END_MARK}" if are_texts else None
                texts.append(row)  # split_texts counts None as malformed
            return texts
    if "text" in table:
        return table["text"].tolist()
    raise InputError(
        f"DATASET_NAME: {path} needs columns `question` and `answer`, or `text`; "
        f"it has {', '.join(map(str, table))[:200] or 'none'}"
    )


def format_prompt(question):
    """PROMPT with a question: how the model is asked, and the form that the data's own rows have."""
    return PROMPT.replace("{question}", question)


def load_splits(source, revision=None, *, test_size, seed, drop_empty=True):
    """Read, clean, shuffle and split a data set -> (train, test, stats).

    `source` is a Hub id or a local .jsonl, .json, .csv or .parquet file (also .gz); train and test are datasets with a
    column `text`; stats are the counts of rows. Raises InputError, and ConnectionError as `fetch` does.
    """
    path, _ = fetch("dataset", str(source), revision)
    return split_texts(read_texts(path), test_size, seed, drop_empty)


def split_texts(texts, test_size, seed, drop_empty):
    """Clean, shuffle and split texts -> (train, test, stats), as `load_splits` returns them."""
    # exactly one question and answer; no half of a surrogate pair, which JSON allows but tokenizers reject
    sound = [
        text
        for text in texts
        if isinstance(text, str) and text.count(ANSWER_MARK) == 1 and not re.search("[\ud800-\udfff]", text)
    ]
    # Duplicates, but for spaces and Unicode form, are dropped before the split, so that no row is on both sides.
    unique = {}  # a dict keeps the order; a set would change the split from run to run
    for text in sound:
        unique.setdefault(" ".join(unicodedata.normalize("NFC", text).split()), text)
    rows = list(unique.values())
    if drop_empty:
        rows = [text for text in rows if text.split(ANSWER_MARK)[1].replace(END_MARK, "").strip()]
    stats = {
        "rows": len(texts),
        "dropped_malformed": len(texts) - len(sound),
        "dropped_duplicate": len(sound) - len(unique),
        "dropped_empty": len(unique) - len(rows),
    }
    if math.ceil(len(rows) * test_size) >= len(rows):
        raise InputError(
            f"DATASET_NAME: too few rows to split at TEST_SIZE = {test_size}: {stats} "
            f"(malformed: not a text with exactly one {ANSWER_MARK})"
        )
    data = datasets.Dataset.from_dict({"text": rows})
    train, test = data.train_test_split(test_size=test_size, seed=seed).values()
    return train, test, stats | {"train_rows": len(train), "test_rows": len(test)}


class Row(NamedTuple):
    """A text as a model sees it."""

    ids: list  # of the tokens
    answer_start: int  # index of the answer's first token; len(ids) if there is none
    answer_bytes: int  # UTF-8 length of the part of the answer that the ids cover


def leading_ids(tokenizer):
    """The ids that a tokenizer puts in front of every text: BOS for Llama, nothing for GPT-2."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    return encoded["input_ids"][: encoded["special_tokens_mask"].index(0)]


def encode(tokenizer, texts, max_length=None, end=False):
    """Texts as Rows of at most `max_length` tokens; with `end`, EOS follows a text that isn't cut.

    A tokenizer's leading tokens come first, once. The tokenizer itself adds nothing else, and neither cuts nor pads.
    """
    if not texts:
        return []
    start = leading_ids(tokenizer)
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    rows = []
    for text, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True):
        if ids[: len(start)] != start:
            ids = start + ids
            offsets = [(0, 0)] * len(start) + offsets
        # only in training: EOS teaches the model to stop, and is no part of held-out text
        if end and ids[-1:] != [tokenizer.eos_token_id]:
            ids += [tokenizer.eos_token_id]
        ids, offsets = ids[:max_length], offsets[:max_length]

        # offsets and `begin` count characters; without a mark the answer begins at the text's end
        prompt, mark, _ = text.partition(ANSWER_MARK)
        begin = len(prompt) + len(mark)
        # the answer's tokens are those that start at or after the end of [/INST]
        answer_start = sum(low < begin for low, _ in offsets)
        covered = offsets[-1][1] if offsets else 0
        rows.append(Row(ids, answer_start, len(text[begin:covered].encode())))
    return rows


# --- Scoring ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def inference(model):
    """In this block the model is in evaluation mode, without gradients; under autocast if it is in bf16."""
    was_training = model.training
    model.eval()
    # a model in fp32 stays in it: autocast would round what is to be measured
    with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=is_rounded(model)):
        yield
    model.train(was_training)


def score_rows(model, tokenizer, texts, *, max_length, batch_size=8, shown=None):
    """Score every text once, shared out over the processes -> DataFrame with a line for each text.

    Columns: row (index in `texts`); nll (nats) and tokens (predicted) of the whole row; answer_nll, answer_tokens and
    answer_bytes (UTF-8) of its answer. `shown`: a Row put in front of each text, as part of its prompt. Raises
    InputError if a loss is not finite.
    """
    rows = encode(tokenizer, texts, max_length)
    if shown:
        rows = [Row(shown.ids + row.ids, len(shown.ids) + row.answer_start, row.answer_bytes) for row in rows]
        max_length += len(shown.ids)

    # Rows of similar length share a batch, for little padding. The longest come first: if memory is too small, the
    # first batch tells.
    longest_first = sorted(enumerate(rows), key=lambda item: -len(item[1].ids))
    mine = longest_first[PartialState().process_index :: PartialState().num_processes]
    lines = []
    with inference(model):
        for start in progress_bar(range(0, len(mine), batch_size), desc="scoring"):
            batch = mine[start : start + batch_size]
            # -100 is padding: the model sees a 0 there, under the mask, and its loss is 0
            tensors = [torch.tensor(row.ids or [-100]) for _, row in batch]
            ids = pad(tensors, -100, pad_to_multiple_of=pad_multiple(model, max_length)).to(model.device)
            logits = model(input_ids=ids.clamp(min=0), attention_mask=ids >= 0, use_cache=False).logits
            for (i, row), row_logits, row_ids in zip(batch, logits, ids, strict=True):
                # losses[t] is that of token t + 1: nothing predicts the first
                losses = cross_entropy(row_logits[:-1].float(), row_ids[1:], reduction="none").cpu().double()
                whole_row = [losses.sum().item(), len(row.ids[1:])]
                first = max(row.answer_start, 1)
                answer = [losses[first - 1 :].sum().item(), len(row.ids[first:]), row.answer_bytes]
                lines.append([i, *whole_row, *answer])
            del logits, row_logits  # or they would still take memory in the next forward pass

    columns = ["row", "nll", "tokens", "answer_nll", "answer_tokens", "answer_bytes"]
    scores = pandas.DataFrame(sorted(gather_object(lines)), columns=columns, dtype=float)
    # checked after all processes have scored their rows, so that all of them stop
    for i, nll in enumerate(scores.nll):
        if not math.isfinite(nll):
            raise InputError(
                f"the model's loss on row {i} is not finite (weights? LEARNING_RATE?): ...{texts[i][-50:]!r}"
            )
    return scores


def bootstrap_ci95(sums, counts):
    """Bootstrap over rows: the 95 % interval of sum(sums) / sum(counts), which have an element for each row."""
    n = len(sums)
    # (1000, n): how often each row is drawn; with a fixed seed, so that the same scores give the same interval
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)
    return np.percentile((weights @ sums) / (weights @ counts), (2.5, 97.5)).tolist()


def summarize_scores(scores):
    """The perplexities in what `score_rows` returns: sum the NLL, count the tokens, divide once.

    The answer figures are None if no answer was scored.
    """
    total = scores.sum()
    first_rows = scores.head(100)  # as many as the reference scored
    summary = {
        "answer": None,
        "answer_ci95": None,
        "full_text": math.exp(total.nll / total.tokens),
        "reference_protocol": math.exp((first_rows.nll / first_rows.tokens).mean()),  # of the rows' means
        "bits_per_byte": None,
        "tokens": int(total.tokens),
        "answer_tokens": int(total.answer_tokens),
    }
    if total.answer_tokens:
        # a row's loss and its number of tokens are drawn together
        answered = scores[scores.answer_tokens > 0]
        summary["answer"] = math.exp(total.answer_nll / total.answer_tokens)
        summary["answer_ci95"] = np.exp(bootstrap_ci95(answered.answer_nll, answered.answer_tokens)).tolist()
        summary["bits_per_byte"] = total.answer_nll / math.log(2) / total.answer_bytes
    return summary


def evaluate_perplexity(model, tokenizer, texts, *, max_length, batch_size=8):
    """Perplexities of `texts` under a causal LM, plain or PEFT, each cut at `max_length` tokens.

    Returns answer (tokens after [/INST]), answer_ci95, full_text, reference_protocol, bits_per_byte, tokens,
    answer_tokens. Raises InputError if a loss is not finite.
    """
    return summarize_scores(score_rows(model, tokenizer, list(texts), max_length=max_length, batch_size=batch_size))


def mean_losses(perplexity, on_prompt):
    """Mean losses for the log, in nats per token; eval_loss covers what the training loss covers."""
    answer = math.log(perplexity["answer"])
    if on_prompt:
        return {"eval_loss": math.log(perplexity["full_text"]), "eval_answer_loss": answer}
    return {"eval_loss": answer}


# --- What is measured before and after: articles, everyday text, facts ------------------------------------------------

FACTS = HERE / "tests/medical_facts.jsonl"
EVERYDAY = HERE / "tests/everyday.jsonl"
SAMPLE_ROWS = 100  # training rows that are scored, and held-out rows that are scored after a training row


def read_lines(path):
    """The values in a file of JSON lines; [] if the script was copied without it."""
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def score_facts(model, tokenizer, facts):
    """For each fact, whether its right ending is the likeliest of the four -> list of bool."""
    # the four rows of a fact share their beginning, so their NLL differs by the endings alone
    rows = [f"{fact['begins']} {ending}." for fact in facts for ending in (*fact["wrong"], fact["right"])]
    nll = score_rows(model, tokenizer, rows, max_length=512, batch_size=32).nll.to_numpy().reshape(-1, 4)
    return (nll.argmin(axis=1) == 3).tolist()  # the right ending is the last, so a tie is no right answer


def measure(model, tokenizer, cfg, train, held_out, encoded=()):
    """All that is measured before and after alike -> a dict that JSON can hold, for `compare`.

    `encoded`, the training rows: if given, the held-out rows are scored once more, with one of them shown first.
    """
    score = functools.partial(score_rows, model, tokenizer, max_length=cfg.MAX_LENGTH, batch_size=cfg.BATCH_SIZE)
    scores = score(held_out)
    perplexity = summarize_scores(scores)
    say(f"answer perplexity {perplexity['answer']:.2f} on {len(held_out):,} held-out rows")
    everyday = [line["article"] for line in read_lines(EVERYDAY)]
    measured = {
        "perplexity": perplexity,
        "nll": scores.nll.sum(),
        "answer_nll": scores.answer_nll.sum(),
        "trained": summarize_scores(score(train[:SAMPLE_ROWS]))["answer"],
        "everyday": summarize_scores(score(everyday))["full_text"] if everyday else None,
        "facts": score_facts(model, tokenizer, read_lines(FACTS)),
        "shown_one_row": None,
    }
    room = context_length(model) - cfg.MAX_LENGTH
    shown = next((row for row in encoded if len(row.ids) <= room), None)
    if shown:
        # an estimate: the mean loss of all rows is taken to change as much as that of the first SAMPLE_ROWS
        alone = scores.head(SAMPLE_ROWS).sum()
        change = score(held_out[:SAMPLE_ROWS], shown=shown).answer_nll.sum() - alone.answer_nll
        measured["shown_one_row"] = perplexity["answer"] * math.exp(change / alone.answer_tokens)
    return measured


def compare(before, after):
    """What results.json holds as "perplexity" and "facts", from what `measure` returned before and after."""

    def both(name):
        return {"before": before[name], "after": after[name]} if before[name] else None

    fall, answer_fall = before["nll"] - after["nll"], before["answer_nll"] - after["answer_nll"]
    perplexity = both("perplexity") | {
        "shown_one_row": before["shown_one_row"],
        "trained": both("trained"),
        "everyday": both("everyday"),
        "prompt_share": 1 - answer_fall / fall if fall > 0 else None,  # of the fall in loss
    }
    facts = None
    if before["facts"]:
        change = np.subtract(after["facts"], before["facts"], dtype=float)  # 1: newly right, -1: newly wrong
        facts = {
            "count": len(change),
            "before": np.mean(before["facts"]),
            "after": np.mean(after["facts"]),
            "change": change.mean(),
            "change_ci95": bootstrap_ci95(change, np.ones_like(change)),
        }
    return {"perplexity": perplexity, "facts": facts}


# --- Answers ----------------------------------------------------------------------------------------------------------


def generate_answers(model, tokenizer, questions, *, max_new_tokens, temperature, seed):
    """A model's answer to each question -> list of str, without the prompts.

    An answer is what follows the prompt, up to the first </s> or EOS. Each is sampled from the 50 likeliest tokens at
    `temperature` (0: greedy), with the same `seed`.
    """
    answers = []
    for question in progress_bar(questions, desc="asking"):
        (prompt,) = encode(tokenizer, [format_prompt(question)])
        transformers.set_seed(seed)  # the same draws before and after: what differs is the model
        with inference(model):
            output = model.generate(
                torch.tensor([prompt.ids], device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=float(temperature) or None,  # greedy decoding takes none
                top_k=50,
                eos_token_id=tokenizer.eos_token_id,
                stop_strings=[END_MARK],  # in GPT-2's vocabulary it is not one token
                tokenizer=tokenizer,
            )
        text = tokenizer.decode(output[0, len(prompt.ids) :], skip_special_tokens=True)
        answers.append(text.split(END_MARK)[0].strip())
    return answers


def answer_stats(text):
    """Counts of words, sentences, unique words and distinct bigrams, case ignored; whether it ends like a sentence."""
    words = re.findall(r"\w+(?:['’-]\w+)*", text.lower())
    sentences = [part for part in re.split(r"[.!?]+(?=\s|$)", text) if re.search(r"\w", part)]
    return {
        "words": len(words),
        "sentences": len(sentences),
        "unique_words": len(set(words)),
        "distinct_bigrams": len(set(itertools.pairwise(words))),
        "finished": re.search(r"[.!?…][\"'”’)\]*]*\s*$", text) is not None,
    }


def where_seen(topic, train, held_out):
    """Which rows have a question that names the topic: "trained on", "held out" or "not in the data"."""
    names_topic = re.compile(rf"(?<!\w){re.escape(topic)}(?!\w)", re.IGNORECASE).search
    system_prompt = PROMPT.split("{question}")[0]
    for seen, texts in (("trained on", train), ("held out", held_out)):
        if any(names_topic(text.removeprefix(system_prompt).split(ANSWER_MARK)[0]) for text in texts):
            return seen
    return "not in the data"


def ask_both(model, tokenizer, cfg, train, held_out):
    """results["answers"]: the questions, asked of a PEFT model without its adapter (before) and with it (after)."""
    ask = functools.partial(
        generate_answers,
        model,
        tokenizer,
        cfg.QUESTIONS.values(),
        max_new_tokens=cfg.MAX_NEW_TOKENS,
        temperature=cfg.TEMPERATURE,
        seed=cfg.SEED,
    )
    with model.disable_adapter():
        before = ask()
    after = ask()
    # the report's snippet adds no special tokens, so the prompt begins with BOS, once, if the tokenizer has one
    leading = tokenizer.decode(leading_ids(tokenizer))
    return [
        {
            "topic": topic,
            "question": question,
            "prompt": leading + format_prompt(question).removeprefix(leading),
            "seen": where_seen(topic, train, held_out),
            "before": old,
            "after": new,
            "before_stats": answer_stats(old),
            "after_stats": answer_stats(new),
        }
        for (topic, question), old, new in zip(cfg.QUESTIONS.items(), before, after, strict=True)
    ]


# --- Speed: skip it at a first reading; apart from rounding, nothing here changes what is computed --------------------

LARGE = 50e6  # with more parameters, a CPU trains one row at a time: it is fastest, and takes half the memory


def is_rounded(model):
    """Whether speed_up has rounded the model's matrices to bf16."""
    return model.get_output_embeddings().weight.dtype == torch.bfloat16


def pad_multiple(model, max_length):
    """Rows are padded to a multiple of this: few lengths, as in bf16 a CPU compiles a kernel for each.

    It divides `max_length`, which may be the model's whole context, so padding never goes beyond that.
    """
    return math.gcd(64 if is_rounded(model) else 8, max_length)


def speed_up(model, precision):
    """Make a frozen model fast on its device; with the precision "bf16", round its matrices.

    The rest stays in fp32; autocast works with both. GPT-2's logits lie near -100, where bf16 resolves only 0.5: its LM
    head is centred over the vocabulary first, which brings them near 0 and changes no probability.
    """
    # Without AMX, torch's fused attention takes twice the time of plain matrix products.
    if model.device.type == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16"):
        model.set_attn_implementation("eager")
    if precision != "bf16":
        return model

    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            weight = module.weight
            if model.config.model_type == "gpt2" and module is model.get_output_embeddings():
                weight = weight - weight.mean(0)
            # this unties a head; the embeddings are unchanged
            module.weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
    return model


def choose_hardware():
    """The device, precision and name of this machine, as a dict; on a CPU, threads and allocator are set, too.

    bf16 only where the hardware multiplies in it: emulated, it is slower than fp32. Old GPUs: fp16. Raises InputError.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if processes > gpus or processes == 1 < gpus:  # one for several: DataParallel, which SFTTrainer refuses
            raise InputError(
                f"{processes} process(es) for {gpus} GPU(s): use torchrun --nproc_per_node={gpus}, "
                "or fewer GPUs with CUDA_VISIBLE_DEVICES"
            )
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return {"device": "cuda", "precision": precision, "name": torch.cuda.get_device_name()}
    if torch.backends.mps.is_available():
        return {"device": "mps", "precision": "fp32", "name": "Apple GPU"}

    # Without this, half of a training step is page faults: make glibc keep freed memory, and take it in large pieces.
    if hasattr(ctypes.pythonapi, "mallopt"):
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # malloc.h: mmap_max, trim_threshold, top_pad
            ctypes.pythonapi.mallopt(option, value)
    if processes > 1:  # torchrun allows each process one thread
        torch.set_num_threads(max(1, os.cpu_count() // processes))
    cpu = torch.cpu.get_capabilities()
    precision = "bf16" if cpu.get("amx_bf16") or cpu.get("avx512_bf16") else "fp32"
    return {"device": "cpu", "precision": precision, "name": cpu.get("cpu_name") or platform.machine()}


# --- Training ---------------------------------------------------------------------------------------------------------


class StepLines(transformers.TrainerCallback):
    """A bar, and a line for each log entry; times the optimizer steps alone, without validation and saving."""

    def on_train_begin(self, args, state, control, **kwargs):
        # a resumed run goes on counting from its last entry
        self.seconds = state.log_history[-1]["seconds"] if state.log_history else 0.0
        self.bar = progress_bar(desc="training", total=state.max_steps, initial=state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.started
        self.bar.update()
        if state.global_step >= state.max_steps:
            # The adapter is saved and scored right after the last step. A checkpoint of that step would, when resumed
            # from, train one step too many.
            control.should_log = True
            control.should_evaluate = control.should_save = False

    def on_log(self, args, state, control, logs, **kwargs):
        state.log_history[-1]["seconds"] = self.seconds
        # logging comes before saving, so a loss of NaN ends the run before the next checkpoint
        if not math.isfinite(logs.get("loss", 0.0)):
            raise InputError(f"LEARNING_RATE: the training loss is not finite by step {state.global_step}; lower it")
        losses = [f"{name} {logs[name]:.3f}" for name in ("loss", "eval_loss", "eval_answer_loss") if name in logs]
        if losses:
            left = self.seconds / state.global_step * (state.max_steps - state.global_step)
            say(
                f"step {state.global_step:>4}/{state.max_steps}  {'  '.join(losses)}  "
                f"{state.num_input_tokens_seen / self.seconds:,.0f} tokens/s, {tqdm.format_interval(left)} left"
            )

    def on_save(self, args, state, control, **kwargs):
        # By step number; the Trainer's own rotation goes by file time. Two are kept, in case the newest is damaged.
        old = state.global_step - 2 * args.save_steps
        shutil.rmtree(f"{args.output_dir}/checkpoint-{old}", ignore_errors=True)


class LoRATrainer(SFTTrainer):
    """SFTTrainer that logs validate(), which fine_tune sets, and on a CPU takes the plain loss of the logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.args.use_cpu:
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        # TRL's loss, which saves memory on a GPU, is slow on a CPU
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        loss = ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch)
        return loss * self.accelerator.num_processes  # as DDP takes the mean

    def evaluate(self, *args, **kwargs):
        self.log(self.validate())
        self.control.should_evaluate = False  # or it would be done again at the end of the epoch


def is_whole(checkpoint):
    """Whether no file of a checkpoint is missing or cut off, as after a kill, a power cut or a broken copy."""
    archives = list(checkpoint.glob("*.pt*"))  # optimizer, scheduler, each process's random state; in fp16 the scaler
    try:
        safetensors.torch.load_file(checkpoint / "adapter_model.safetensors")
        # torch saves zip archives; testzip() names a damaged file in one
        damaged = [path for path in archives if zipfile.ZipFile(path).testzip()]
        json.loads((checkpoint / "trainer_state.json").read_text())  # the last file that the Trainer writes
    except Exception:  # whatever the libraries raise for what is missing or torn
        return False
    return not damaged and len(archives) >= 2 + PartialState().num_processes + (checkpoint / "scaler.pt").exists()


def add_adapter(model, lora, seed):
    """The model with a fresh LoRA adapter. Raises InputError if the settings don't fit it."""
    transformers.set_seed(seed)  # LoRA's A is random
    try:
        model = get_peft_model(model, lora)
        # PEFT has filled in its default by now; it complains only if no target matches at all. A str is a pattern.
        targets = [] if isinstance(lora.target_modules, str) else lora.target_modules
        for target in targets:
            if not any(f".{name}".endswith(f".{target}") for name in model.targeted_module_names):
                raise ValueError(f"the model has no module {target!r}")
        # TRL refuses the head, but after the baseline; merging an adapter of embeddings would change a tied head
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if hasattr(module, "base_layer"):
                raise ValueError("not embeddings or the LM head")
    except (ValueError, re.error) as error:
        raise InputError(f"LORA_TARGET_MODULES: {reason(error)}") from error
    return model


def training_data(encoded, on_prompt):
    """Rows as the Trainer takes them: input_ids, and labels, which are -100 where no loss is taken."""
    rows = []
    for row in encoded:
        start = 0 if on_prompt else row.answer_start
        rows.append({"input_ids": row.ids, "labels": [-100] * start + row.ids[start:]})
    return datasets.Dataset.from_list(rows)


def training_config(cfg, hardware, model, run):
    """The reference's recipe as TRL takes it, with what makes it resumable and fast."""
    # a large model on a CPU takes one row at a time: the rows of a step, and so its gradient, are the same
    rows = 1 if hardware["device"] == "cpu" and model.size > LARGE else cfg.BATCH_SIZE
    return SFTConfig(
        output_dir=run / "checkpoints",
        seed=cfg.SEED,
        max_length=cfg.MAX_LENGTH,
        num_train_epochs=cfg.NUM_EPOCHS,
        max_steps=cfg.MAX_STEPS,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=cfg.BATCH_SIZE * cfg.GRADIENT_ACCUMULATION_STEPS // rows,
        learning_rate=cfg.LEARNING_RATE,
        warmup_steps=cfg.WARMUP_RATIO,  # below 1: a share of all steps
        max_grad_norm=cfg.MAX_GRAD_NORM,
        logging_steps=cfg.LOGGING_STEPS,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=cfg.EVAL_STEPS,
        save_steps=cfg.LOGGING_STEPS,  # at every line of the log, so that a resumed run has all its losses
        disable_tqdm=True,  # StepLines has its own bar
        report_to=cfg.REPORT_TO,
        include_num_input_tokens_seen="non_padding",  # tokens/s must not rise with padding
        use_cpu=hardware["device"] == "cpu",
        bf16=hardware["precision"] == "bf16",
        fp16=hardware["precision"] == "fp16",
        gradient_checkpointing=cfg.GRADIENT_CHECKPOINTING,
        pad_to_multiple_of=pad_multiple(model, cfg.MAX_LENGTH),
        ddp_find_unused_parameters=False,  # every adapter weight takes part in every step
    )


def fine_tune(cfg, hardware, model, tokenizer, encoded, held_out, run):
    """Train on `encoded` from the newest checkpoint on; save run/adapter -> {"training", "hardware", "versions"}."""

    def validate():
        size = {"max_length": cfg.MAX_LENGTH, "batch_size": cfg.BATCH_SIZE}
        # as before and after: the Trainer has put an autocast of its own around the PEFT model
        perplexity = evaluate_perplexity(model.get_base_model(), tokenizer, held_out, **size)
        return mean_losses(perplexity, cfg.TRAIN_ON_PROMPT)

    data = training_data(encoded, cfg.TRAIN_ON_PROMPT)
    lines = StepLines()
    trainer = LoRATrainer(
        model=model,
        args=training_config(cfg, hardware, model, run),
        train_dataset=data,
        eval_dataset=data.take(1),  # the Trainer asks for one; `validate` scores the real one
        processing_class=tokenizer,
        callbacks=[lines],
    )
    trainer.validate = validate
    trainer.remove_callback(transformers.PrinterCallback)  # it would print dicts
    # the newest checkpoint by its step, not by its name or time, as a user may have copied some
    whole = on_first(lambda: [path for path in run.glob("checkpoints/checkpoint-*") if is_whole(path)])
    newest = max(whole, key=lambda path: load_json(path / "trainer_state.json")["global_step"], default=None)
    trainer.train(resume_from_checkpoint=newest)
    lines.bar.close()
    if trainer.args.should_save:
        lora = model.peft_config["default"]
        if lora.revision:
            # a model of the Hub: the adapter names it as the user does, not by a folder of the Hub's cache
            lora.base_model_name_or_path = cfg.MODEL_NAME
        # without the embeddings: no adapter here changes them, and PEFT would ask the Hub about them
        model.save_pretrained(run / "adapter", save_embedding_layers=False)
        tokenizer.save_pretrained(run / "adapter")
        file = run / "adapter/tokenizer_config.json"
        # for transformers 4 and llama.cpp, which don't know today's class and take no list of extra tokens
        write_json(file, load_json(file) | {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {}})

    trainable = model.num_parameters(only_trainable=True)
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_answer_loss")
    training = {
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "seconds": lines.seconds,
        "tokens_per_second": trainer.state.num_input_tokens_seen / lines.seconds,
        "trainable_parameters": trainable,
        "total_parameters": trainable + model.size,
        "log_history": [
            # fp16 may scale a gradient to infinity, which JSON does not know
            {name: entry[name] for name in names if name in entry and math.isfinite(entry[name])}
            for entry in trainer.state.log_history[:-1]  # the last is the Trainer's summary
        ],
    }
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "transformers", "datasets", "peft", "trl", "accelerate")
    }
    # hardware and versions of the training: a later start may have others
    return {"training": training, "hardware": hardware, "versions": versions}


# --- Results: the table, the plots, the report, the model card --------------------------------------------------------


def result_table(results):
    """The result, line by line, as text: [label, before, after, change]. Screen, report and card show these lines."""
    perplexity, facts = results["perplexity"], results["facts"]
    before, after = perplexity["before"], perplexity["after"]
    table = []

    def add(label, old, new):
        table.append([label, f"{old:.2f}", f"{new:.2f}", f"{new / old - 1:+.0%}"])

    add("Answers, held-out articles", before["answer"], after["answer"])
    for column, scores in ((1, before), (2, after)):
        table[0][column] += " ({:.2f} to {:.2f})".format(*scores["answer_ci95"])
    if perplexity["shown_one_row"]:
        shown = f"{perplexity['shown_one_row']:.2f}"
        table.append(["the same, base model shown one training row first", shown, "", ""])
    add("Answers, training articles", *perplexity["trained"].values())
    if perplexity["everyday"]:
        add("Everyday text", *perplexity["everyday"].values())
    if facts:
        points = [100 * share for share in (facts["change"], *facts["change_ci95"])]
        change = "{:+.1f} points ({:+.1f} to {:+.1f})".format(*points)
        label = f"Medical facts, right of {facts['count']} (chance: 25%)"
        table.append([label, f"{facts['before']:.1%}", f"{facts['after']:.1%}", change])
    add("Whole rows, prompts too", before["full_text"], after["full_text"])
    add("Reference protocol", before["reference_protocol"], after["reference_protocol"])
    return table


def new_plot(title):
    """The axes of an empty plot."""
    ax = Figure(figsize=(9, 5.4), dpi=150, layout="tight").subplots()
    ax.set_title(title, parse_math=False)  # a `$` in a file's name is not a formula
    ax.spines[["top", "right"]].set_visible(False)
    return ax


@matplotlib.style.context("default")  # the user's matplotlibrc may ask for LaTeX
def plot_training_loss(log_history, path, *, title="Fine-tuning"):
    """Losses in nats per token over optimizer steps, from the Trainer's log history."""
    curves = {"loss": "training", "eval_loss": "validation", "eval_answer_loss": "validation, answers alone"}
    history = pandas.DataFrame(log_history, columns=["step", *curves]).set_index("step")
    ax = new_plot(title)
    for name, label in curves.items():
        losses = history[name].dropna()
        if len(losses):
            ax.plot(losses, "o-", label=f"{label}: {losses.iloc[0]:.2f} to {losses.iloc[-1]:.2f}")
    ax.legend()
    ax.set_xlabel("optimizer step (0: the base model)")
    ax.set_ylabel("loss (nats per token)")
    ax.grid(alpha=0.3)
    ax.figure.savefig(path, format="png")


@matplotlib.style.context("default")
def plot_perplexity(before, after, path, *, trained=None, everyday=None, title="Perplexity"):
    """Bars of what `evaluate_perplexity` returns; `trained` and `everyday` are {"before", "after"} or None."""
    groups = {
        "answers,\nheld-out articles\n(95% interval)": {"before": before["answer"], "after": after["answer"]},
        "answers,\ntraining articles": trained,
        "everyday text": everyday,
    }
    table = pandas.DataFrame({label: values for label, values in groups.items() if values}).T
    ax = new_plot(title)
    y = np.arange(len(table))
    for when, scores, shift, color in (("before", before, -0.2, "#999999"), ("after", after, 0.2, "#0072B2")):
        bars = ax.barh(y + shift, table[when], 0.4, color=color)
        ax.bar_label(bars, fmt=f"{when} %.2f", padding=14, size=13)  # room for the interval
        ax.hlines(shift, *scores["answer_ci95"], color="black")  # of the held-out answers, through the first bar
    ax.set_yticks(y, table.index, fontsize=12)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xlabel("perplexity (log scale; lower is better)")
    ax.set_xlim(left=1)
    ax.figure.savefig(path, format="png")


REPORT = """\
{% if is_card %}
---
library_name: peft
pipeline_tag: text-generation
tags: [lora, sft, trl]
{{ "base_model: " ~ model if model_revision }}
{{ "datasets: [%s]" % dataset if dataset_revision }}
---

{% endif %}
# LoRA fine-tuning of {{ cell(short_name(model)) }} on {{ cell(short_name(dataset)) }}

Before and after training on {{ data.train_rows }} articles; {{ data.test_rows }} others were held out. Perplexity:
lower is better; facts: higher.

| | before | after | change |
| --- | ---: | ---: | ---: |
{% for line in table %}
| {{ line | join(" | ") }} |
{% endfor %}

{% if facts %}
Medical facts: {{ "gained" if facts.change_ci95[0] > 0 else "lost" if facts.change_ci95[1] < 0 else \
"no change that %d facts can detect" % facts.count }}.
{% endif %}
None of the text below is medical advice.
{% if demo_settings.items() <= settings.items() %}
**This is the demo**, a tiny model on a small data set. Its settings were chosen on these held-out articles, so its
figures are optimistic.
{% endif %}

![Perplexity before and after](perplexity_comparison.png)

{% set epochs = training.log_history[-1].epoch %}
{% set share = perplexity.prompt_share or 0 %}
At a perplexity of 20 a model is as unsure of the next token as among 20 equally likely ones. **Answers** are what
follows the question; in brackets, 95% intervals over the rows. **Shown one training row first**: the base model, given
an example in the prompt (estimated on 100 rows at most). **Training articles**, the first 100 of them: if only these
improve, the model learns by heart{{ " (it has seen %.0f%% of all)" % (100 * epochs) if epochs < 1 }}. If **everyday
text**, on other topics, gets worse, it forgets. **Medical facts**: the right ending must be likelier than three wrong
ones. **Whole rows** count the prompts too, which nearly all rows share
{{- ": %.1f%% of the fall in loss is on prompts" % (100 * share) if 0 < share <= 1 }}. The **reference protocol**
averages the losses of the first 100 whole rows at most.

## The answers

At most {{ settings.MAX_NEW_TOKENS }} tokens, temperature {{ settings.TEMPERATURE }}, seed {{ settings.SEED }}. In \
brackets: whether a row with a question on the topic is trained on{{ " (or would be later)" if epochs < 1 }}, held out,
or not in the data.

<table>
<tr><th width="50%">before</th><th width="50%">after</th></tr>
{% for answer in answers %}
<tr><td colspan="2"><b>{{ cell(answer.topic) }}</b> ({{ answer.seen }})<br>{{ cell(answer.question) }}</td></tr>
<tr>
{% for text, stats in ((answer.before, answer.before_stats), (answer.after, answer.after_stats)) %}
<td valign="top">{{ cell(text) }}<br><i>{{ stats.words }} words{{ ", breaks off" if not stats.finished }}</i></td>
{% endfor %}
</tr>
{% endfor %}
</table>

## The training

![Training and validation loss](training_loss.png)

## Use the adapter

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "{{ "." if is_card else "adapter" }}"  # seen from this file
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = {{ answers[0].prompt | pprint }}
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
output = model.generate(**inputs, max_new_tokens={{ settings.MAX_NEW_TOKENS }}, \
do_sample={{ settings.TEMPERATURE > 0 }}, top_k=50, temperature={{ settings.TEMPERATURE | float or 1.0 }})
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer.split("</s>")[0])
# without PEFT: model.merge_and_unload().save_pretrained("merged"); tokenizer.save_pretrained("merged")
```

## What was run

{{ cell(model) }} ({{ model_revision or "local" }}) on {{ cell(dataset) }} ({{ dataset_revision or "local" }}):

| as in results.json | |
| --- | --- |
{% for group in ("data", "training", "stage_seconds", "hardware", "versions", "settings") %}
{% for name, value in results[group] | items if name != "log_history" %}
| {{ group }}: {{ name }} | {{ cell("%.6g" % value if value is float else value) }} |
{% endfor %}
{% endfor %}
"""


def as_cell(value):
    """A value as one line of text that breaks neither a Markdown table nor HTML: <, &, | and backticks are escaped."""
    # all white space but line ends, control characters, and those that turn the direction of writing
    text = re.sub(r"[^\S\n]|[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e-\u202e\u2066-\u2069]", " ", str(value))
    return html.escape(text).replace("|", "&#124;").replace("`", "&#96;").replace("\n", "<br>")


def write_report(results, path, *, is_card=False):
    """Write report.md, from what results.json holds; as a model card, with metadata in front."""
    template = jinja2.Template(REPORT, trim_blocks=True)
    text = template.render(
        results,  # every key of results.json is a name in the template, as are these:
        results=results,
        table=result_table(results),
        is_card=is_card,
        demo_settings=DEMO_SETTINGS,
        cell=as_cell,
        short_name=short_name,
    )
    write_text(path, text)


def write_results(results, run):
    """Write everything that a run leaves but its adapter; results.json last, as it marks the run as finished."""
    # that of an earlier start had other questions: it must not stand beside the new report
    (run / "results.json").unlink(missing_ok=True)
    perplexity = results["perplexity"]
    title = f"{short_name(results['model'])} on {short_name(results['dataset'])}"
    plot_training_loss(results["training"]["log_history"], run / "training_loss.png", title=title)
    plot_perplexity(
        perplexity["before"],
        perplexity["after"],
        run / "perplexity_comparison.png",
        trained=perplexity["trained"],
        everyday=perplexity["everyday"],
        title=title,
    )
    write_report(results, run / "report.md")
    # the adapter's model card, from which the Hub makes its page, with the plots beside it
    write_report(results, run / "adapter/README.md", is_card=True)
    for plot in run.glob("*.png"):
        shutil.copy(plot, run / "adapter")
    write_json(run / "results.json", results)


# --- Settings, folder, errors -----------------------------------------------------------------------------------------

WHOLE, NUMBER = (int,), (int, float)
COUNTS = "LORA_R BATCH_SIZE GRADIENT_ACCUMULATION_STEPS LOGGING_STEPS EVAL_STEPS MAX_LENGTH MAX_NEW_TOKENS"
# What a number must be, in words -> (allowed types, the rule, the constants).
RULES = {
    "a whole number from 1": (WHOLE, lambda n: n >= 1, COUNTS),
    "a whole number from 0": (WHOLE, lambda n: 0 <= n < 2**31, "SEED"),
    "-1, or a whole number from 1": (WHOLE, lambda n: n == -1 or n >= 1, "MAX_STEPS"),
    "a number above 0": (NUMBER, lambda x: 0 < x < math.inf, "NUM_EPOCHS LEARNING_RATE LORA_ALPHA"),
    "a number from 0": (NUMBER, lambda x: 0 <= x < math.inf, "MAX_GRAD_NORM TEMPERATURE"),
    "a share between 0 and 1, such as 0.1": (NUMBER, lambda x: 0 < x < 1, "TEST_SIZE"),
    "a share from 0 to below 1": (NUMBER, lambda x: 0 <= x < 1, "LORA_DROPOUT WARMUP_RATIO"),
    "None, or a share from 0 to below 1": ((*NUMBER, type(None)), lambda x: x is None or 0 <= x < 1, "BASE_DROPOUT"),
}


def check_settings(cfg):
    """Raise InputError for the first invalid constant; also turn Paths into strings, and make OUTPUT_DIR."""
    for name in ("MODEL_NAME", "DATASET_NAME", "OUTPUT_DIR"):
        setattr(cfg, name, str(getattr(cfg, name)))  # a notebook may set a Path
    for wanted, (types, allows, names) in RULES.items():
        for name in names.split():
            value = getattr(cfg, name)
            if type(value) not in types or not allows(value):  # type(), as True is an int, too
                raise InputError(f"{name} = {value!r}: must be {wanted}; edit it in the script")
    questions = cfg.QUESTIONS if isinstance(cfg.QUESTIONS, dict) else {}
    if not questions or not all(isinstance(text, str) for pair in questions.items() for text in pair):
        raise InputError("QUESTIONS: must be {topic: question}, two texts each, and one at least")
    if not PROMPT.endswith(ANSWER_MARK) or "{question}" not in PROMPT:
        raise InputError(f"PROMPT: must hold {{question}} and end with {ANSWER_MARK}")
    if cfg.REPORT_TO not in ("none", *get_available_reporting_integrations()):
        raise InputError(f"REPORT_TO = {cfg.REPORT_TO!r}: not installed; pip install {cfg.REPORT_TO}, or use 'none'")
    try:
        Path(cfg.OUTPUT_DIR).expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"OUTPUT_DIR = {cfg.OUTPUT_DIR!r}: can't be written to ({error.strerror})") from error


def context_length(model):
    """How many tokens a model takes at most; infinity if its config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_fit(cfg, model, tokenizer, encoded, held_out):
    """Raise InputError if the settings don't fit the model's context or the rows."""
    prompts = [format_prompt(question) for question in cfg.QUESTIONS.values()]
    longest = max(len(row.ids) for row in encode(tokenizer, prompts))
    needed = max(cfg.MAX_LENGTH, longest + cfg.MAX_NEW_TOKENS)
    if needed > context_length(model):
        raise InputError(f"MAX_LENGTH, MAX_NEW_TOKENS: {needed} tokens, but the model takes {context_length(model)}")
    held_out_rows = encode(tokenizer, held_out, cfg.MAX_LENGTH)
    for rows in (encoded[:SAMPLE_ROWS], held_out_rows[:SAMPLE_ROWS]):
        if all(row.answer_start == len(row.ids) for row in rows):
            raise InputError(f"MAX_LENGTH = {cfg.MAX_LENGTH}: the prompts alone fill it; raise it")
    largest = max(tokenizer.eos_token_id, *(max(row.ids) for row in encoded + held_out_rows))
    if largest >= model.get_input_embeddings().num_embeddings:
        raise InputError("MODEL_NAME: the tokenizer knows tokens without an embedding: resize_token_embeddings?")
    if not any(text.startswith(PROMPT.split("{question}")[0]) for text in held_out):
        say("warning: the rows don't start like PROMPT, so questions are asked in a form that isn't trained")


def hush():
    """Silence what says nothing about this run; all other warnings stay."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # this hides the Hub's download bars, too; they come back here:
    huggingface_hub.utils.enable_progress_bars()
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL's trainers would call home
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|trl")
    # EOS is the padding token on purpose
    logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "PAD/BOS/EOS tokens" not in record.msg)


def find_inputs(cfg, demo):
    """(model path, commit), (data path, commit), whether the demo stepped in; for the demo, `cfg` is changed."""
    try:
        if not demo:
            return (
                on_first(lambda: fetch("model", cfg.MODEL_NAME, cfg.MODEL_REVISION)),
                on_first(lambda: fetch("dataset", cfg.DATASET_NAME, cfg.DATASET_REVISION)),
                False,
            )
    except ConnectionError as error:
        if not cfg.OFFLINE_FALLBACK:
            raise InputError(f"{error}; go online once, or name local files") from error
        line = "=" * 100
        say(f"\n{line}\n  RUNNING THE DEMO, not the model and data that the constants name.\n  Why: {error}.\n{line}\n")
    vars(cfg).update(DEMO_SETTINGS)
    return (HERE / cfg.MODEL_NAME, None), (HERE / cfg.DATASET_NAME, None), not demo


# Settings that don't change the trained adapter. Model and data do, but by their content, not by their names.
ASKED = ("QUESTIONS", "MAX_NEW_TOKENS", "TEMPERATURE")
LOCATIONS = ("MODEL_NAME", "MODEL_REVISION", "DATASET_NAME", "DATASET_REVISION")
NOT_TRAINED = (*ASKED, *LOCATIONS, "OUTPUT_DIR", "REPORT_TO", "OFFLINE_FALLBACK", "GRADIENT_CHECKPOINTING")


def run_folder(cfg, model_path, commit, train, held_out):
    """The run's folder: the model's name, and a hash of settings, prompt, model, rows and number of processes."""
    identity = [
        {name: getattr(cfg, name) for name in SETTINGS if name not in NOT_TRAINED},
        PROMPT,
        commit,
        train,
        held_out,
        PartialState().num_processes,  # with more of them a step has more rows
    ]
    digest = hashlib.sha256(json.dumps(identity).encode())
    if commit is None:
        for path in sorted(model_path.iterdir()):
            if path.suffix in (".json", ".safetensors"):
                digest.update(path.name.encode() + path.read_bytes())
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", short_name(cfg.MODEL_NAME))[:60]
    return Path(cfg.OUTPUT_DIR).expanduser() / f"{name}-{digest.hexdigest()[:8]}"


@contextlib.contextmanager
def one_line_errors():
    """Around `main`: what a user can fix ends with one line on stderr and an exit code."""
    code = 2
    try:
        yield
        return
    except InputError as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, f"interrupted: run the same command again to resume ({OUTPUT_DIR}/)"
    except torch.OutOfMemoryError:
        message = "error: out of GPU memory: set GRADIENT_CHECKPOINTING = True and resume, or halve BATCH_SIZE"
    except Exception:
        # torch and safetensors don't pass a full disk's error number on
        folder = Path(OUTPUT_DIR).expanduser()
        if not folder.exists() or shutil.disk_usage(folder).free > 2**20:
            raise
        message = f"error: no space left in {OUTPUT_DIR}/: free some and run the same command again"
    # from the environment, as an error may come before the processes know each other
    if os.environ.get("RANK", "0") == "0" or "GPU memory" in message:  # which any process may run out of
        print(message, file=sys.stderr)
    raise SystemExit(code)


# --- Main -------------------------------------------------------------------------------------------------------------


@one_line_errors()
def main(demo=False):
    """The whole story, in order -> the run's folder. `demo`: on the tiny model and data of tests/."""
    # Settings and machine: all that can be checked before anything takes time.
    cfg = SimpleNamespace(**{name: globals()[name] for name in SETTINGS})
    check_settings(cfg)
    hardware = choose_hardware()
    # joins the processes that torchrun started; one may download for hours while the others wait
    processes = PartialState(cpu=hardware["device"] == "cpu", timeout=timedelta(hours=12)).num_processes
    hardware |= {"processes": processes, "threads": torch.get_num_threads()}
    hush()

    # Model and data: from here on they are on this disk, and the Hub is left alone.
    (model_path, commit), (data_path, data_commit), is_fallback = find_inputs(cfg, demo)
    machine = ", ".join(f"{name} {value}" for name, value in hardware.items())
    say(f"{cfg.MODEL_NAME} on {cfg.DATASET_NAME}; {machine}")
    texts = read_texts(data_path)
    train, held_out, counts = split_texts(texts, cfg.TEST_SIZE, cfg.SEED, cfg.DROP_EMPTY_ANSWERS)
    train, held_out = train["text"][:], held_out["text"][:]  # as lists
    tokenizer = load_tokenizer(model_path)
    encoded = encode(tokenizer, train, cfg.MAX_LENGTH, end=True)
    counts["truncated_train_rows"] = sum(row.ids[-1] != tokenizer.eos_token_id for row in encoded)
    say("data: " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items()))

    # A finished run is left alone; one that was interrupted, or has other questions now, resumes in its folder.
    run = run_folder(cfg, model_path, commit, train, held_out)
    asked = {name: getattr(cfg, name) for name in ASKED}
    finished = on_first(lambda: load_json(run / "results.json"))  # the last file that a run writes
    if finished and asked.items() <= finished["settings"].items():  # the same questions
        say(f"already finished: {run}/report.md (to repeat it, move the folder away)")
        return run

    # The base model with an untrained LoRA adapter around it.
    model = load_model(model_path, hardware["device"], hardware["precision"], dropout=cfg.BASE_DROPOUT)
    check_fit(cfg, model, tokenizer, encoded, held_out)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.LORA_R,
        lora_alpha=cfg.LORA_ALPHA,
        lora_dropout=cfg.LORA_DROPOUT,
        target_modules=cfg.LORA_TARGET_MODULES,
        fan_in_fan_out=model.config.model_type == "gpt2",  # its Conv1D keeps weights transposed
        revision=commit,
    )
    model = add_adapter(model, lora, cfg.SEED)
    progress = Progress(run)

    # The baseline, before any training: the adapter is disabled.
    precision = hardware["precision"]  # if the run resumes in another one, both measurements are made again
    with model.disable_adapter():
        before = progress.stage(
            "before", lambda: measure(model, tokenizer, cfg, train, held_out, encoded), precision=precision
        )

    # Fine-tuning, from the newest checkpoint on.
    trained = progress.stage("training", lambda: fine_tune(cfg, hardware, model, tokenizer, encoded, held_out, run))

    # The adapter as it was saved, on a model that no training has touched.
    del model  # two may not fit into memory
    gc.collect()
    model = load_model(model_path, hardware["device"], precision)  # dropout takes no part in measuring
    model = PeftModel.from_pretrained(model, run / "adapter")
    after = progress.stage("after", lambda: measure(model, tokenizer, cfg, train, held_out), precision=precision)
    answers = progress.stage(
        "answers", lambda: on_first(lambda: ask_both(model, tokenizer, cfg, train, held_out)), **asked
    )
    if not PartialState().is_main_process:
        return run

    # All figures in one place; the plots, the report and the model card are made from them.
    # The losses begin with the baseline's and end with the saved adapter's.
    history = trained["training"]["log_history"]
    history.insert(0, {"step": 0, "epoch": 0.0} | mean_losses(before["perplexity"], cfg.TRAIN_ON_PROMPT))
    history[-1] |= mean_losses(after["perplexity"], cfg.TRAIN_ON_PROMPT)
    results = {
        "model": cfg.MODEL_NAME,
        "model_revision": commit,
        "dataset": cfg.DATASET_NAME,
        "dataset_revision": data_commit,
        "offline_fallback": is_fallback,
        "settings": vars(cfg),
        "data": counts,
        **compare(before, after),  # perplexity and facts
        **trained,  # training, hardware and versions
        "stage_seconds": {name: stage["seconds"] for name, stage in progress.stages.items()},
        "answers": answers,
    }
    write_results(results, run)
    for line in [("perplexity: lower is better; facts: higher", "before", "after", "change"), *result_table(results)]:
        say("{:50} {:>22} {:>22}  {}".format(*line))
    say(f"\nEverything is in {run}/; read report.md first.")
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="run on the tiny model and data in tests/")
    with contextlib.suppress(AttributeError):  # a notebook's %run has another kind of stdout
        sys.stdout.reconfigure(errors="replace")  # letters that a terminal lacks
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGTERM is how Slurm and spot machines end a job
        signal.signal(number, signal.default_int_handler)
    main(parser.parse_args().demo)
