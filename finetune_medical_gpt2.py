"""Fine-tune GPT-2 on medical text with LoRA, and measure honestly what that changed.

    python finetune_medical_gpt2.py                         # settings: the constants below
    torchrun --nproc_per_node=N finetune_medical_gpt2.py    # several processes: data parallel

In order (`main`, at the end of the file, tells it all: begin there): the base model's perplexity on
held-out text and its answers to five questions; LoRA fine-tuning with TRL's SFTTrainer; the same
measurements, by the same functions, of the adapter as it was saved; plots and a report. Writes
OUTPUT_DIR/<run>/ with report.md, results.json, two plots and adapter/. Killed at any moment, the same
command goes on where it was. Where the Hub can't be reached, the same pipeline runs on a tiny model
and data from tests/, and says so.

Measured on 2 cores of an AMD EPYC without bf16 instructions, torch 2.13, by tests/benchmark.py: GPT-2
124M (random weights) trains at 2.5 times the tokens/s of the reference's recipe in fp32, in 1.9 GiB
instead of 7.7. Without a network this command takes the tiny model's answer perplexity from 46.26 to
17.50.

It redoes github.com/rafael-caetano/GPT2_Medical_Language_Fine_Tuning, "the reference" below. None of
what the models write is medical advice.
"""

import contextlib
import copy
import ctypes
import errno
import functools
import gc
import gzip
import hashlib
import html
import importlib.metadata
import importlib.util
import io
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
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple


def quit_at_once(*_):
    sys.stderr.write("interrupted: nothing was done yet\n")
    os._exit(130)


# The imports below take seconds, and would answer Ctrl-C with a traceback.
if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, quit_at_once)
    # Read when torch is imported: waiting threads sleep, rather than slow down other processes; on
    # Linux only after a few microseconds, as most waits are shorter than a thread takes to wake up.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Plots go to files. A notebook's backend, inherited by its subprocesses, may not be installed here.
os.environ.pop("MPLBACKEND", None)

import datasets
import filelock
import huggingface_hub
import jinja2
import numpy as np
import pandas
import psutil
import pyarrow.parquet
import torch
import torch.nn.functional as F
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import errors as hub_errors
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.pytorch_utils import Conv1D
from trl import SFTConfig, SFTTrainer

# Model and data
MODEL_NAME = "gpt2"  # any causal LM: Hub id or local folder (safetensors)
MODEL_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"  # of openai-community/gpt2; or None
DATASET_NAME = "aboonaji/wiki_medical_terms_llam2_format"  # Hub id, or .jsonl, .json, .csv, .parquet
DATASET_REVISION = None  # None: the newest; results.json says which that was
TEST_SIZE = 0.1  # share of the rows that is held out, drawn at random
MAX_LENGTH = 512  # tokens; longer rows are cut
SEED = 42  # of the split, the adapter's first weights, the order of the rows, dropout and answers
DROP_EMPTY_ANSWERS = True  # False: keep rows without an article, as the reference did
OFFLINE_FALLBACK = True  # without the Hub: True runs on what ships in tests/, False stops

# LoRA
LORA_R = 8  # rank of what is added to each matrix, the product of two thin ones
LORA_ALPHA = 32  # that product is scaled by alpha / r
LORA_DROPOUT = 0.1  # on the adapter's inputs, in training
LORA_TARGET_MODULES = None  # None: PEFT's choice (GPT-2: c_attn); or a list, or "all-linear"

# Training
NUM_EPOCHS = 1  # times that every training row is seen
MAX_STEPS = -1  # optimizer steps; -1: NUM_EPOCHS decides
LEARNING_RATE = 1e-4  # the reference's; README has what higher ones do
BATCH_SIZE = 4  # rows per process and forward pass
GRADIENT_ACCUMULATION_STEPS = 4  # a step sees BATCH_SIZE x this x processes rows
WARMUP_RATIO = 0.03  # share of the steps in which the learning rate rises; then it falls to 0
MAX_GRAD_NORM = 0.3  # longer gradients are shortened to it; 0: never
LOGGING_STEPS = 10  # a line with the training loss, and a checkpoint
EVAL_STEPS = 100  # validation on all held-out rows
TRAIN_ON_PROMPT = True  # False: the loss sees the answers only
BASE_DROPOUT = 0.0  # the base model's own dropouts; None: as its config says (GPT-2: 0.1, slower)

# Questions; a finished run answers others without training again
QUESTIONS = {
    "Paracetamol poisoning": "What are the symptoms and treatment for paracetamol poisoning?",
    "Congenital adrenal hyperplasia": "Explain the causes and symptoms of Congenital adrenal hyperplasia.",
    "Anthrax": "Describe the transmission, symptoms, and treatment of Anthrax.",
    "Cachexia": "What is Cachexia, and how does it affect the body?",
    "Botulism": "Explain the causes, symptoms, and treatment of Botulism.",
}
MAX_NEW_TOKENS = 250  # an answer's longest
TEMPERATURE = 0.7  # below 1 likelier tokens become likelier still; 0: greedy

# Output
OUTPUT_DIR = "outputs"  # each run gets a folder of its own in it
REPORT_TO = "none"  # or "tensorboard", "trackio", "wandb"
SAVE_MERGED = False  # True: also write merged/, a plain model folder with the adapter merged in

# The names of the constants above (F is a module): they are what is checked, and written to results.json.
SETTINGS = [name for name in list(globals()) if name.isupper() and name != "F"]

# What the offline default sets apart; all else is as above. One epoch is only 22 steps there, so it trains six, more
# layers than PEFT's default, and at a higher learning rate.
OFFLINE_SETTINGS = {
    "MODEL_NAME": "tests/tiny_gpt2",
    "MODEL_REVISION": None,
    "DATASET_NAME": "tests/medical_terms.jsonl",
    "DATASET_REVISION": None,
    "LORA_TARGET_MODULES": "all-linear",
    "NUM_EPOCHS": 6,
    "LEARNING_RATE": 2e-3,
    "EVAL_STEPS": 40,
}
PACKAGES = ("torch", "transformers", "datasets", "peft", "trl", "accelerate")

# The form of a row: the prompt, an article, and END_MARK. An answer begins after ANSWER_MARK. Change them only together
# with the data's rows: nothing here rewrites those.
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
    """Something that the user can mend; ends the program with one line and exit code 2."""


class HubUnreachable(Exception):
    """The Hub can't be reached, and its cache does not hold what was asked for."""


# --------------------------------------------------------------------------------------------------
# Screen, files and processes


def on_first(function):
    """What `function` returns on the first process, for every process; or what it raises there."""
    result = error = None
    if PartialState().is_main_process:
        try:
            result = function()
        except Exception as raised:
            error = raised
    # what is sent to the others must be picklable, which not every exception is
    shared = error
    if not isinstance(error, InputError | HubUnreachable | None):
        shared = RuntimeError(f"on the first process: {error!r}")
    # Also after an error: processes that the first doesn't answer would wait for it for hours.
    result, shared = broadcast_object_list([result, shared])
    if shared is not None:
        raise error or shared  # the first process its own
    return result


def say(message):
    """A line on the screen, from the first process alone, beside whatever progress bar is there."""
    if not PartialState().is_main_process:
        return
    encoding = sys.stdout.encoding or "utf-8"  # which may lack letters: on Windows, into a file
    with tqdm.external_write_mode():
        print(message.encode(encoding, "replace").decode(encoding), flush=True)


def progress_bar(label, total, unit):
    """A tqdm bar on the first process; none in a log file, and none without a label."""
    hidden = label is None or not PartialState().is_main_process
    return tqdm(
        desc=label,
        total=total,
        unit=unit,
        unit_scale=unit == " tokens",
        leave=False,
        dynamic_ncols=True,
        disable=hidden or None,  # None lets tqdm decide: no bar where the output is no terminal
    )


def last_line(error):
    """The last line of what an exception says, of its innermost cause."""
    # libraries wrap the true reason (no such host, no space) in general words
    while cause := error.__cause__ or (not error.__suppress_context__ and error.__context__):
        error = cause
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def write_text(path, text):
    """Write a file that appears whole or not at all: half of one would pass for the whole."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def load_json(path):
    """The content of a JSON file; None if there is none, or none that is whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def kept(path, make, depends_on):
    """What `make()` returns, kept as JSON at `path` beside what it depends on and its seconds.

    Another call returns what is there, unless it depends on something else now. What a run's folder
    is named after (see run_folder) need not be listed. Called on every process, as `make` is.
    """
    # Only the first process looks: if they disagreed, some would wait for others that never come.
    record = on_first(lambda: load_json(path))
    if record is None or record["depends_on"] != depends_on:
        began = time.monotonic()
        result = make()
        seconds = round(time.monotonic() - began, 1)
        record = {"depends_on": depends_on, "seconds": seconds, "result": result}
        on_first(lambda: write_json(path, record))
    return record["result"]


# --------------------------------------------------------------------------------------------------
# Model and data: from this disk, from the Hub, or from the Hub's cache

DATA_FILE = re.compile(r"\.(jsonl|json|csv|parquet)(\.gz)?$")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # `gpt2`, or `owner/name`
# Endings of files that hold neither weights nor rows; "" is that of .gitattributes.
CONTENT_FREE = {"model": (".json", ".txt", ".model"), "dataset": (".md", "")}


def is_local(kind, name):
    """Whether a model's or a data set's name is a path on this disk rather than a Hub id.

    A folder that only happens to be called like a Hub id doesn't count: `gpt2` without a model in it.
    """
    path = Path(name).expanduser()
    if not HUB_ID.fullmatch(name) or ("/" in name and path.is_dir()):
        return True
    if kind == "model":
        return (path / "config.json").is_file()
    return path.is_file() or DATA_FILE.search(name) is not None


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
    # ValueError: the answer is no JSON, but a hotel's login page, say
    except (huggingface_hub.utils.httpx.RequestError, hub_errors.OfflineModeIsEnabled, ValueError) as error:
        return f"{type(error).__name__}: {last_line(error)}"
    return None


def fetch(kind, name, revision=None):
    """Where a model or a data set is on this disk, and its commit -> (Path, commit or None if local).

    `kind` is "model" or "dataset". What is not local is downloaded, or taken from the cache if the
    Hub can't be reached. Raises InputError where the Hub has no such thing, HubUnreachable where it
    does not answer and the cache lacks it.
    """
    if is_local(kind, name):
        return Path(name).expanduser().absolute(), None
    unreachable = ask_hub(kind, name, revision)
    offline = unreachable is not None
    not_cached = HubUnreachable(f"the Hub can't be reached ({unreachable}) and {name} is not in the cache")

    # A model's repository often holds the same weights in several formats, in subfolders and as
    # consolidated*.safetensors: one is enough.
    patterns = {}
    if kind == "model":
        patterns["allow_patterns"] = ["*.json", "*.safetensors", "*.txt", "*.model"]
        patterns["ignore_patterns"] = ["*/*", "consolidated*"]
    try:
        # The revision as the user gave it: only then the cache remembers which commit it stood for.
        folder = huggingface_hub.snapshot_download(
            name, repo_type=kind, revision=revision, local_files_only=offline, **patterns
        )
    except hub_errors.HfHubHTTPError as error:
        raise InputError(f"{kind.upper()}_NAME: the Hub refuses {name!r}: {last_line(error)}") from error
    except (hub_errors.LocalEntryNotFoundError, huggingface_hub.utils.httpx.RequestError) as error:
        if offline:
            raise not_cached from error
        raise InputError(f"{name}: the download broke off; the same command goes on ({last_line(error)})") from error

    snapshot = Path(folder)  # named after the commit
    # Other programs fill the same cache, too, some with no more than a model's config.json.
    contents = [x for x in snapshot.rglob("*") if x.is_file() and x.suffix not in CONTENT_FREE[kind]]
    if offline and not contents:
        raise not_cached
    return snapshot, snapshot.name


def check_model_folder(folder):
    """Raise InputError for a folder that holds no plain model.

    Weights are taken from safetensors alone: to unpickle others is to run whatever code they hold.
    """
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
    # Only fast tokenizers tell which characters a token covers, and so where an answer begins.
    if not tokenizer.is_fast or tokenizer.eos_token is None or not tokenizer(PROMPT)["input_ids"]:
        raise InputError(f"MODEL_NAME: {folder} needs a fast tokenizer (tokenizer.json) and an end-of-sequence token")
    # EOS will do: labels and masks decide what counts, never a padding token's id
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(folder, device="cpu", precision="fp32", *, dropout=None):
    """A frozen causal LM from safetensors, without remote code, made fast for its device.

    `dropout` replaces all dropouts that the model's config names at its top. Raises InputError.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for key, value in config.to_dict().items():
            is_dropout = "dropout" in key or key.endswith("pdrop")
            if dropout is not None and is_dropout and isinstance(value, float):
                setattr(config, key, dropout)
            if value == "gelu_new":
                setattr(config, key, "gelu_pytorch_tanh")  # the same function, in one kernel
        # outputs as the code below takes them, whatever the folder's config.json asks for
        config.return_dict = True
        config.output_attentions = config.output_hidden_states = False
        # fp32 whatever the folder was saved in: speed_up decides what is rounded, and merging wants it whole
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:
        raise InputError(f"MODEL_NAME: {folder} can't be loaded: {last_line(error)}") from error
    # Answers are what the constants say: penalties, beams and lengths of the folder's
    # generation_config.json take no part.
    model.generation_config = GenerationConfig(
        eos_token_id=config.get_text_config().eos_token_id, bos_token_id=config.get_text_config().bos_token_id
    )
    return speed_up(model.requires_grad_(False).to(device), precision)


def not_json(line, error):
    return InputError(f"line {line}: not JSON ({error.msg}); mend or remove it")


def parse_json(text):
    """The values in JSON lines; where one value spans several lines, that one."""
    try:
        return [json.loads(text)]
    except json.JSONDecodeError as error:
        whole_error = error  # of several lines, or of what is no JSON at all
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
    if text.strip() and not values:
        raise not_json(whole_error.lineno, whole_error) from whole_error
    return values


def read_json(file):
    """{column: values} of JSON lines, of one array of rows, or of one object of columns; values of `text` alone."""
    content = file.read()
    rows = parse_json(content.decode(json.detect_encoding(content)))
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    rows = [row if isinstance(row, dict) else {} for row in rows]
    table = dict.fromkeys(sorted({column for row in rows for column in row}))
    if "text" in table:
        table["text"] = [row.get("text") for row in rows]
    if len(rows) == 1:
        # a single object may be a whole table; in pandas' DataFrame.to_json its columns are objects, too
        texts = rows[0].get("text")
        if isinstance(texts, dict):
            texts = list(texts.values())
        if isinstance(texts, list):
            table["text"] = texts
    return table


READERS = {
    ".jsonl": read_json,
    ".json": read_json,
    # as text: an article that reads "NA" or "007" is neither missing nor a number
    ".csv": functools.partial(pandas.read_csv, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig"),
    # all columns are columns: what pandas wrote as its index is one, too
    ".parquet": lambda file: pyarrow.parquet.read_table(file).to_pandas(ignore_metadata=True),
}


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
            table = {column: data[column] for column in data.column_names}  # none is read yet
        else:
            content = path.read_bytes()
            if path.suffix == ".gz":
                content = gzip.decompress(content)
            table = READERS[kind](io.BytesIO(content))
    except InputError as error:
        raise InputError(f"DATASET_NAME: {path}, {error}") from error
    except Exception as error:
        what = kind.removeprefix(".") or "a data set"
        raise InputError(f"DATASET_NAME: {path} can't be read as {what}: {last_line(error)}") from error
    if "text" not in table:
        raise InputError(f"DATASET_NAME: {path} has no column `text`, only {', '.join(table) or 'no rows'}")
    return list(table["text"][:])  # [:], as a data set's column would read each row by itself


def format_prompt(question):
    """PROMPT with a question: how the model is asked, and the form that the data's own rows have."""
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
    unique = list(dict.fromkeys(sound))  # no set, whose order, and with it the split, is another each time
    rows = unique
    if drop_empty:
        rows = [x for x in unique if x.split(ANSWER_MARK)[1].replace(END_MARK, "").strip()]
    malformed = len(texts) - len(sound)
    duplicate = len(sound) - len(unique)
    empty = len(unique) - len(rows)

    test_rows = math.ceil(len(rows) * test_size)
    if test_rows < 1 or test_rows >= len(rows):
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
        # only in training: EOS teaches the model to stop, and is no part of held-out text
        if end and ids[-1:] != [tokenizer.eos_token_id]:
            ids = ids + [tokenizer.eos_token_id]
        ids, offsets = ids[:max_length], offsets[:max_length]

        # the answer's first token is the first that starts at or after the end of [/INST]
        mark = text.find(ANSWER_MARK)
        begin = mark + len(ANSWER_MARK) if mark >= 0 else len(text)
        in_answer = [i for i, (start, stop) in enumerate(offsets) if begin <= start < stop]
        first = in_answer[0] if in_answer else len(ids)
        end_of_ids = max((stop for _, stop in offsets), default=0)  # in characters
        rows.append(Row(ids, first, len(text[begin:end_of_ids].encode())))
    return rows


# --------------------------------------------------------------------------------------------------
# Scoring

NLL, TOKENS, ANSWER_NLL, ANSWER_TOKENS, ANSWER_BYTES = range(5)  # columns of what `score_rows` returns


@contextlib.contextmanager
def inference(model):
    """Within: the model in evaluation mode, without gradients; under autocast if it is in bf16."""
    was_training = model.training
    model.eval()
    try:
        # a model in fp32 stays in it: autocast would round what is to be measured
        with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=is_rounded(model)):
            yield
    finally:
        model.train(was_training)


def label_nll(model, input_ids, labels, plain_head, cache=None):
    """NLL in nats of the labels: the forward pass of scoring and, on a CPU, of training.

    input_ids and labels (rows, tokens) -> (rows, tokens - 1), as the first token is not predicted;
    0 where the label is -100. There is no padding mask: rows are padded on the right, where a causal
    model doesn't see it. `cache` holds what comes before (see run_start). With a plain head (see
    Speed) the logits are never all in memory.
    """
    labels = labels[:, 1:]
    live = labels != -100
    inputs = {"input_ids": input_ids, "use_cache": cache is not None}
    if cache is not None:
        inputs["past_key_values"] = cache
    if plain_head:
        output = model.base_model(**inputs)
        hidden = output[0][:, :-1]  # (rows, tokens - 1, d): the last position predicts nothing
        weight = model.get_output_embeddings().weight
        nll = ChunkedNLL.apply(hidden[live].to(weight.dtype), weight, labels[live])
    else:
        # not model.forward, which in training is this very function (see loss_or_logits)
        logits = type(model).forward(model, **inputs).logits[:, :-1]
        nll = F.cross_entropy(logits[live].float(), labels[live], reduction="none")
    return torch.zeros(labels.shape, device=nll.device).masked_scatter(live, nll)


def pad_right(rows, width, device):
    """Token ids of unequal length as labels (rows, width): -100, which no loss counts, at the end."""
    padded = [ids + [-100] * (width - len(ids)) for ids in rows]
    return torch.tensor(padded, device=device)


def score_rows(model, tokenizer, texts, *, max_length, batch_size=8, progress=None):
    """Score every text once, shared out over the processes -> float64 array (len(texts), 5).

    Columns: NLL in nats and predicted tokens of the row, the same of its answer, and the UTF-8 bytes
    of the answer scored. `progress` labels a bar. Raises InputError where the loss is not finite.
    """
    # The model that PEFT wraps: its layers hold the adapter, which takes part unless it is disabled.
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    plain_head = has_plain_head(base)
    rows = encode(tokenizer, texts, max_length)
    process = PartialState()

    # Rows of like length share a batch, for little padding; the longest come first, so that what
    # does not fit into memory fails at once.
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    mine = longest_first[process.process_index :: process.num_processes]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    scores = []
    with inference(base), progress_bar(progress, len(mine), " rows") as bar:
        # All rows begin with the same system prompt: it is run once, and each batch goes on from there.
        start_nll, cache = run_start(base, rows, plain_head)
        start_tokens = len(start_nll)  # in the cache
        in_bf16 = is_rounded(base)
        for batch in batches:
            # never beyond max_length, which may be the whole context of the model
            longest = max(len(rows[batch[0]].ids) - start_tokens, 1)
            width = min(max_length - start_tokens, round_up(longest, in_bf16))
            labels = pad_right([rows[i].ids[start_tokens:] for i in batch], width, base.device)
            # a row's input is its labels, with any token where the padding is
            batch_nll = label_nll(base, labels.clamp(min=0), labels, plain_head, repeat_cache(cache, len(batch)))
            for i, nll in zip(batch, batch_nll.cpu().double(), strict=True):
                scores.append((i, sum_row(rows[i], torch.cat([start_nll, nll]))))
            bar.update(len(batch))

    # checked after all have scored theirs, so that all processes end alike
    scores = sorted(gather_object(scores))
    for i, score in scores:
        if not math.isfinite(score[NLL]):
            raise InputError(f"the model's loss on row {i} is not finite: ...{texts[i][-50:]!r}")
    return np.array([score for _, score in scores], dtype=np.float64).reshape(-1, 5)


def sum_row(row, nll):
    """A line of `score_rows`, from the NLL of a row's tokens: nll[t] is that of token t + 1, or of padding."""
    nll = nll[: max(len(row.ids) - 1, 0)]
    answer = nll[max(row.first - 1, 0) :]
    return nll.sum().item(), len(nll), answer.sum().item(), len(answer), row.answer_bytes


def bootstrap_ci95(sums, counts):
    """95 % interval of sum(sums) / sum(counts), which have an element for each row, over resamplings of the rows."""
    n = len(sums)
    # (1000, n): how often each row is drawn; with a fixed seed, so that the same scores give the same interval
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)
    return np.percentile((weights @ sums) / (weights @ counts), (2.5, 97.5))


def summarize_scores(scores):
    """The perplexities in a `score_rows` array: sum the NLL, count the tokens, divide once.

    What speaks of answers is None if there is none.
    """
    scores = np.asarray(scores)
    nll, tokens = scores[:, NLL], scores[:, TOKENS]
    # the reference's way: the mean of the rows' means, over the first hundred
    hundred = scores[:100][tokens[:100] > 0]
    summary = {
        "full_text": math.exp(nll.sum() / tokens.sum()),
        "answer": None,
        "seed_protocol": math.exp(np.mean(hundred[:, NLL] / hundred[:, TOKENS])),
        "bits_per_byte": None,
        "tokens": int(tokens.sum()),
        "answer_tokens": int(scores[:, ANSWER_TOKENS].sum()),
        "answer_ci95": None,
    }
    answered = scores[scores[:, ANSWER_TOKENS] > 0]
    if len(answered):
        nll, tokens = answered[:, ANSWER_NLL], answered[:, ANSWER_TOKENS]
        summary["answer"] = math.exp(nll.sum() / tokens.sum())
        summary["bits_per_byte"] = float(nll.sum() / math.log(2) / answered[:, ANSWER_BYTES].sum())
        # a row's loss and its tokens are drawn together: a long row weighs more in both
        summary["answer_ci95"] = np.exp(bootstrap_ci95(nll, tokens)).tolist()
    return summary


def evaluate_perplexity(model, tokenizer, texts, *, max_length, batch_size=8):
    """Perplexities of `texts` under a causal LM, plain or PEFT, each cut at `max_length` tokens.

    Returns full_text, answer (of the tokens after [/INST]), seed_protocol, bits_per_byte, tokens,
    answer_tokens and answer_ci95. Raises InputError where the loss is not finite.
    """
    return summarize_scores(score_rows(model, tokenizer, list(texts), max_length=max_length, batch_size=batch_size))


def paired_change(before, after):
    """Mean change of a row's answer NLL per token between two `score_rows` arrays, in nats.

    Each row is compared with itself, and the interval is over rows. None if no row has an answer.
    """
    before, after = np.asarray(before), np.asarray(after)
    answered = before[:, ANSWER_TOKENS] > 0
    # within a row its difficulty cancels out: this interval is far narrower than those of the two ends
    change = (after - before)[answered, ANSWER_NLL] / before[answered, ANSWER_TOKENS]
    if not len(change):
        return None
    return {"rows": len(change), **mean_with_ci95(change), "improved": float((change < 0).mean())}


def mean_with_ci95(values):
    """The mean of one value for each row, with its bootstrap interval over rows."""
    return {"mean": float(np.mean(values)), "ci95": bootstrap_ci95(values, np.ones(len(values))).tolist()}


# --------------------------------------------------------------------------------------------------
# Did it learn medicine, or the tone of medicine?

TITLE = re.compile(r"What is (.+?) and explain in detail\?")
TITLE_ROWS = 100  # at most so many articles take the title test
GENERAL_TEXT = "tests/tiny_gpt2/everyday.jsonl"
GENERAL_ARTICLES = 60


def score_titles(model, tokenizer, texts, max_length, *, batch_size=8, progress=None):
    """The title test: the loss of articles under their own title and under three others.

    Each article is cut to 500 characters, without the words that begin like one of its title (so
    that nothing can be copied), and is scored after its own row's prompt and after those of the next
    three rows -> list of (own, other, other, other), NLL per token in nats. [] below four articles.
    """
    prompts, articles = [], []
    for text in texts[:TITLE_ROWS]:
        prompt, article = text.split(ANSWER_MARK)
        # where a question is worded otherwise than the set's own, nothing that the prompt says can be copied
        title = TITLE.search(prompt)
        topic = title[1] if title else prompt
        # four letters, so that "diabetes" takes out "diabetic" as well; shorter words are mostly grammar
        stems = {word[:4].lower() for word in re.findall(r"\w{4,}", topic)}
        words = re.findall(r"\w+|\W+", article.replace(END_MARK, "").strip()[:500])
        without_title = "".join(word for word in words if word[:4].lower() not in stems)
        prompts.append(prompt + ANSWER_MARK)
        articles.append(" ".join(without_title.split()))  # one space where words went
    n = len(articles)
    if n < 4:
        return []
    # Article i under the titles of i, i + 1, i + 2, i + 3. The rows are shuffled, so neighbours are random; and each
    # title is used equally often, so that none can tip the result.
    rows = [f"{prompts[(i + k) % n]} {articles[i]}" for i in range(n) for k in range(4)]
    scores = score_rows(model, tokenizer, rows, max_length=max_length, batch_size=batch_size, progress=progress)
    nll, tokens = scores[:, ANSWER_NLL].reshape(n, 4), scores[:, ANSWER_TOKENS].reshape(n, 4)
    # Only articles that all four rows hold to their end: a long title may have pushed a part out.
    complete = (tokens > 0).all(1) & (tokens == tokens[:, :1]).all(1)
    return (nll[complete] / tokens[complete]).tolist()


def title_gains(losses):
    """How much lower each article's loss is under its own title than under the others, on average (articles,)."""
    own, others = np.array(losses)[:, :1], np.array(losses)[:, 1:]
    return (others - own).mean(1)


def summarize_titles(losses):
    """What `score_titles` found: how much a row's own title helps; None if nothing was scored.

    `gain` is the mean of loss(other title) - loss(own title), in nats per token; `own_wins` the
    share of comparisons in which its own title has the lower loss (chance: 0.5).
    """
    if not losses:
        return None
    own, others = np.array(losses)[:, 0], np.array(losses)[:, 1:]
    gain = mean_with_ci95(title_gains(losses))
    return {
        "articles": len(own),
        "gain": gain["mean"],
        "gain_ci95": gain["ci95"],
        "own_wins": float((others > own[:, None]).mean()),
        "own_loss": float(own.mean()),
        "other_loss": float(others.mean()),
    }


def compare_titles(before, after):
    """What `score_titles` found before and after, and the change of the gain, each article against itself."""
    change = mean_with_ci95(title_gains(after) - title_gains(before)) if before else None
    return {"before": summarize_titles(before), "after": summarize_titles(after), "gain_change": change}


def score_general_text(model, tokenizer, max_length, *, batch_size=8, progress=None):
    """Mean NLL per token of everyday articles without a prompt, in nats; None without tests/."""
    path = Path(__file__).resolve().parent / GENERAL_TEXT
    if not path.exists():
        return None
    # the first ones, not random ones, so that every run scores the same text
    lines = path.read_text(encoding="utf-8").splitlines()[:GENERAL_ARTICLES]
    articles = [json.loads(line)["article"] for line in lines]
    scores = score_rows(model, tokenizer, articles, max_length=max_length, batch_size=batch_size, progress=progress)
    return float(scores[:, NLL].sum() / scores[:, TOKENS].sum())


# --------------------------------------------------------------------------------------------------
# Answers


def pad_left(tokenizer, texts, device):
    """Prompts of unequal length as one batch for `generate`: input_ids, attention_mask (rows, tokens)."""
    # on the left: `generate` goes on from the last column, which must hold a real token
    rows = [row.ids for row in encode(tokenizer, texts, sys.maxsize)]
    width = max(len(ids) for ids in rows)
    input_ids = [[tokenizer.eos_token_id] * (width - len(ids)) + ids for ids in rows]
    attention_mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
    return {
        "input_ids": torch.tensor(input_ids, device=device),
        "attention_mask": torch.tensor(attention_mask, device=device),
    }


def ask(model, tokenizer, questions, *, max_new_tokens, temperature, seed, progress=None):
    """Ask all questions in one batch -> a list of (answer, whether it ended by itself).

    An answer is what follows the prompt, up to the first </s> or EOS. It is sampled from the 50
    likeliest tokens at `temperature` (0: greedy), with `seed`; torch's own random state is kept (but
    on Apple's GPUs), so that a question asked in validation doesn't change the training after it.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    prompts = pad_left(tokenizer, [format_prompt(question) for question in questions], base.device)
    # Complete, as nothing is inherited: load_model empties the model's own generation config.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,  # at 0, greedily, there is none
        top_k=50,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    width = prompts["input_ids"].shape[1]
    bar = progress_bar(progress, max_new_tokens, " tokens")

    def have_ended(input_ids, scores, **unused):
        """Which answers now hold </s> in their last tokens: in GPT-2's vocabulary it is no token of its own."""
        bar.update()
        tails = tokenizer.batch_decode(input_ids[:, max(width, input_ids.shape[1] - 8) :])
        return torch.tensor([END_MARK in tail for tail in tails], device=input_ids.device)

    cuda_devices = [base.device] if base.device.type == "cuda" else []
    with inference(base), torch.random.fork_rng(cuda_devices), bar:
        torch.manual_seed(seed)  # the same draws before and after: what differs is the model
        output = base.generate(**prompts, generation_config=config, stopping_criteria=[have_ended])
    return [until_end(tokenizer, ids) for ids in output[:, width:].tolist()]


def until_end(tokenizer, ids):
    """(text, True) of generated ids up to the first </s> or EOS; (text, False) if there is neither."""
    has_eos = tokenizer.eos_token_id in ids
    if has_eos:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    text, mark, _ = tokenizer.decode(ids).partition(END_MARK)
    return text.strip(), has_eos or mark != ""


def generate_answers(model, tokenizer, questions, *, max_new_tokens, temperature, seed):
    """The answers alone of `ask`, without the prompts -> list of str."""
    asked = ask(model, tokenizer, questions, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return [answer for answer, _ in asked]


def answer_stats(text, *, finished=None):
    """Counts of words, sentences, unique words and distinct bigrams, case ignored.

    `finished`: whether generation ended by itself; None: whether the text ends like a sentence.
    """
    words = re.findall(r"\w+(?:['’-]\w+)*", text.lower())
    sentences = [part for part in re.split(r"[.!?]+(?=\s|$)", text) if re.search(r"\w", part)]
    if finished is None:
        finished = re.search(r"[.!?][\"')\]]*\s*$", text) is not None
    return {
        "words": len(words),
        "sentences": len(sentences),
        "unique_words": len(set(words)),
        "distinct_bigrams": len(set(zip(words, words[1:], strict=False))),
        "finished": finished,
    }


def check_model(model, tokenizer):
    """Raise InputError for a model that scoring or asking would measure wrongly, in silence.

    The loss of a model that sees the tokens after it means nothing. And one that ignores the padding
    mask answers a question in a batch otherwise than alone.
    """
    ids = pad_left(tokenizer, [PROMPT], model.device)["input_ids"][:, :16]
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % len(tokenizer)

    def is_close(one, other):
        # rounding moves logits by little, another token or another prompt by their whole spread
        return torch.allclose(one.float(), other.float(), atol=0.1 * one.float().std().item())

    # another last token must not touch the logits before it
    with inference(model):
        one, other = model(input_ids=ids).logits[0, :-1], model(input_ids=changed).logits[0, :-1]
    if not is_close(one, other):
        raise InputError(
            "MODEL_NAME: this model is not causal: its loss at a token depends on later tokens "
            "(a config.json with `is_decoder: false`?)"
        )

    def first_logits(texts):
        """The logits of the first text's first new token."""
        batch = pad_left(tokenizer, texts, model.device)
        config = GenerationConfig(max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        return model.generate(**batch, generation_config=config).logits[0][0]

    # a short prompt alone, and padded beside a longer one
    with inference(model):
        alone, beside = first_logits(["What is gout?"]), first_logits(["What is gout?", PROMPT])
    if not is_close(alone, beside):
        raise InputError(
            "MODEL_NAME: this model ignores the attention mask: questions of unequal length would "
            "be answered otherwise in a batch than alone"
        )


# --------------------------------------------------------------------------------------------------
# Speed. Skip it at a first reading: but for rounding, nothing here changes what is computed.

CHUNK = 1024  # positions whose logits are in memory at a time


def is_rounded(model):
    """Whether speed_up has rounded the model's matrices to bf16."""
    return any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def round_up(length, in_bf16):
    """The length that rows are padded to: in bf16, each new shape costs a CPU a new kernel."""
    step = 64 if in_bf16 else 8
    return math.ceil(length / step) * step


def speed_up(model, precision):
    """Make a frozen model fast on its device; in bf16 its matrices are rounded once, here.

    Everything else stays in fp32, and autocast works with both. The LM head is centred over the
    vocabulary before: that adds one number to all logits of a position, which no probability
    notices, but GPT-2's logits lie near -100, where neighbours in bf16 are half a unit apart.
    """
    # Without AMX, torch's fused attention takes twice the time of plain matrix products.
    if model.device.type == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16"):
        model.set_attn_implementation("eager")
    if precision != "bf16":
        return model

    head = model.get_output_embeddings()
    matrices = [module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    if not has_plain_head(model):
        matrices = [module for module in matrices if module is not head]
    for module in matrices:
        weight = module.weight
        if module is head:
            weight = weight - weight.mean(0)  # the embeddings keep what they shared with the head
        module.weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
    return model


def has_plain_head(model):
    """Whether a causal LM's logits are its hidden states times one matrix: no bias, scale or cap."""
    ids = torch.arange(8, device=model.device)[None]
    head = model.get_output_embeddings().weight
    with inference(model):
        logits = type(model).forward(model, input_ids=ids).logits
        plain = model.base_model(input_ids=ids)[0].to(head.dtype) @ head.T
    if logits.shape != plain.shape:
        return False
    return torch.allclose(logits.float(), plain.float(), rtol=1e-2, atol=1e-2)


def run_start(model, rows, plain_head):
    """Run the tokens that all Rows begin with, but for the last -> (NLL of those after the first, cache).

    The last is left for the rows themselves, whose first token is not predicted. Models that remember
    otherwise than by the keys and values of every token have no cache here: ([], None).
    """
    nothing = torch.zeros(0, dtype=torch.float64), None
    start = os.path.commonprefix([row.ids for row in rows])
    if len(start) < 2:
        return nothing
    # once for the cache, and once with the last token, for the loss
    ids = torch.tensor([start], device=model.device)
    cache = model.base_model(ids[:, :-1], use_cache=True).get("past_key_values")
    if type(cache) is not DynamicCache or cache.get_seq_length() != len(start) - 1:
        return nothing
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return nothing
    return label_nll(model, ids, ids, plain_head)[0].cpu().double(), cache


def repeat_cache(cache, rows):
    """A copy of a cache of one row, for as many rows: a forward pass writes into it."""
    if cache is None:
        return None
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(rows)
    return repeated


class ChunkedNLL(torch.autograd.Function):
    """Cross-entropy under a frozen LM head, CHUNK positions at a time.

    hidden (n, d), weight (vocabulary, d), labels (n,) -> NLL (n,) in fp32. The gradient for `hidden`
    is taken along in the forward pass. So the logits of a whole batch, by far the largest tensor in
    the training step of a small language model, never exist.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        n = len(labels)
        spare = round_up(n, weight.dtype == torch.bfloat16) - n  # n is another in every batch
        hidden = F.pad(hidden, (0, 0, 0, spare))
        labels = F.pad(labels, (0, spare))
        nll, gradients = [], []
        for part, label in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
            log_probs = (part @ weight.T).float().log_softmax(-1)  # (chunk, vocabulary)
            nll.append(F.nll_loss(log_probs, label, reduction="none"))
            if ctx.needs_input_grad[0]:
                # the gradient of a position's logits: its probabilities, less 1 at the label;
                # in place, as this is the largest tensor of all
                probs = log_probs.exp_()
                probs[torch.arange(len(label)), label] -= 1
                gradients.append(probs.to(part.dtype) @ weight)
        ctx.save_for_backward(torch.cat(gradients)[:n] if gradients else None)
        return torch.cat(nll)[:n]

    @staticmethod
    def backward(ctx, grad_nll):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_nll[:, None].to(gradient.dtype), None, None


class Machine(NamedTuple):
    """What the script runs on."""

    device: str  # "cuda", "mps" or "cpu"
    precision: str  # "bf16", "fp16" or "fp32"
    name: str


def choose_hardware():
    """This Machine; on a CPU, threads and allocator are set, too.

    The precision is bf16 where the hardware multiplies matrices in it; where it only emulates that,
    fp32 is faster. Raises InputError where several GPUs meet a single process.
    """
    # A scheduler may set these and leave them empty, which none of the libraries expects.
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if os.environ.get(name) == "":
            del os.environ[name]
    processes = int(os.environ.get("WORLD_SIZE", 1))
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if processes == 1 and gpus > 1:  # the Trainer would split each batch in a way that SFTTrainer refuses
            raise InputError(f"{gpus} GPUs: use torchrun --nproc_per_node={gpus}, or one with CUDA_VISIBLE_DEVICES=0")
        if local_processes > gpus:
            raise InputError(f"more processes than GPUs: torchrun --nproc_per_node={gpus}")
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Machine("cuda", "bf16" if has_bf16 else "fp16", torch.cuda.get_device_name())
    if torch.backends.mps.is_available():
        return Machine("mps", "fp32", "Apple GPU")

    tune_cpu(processes, local_processes)
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return Machine("cpu", "bf16" if cpu_has_bf16() else "fp32", name)


def cpu_has_bf16():
    """Whether this CPU multiplies matrices in bf16, rather than emulate it."""
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))


def tune_cpu(processes, local_processes):
    """Set this process's allocator and threads."""
    # On Linux, half of a training step would be the mapping of fresh memory: let glibc keep what is
    # freed, and take it in large pieces.
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 2**28)
    if processes > 1:  # torchrun allows each process one thread
        cores = psutil.cpu_count(logical=False) or os.cpu_count()
        torch.set_num_threads(max(1, cores // local_processes))


# --------------------------------------------------------------------------------------------------
# Training


class Progress(TrainerCallback):
    """Times the optimizer steps, without evaluation and saving, and shows how far they are."""

    def on_train_begin(self, args, state, control, **kwargs):
        # a resumed run goes on counting from its last log line
        seconds = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        self.seconds = seconds[-1] if seconds else 0.0
        self.began = time.monotonic()
        self.first_step = state.global_step
        self.losses = {}
        self.bar = progress_bar("training", state.max_steps, " steps")
        self.bar.update(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.started
        self.bar.update()
        if state.global_step >= state.max_steps:
            # The adapter is saved and scored right after the last step; and a run resumed from a
            # checkpoint of it would take one step more.
            control.should_log = True
            control.should_evaluate = False
            control.should_save = False

    def on_log(self, args, state, control, logs, **kwargs):
        # called twice at a step with validation: with the training loss, then with the validation loss
        names = {"loss": "training", "eval_loss": "validation"}
        self.losses |= {names[name]: value for name, value in logs.items() if name in names}
        if "loss" in logs and control.should_evaluate:
            return  # both go into one line
        rate = state.num_input_tokens_seen / self.seconds
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items())
        line = f"{losses}  {rate:,.0f} tokens/s"
        self.losses = {}
        if not self.bar.disable:
            self.bar.set_postfix_str(line)
            return
        elapsed = time.monotonic() - self.began
        steps_left = state.max_steps - state.global_step
        left = elapsed * steps_left / max(state.global_step - self.first_step, 1)
        say(
            f"step {state.global_step:>4,}/{state.max_steps:,}  {line}  "
            f"{tqdm.format_interval(elapsed)}, {tqdm.format_interval(left)} left"
        )

    def on_save(self, args, state, control, **kwargs):
        # The Trainer's own rotation goes by time stamps, which a clock set back turns around. Two stay: should
        # the newest be damaged, it can be deleted.
        if args.should_save:
            for old in checkpoints(args.output_dir)[:-2]:
                shutil.rmtree(old, ignore_errors=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        say(f"trained in {tqdm.format_interval(time.monotonic() - self.began)}")


class LoRATrainer(SFTTrainer):
    """SFTTrainer with an exact validation loss and, on a CPU, a faster training loss (see label_nll).

    `validate(model)` returns the validation losses to log, as a dict.
    """

    def __init__(self, *args, validate, **kwargs):
        self.progress = Progress()
        self.validate = validate
        super().__init__(*args, callbacks=[self.progress], **kwargs)
        # the Trainer's own would print dicts between the lines of Progress
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.base = self.model.get_base_model()
        # on GPUs TRL's own loss stays: this one has not been measured there
        self.own_loss = self.base.device.type == "cpu" and has_plain_head(self.base)
        if self.own_loss:
            # Installed as the model's forward, so that PEFT, autocast and DDP wrap it like the original.
            forward = functools.partial(loss_or_logits, self.base)
            self.base.forward = functools.update_wrapper(forward, type(self.base).forward)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.own_loss:
            nll = model(input_ids=inputs["input_ids"], labels=inputs["labels"])
            # The items are those of all processes. DDP divides the sum of their gradients by their number,
            # so each process divides by its share alone.
            tokens_per_process = num_items_in_batch / self.accelerator.num_processes
            loss = nll.sum() / max(tokens_per_process, 1)  # 0 where no row of the step has an answer
        else:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        # before the optimizer's step, or it would get into the adapter and its next checkpoint
        if not self.accelerator.gather(loss.detach()).isfinite().all():
            raise InputError(
                f"the training loss is not finite at step {self.state.global_step + 1}: lower "
                f"LEARNING_RATE, now {self.args.learning_rate:g}; the last good checkpoint stays "
                f"in {self.args.output_dir}"
            )
        return loss

    def evaluate(self, *args, **kwargs):
        metrics = self.validate(self.model)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs, start_time=None):
        # what report and plots read, without run times
        names = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_answer_loss")
        logs = {name: logs[name] for name in names if name in logs}
        if logs:
            super().log(logs | {"seconds": round(self.progress.seconds, 3)})

    def create_model_card(self, *args, **kwargs):
        """None in checkpoints; the adapter gets its own."""


def loss_or_logits(model, input_ids, labels=None, **kwargs):
    """A causal LM's forward: with labels the NLL of each, else what it was (`generate` wants it)."""
    if labels is None:
        return type(model).forward(model, input_ids, **kwargs)
    return label_nll(model, input_ids, labels, plain_head=True)


def checkpoints(folder):
    """The checkpoints that the Trainer wrote to their end, in the order of their steps.

    trainer_state.json is the last file that it writes.
    """
    whole = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    whole = [path for path in whole if load_json(path / "trainer_state.json") is not None]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def needs_checkpointing(model, rows, length):
    """Whether to use gradient checkpointing: a forward pass's activations would fill the free memory.

    They are then computed again in the backward pass, which costs a third more time.
    """
    # of a layer, roughly: 34 bytes for each hidden unit, 5 for each attention weight
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    bytes_per_token = config.num_hidden_layers * (34 * config.hidden_size + 5 * heads * length)
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        free = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return rows * length * bytes_per_token > 0.6 * free


def add_adapter(model, lora, seed):
    """The model with a fresh LoRA adapter. Raises InputError where the settings don't fit it."""
    transformers.set_seed(seed)  # LoRA's A is random
    what = f"LORA_TARGET_MODULES = {lora.target_modules!r}"
    try:
        model = get_peft_model(model, lora)
    except (ValueError, re.error) as error:
        raise InputError(f"{what}: {str(error).splitlines()[0]}") from error
    # label_nll takes the head's weight as it is: an adapter there would be trained unseen
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(isinstance(module, BaseTunerLayer) for module in ends):
        raise InputError(f"{what}: not embeddings or the LM head")
    return model


def training_data(encoded, on_prompt):
    """Rows as the Trainer takes them: input_ids, and labels, which are -100 where no loss is taken."""
    labels = []
    for row in encoded:
        # the first token is never predicted, and for GPT-2 the Trainer would count it all the same
        first = 1 if on_prompt else max(row.first, 1)
        labels.append([-100] * first + row.ids[first:])
    return datasets.Dataset.from_dict({"input_ids": [row.ids for row in encoded], "labels": labels})


def fine_tune(cfg, model, tokenizer, encoded, held_out, run, machine, base_name):
    """Train the adapter and save it, from the newest checkpoint on.

    Returns "training", "hardware" and "versions", as results.json has them.
    `encoded` are the training rows, `held_out` the texts to validate on; `base_name` is what
    the saved adapter calls its base model.
    """
    # On a CPU one row at a time is as fast as several and needs no padding. The rows of a step, and
    # so its gradient, are the same.
    batch_size, accumulation = cfg.BATCH_SIZE, cfg.GRADIENT_ACCUMULATION_STEPS
    if machine.device == "cpu":
        batch_size, accumulation = 1, cfg.BATCH_SIZE * cfg.GRADIENT_ACCUMULATION_STEPS
    config = SFTConfig(
        output_dir=str(run / "checkpoints"),
        seed=cfg.SEED,
        data_seed=cfg.SEED,
        max_length=cfg.MAX_LENGTH,
        num_train_epochs=cfg.NUM_EPOCHS,
        max_steps=cfg.MAX_STEPS,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=cfg.LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=cfg.WARMUP_RATIO,  # below 1: a share of all steps
        max_grad_norm=cfg.MAX_GRAD_NORM,
        logging_steps=cfg.LOGGING_STEPS,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=cfg.EVAL_STEPS,
        save_steps=cfg.LOGGING_STEPS,  # no checkpoint holds the losses summed up since the last line
        log_level_replica="error",  # what `hush` silenced stays so on all processes
        report_to=cfg.REPORT_TO,
        run_name=run.name,
        include_num_input_tokens_seen="non_padding",  # tokens/s must not rise with padding
        use_cpu=machine.device == "cpu",
        bf16=machine.precision == "bf16",
        fp16=machine.precision == "fp16",
        gradient_checkpointing=needs_checkpointing(model, batch_size, cfg.MAX_LENGTH),
        # 8 or 64, or what of that divides MAX_LENGTH: padding must not go beyond it
        pad_to_multiple_of=math.gcd(round_up(1, is_rounded(model)), cfg.MAX_LENGTH),
        dataloader_pin_memory=machine.device == "cuda",
        ddp_find_unused_parameters=False,  # every adapter weight takes part in every step
    )

    first_question = next(iter(cfg.QUESTIONS.values()))

    def validate(model):
        size = {"max_length": cfg.MAX_LENGTH, "batch_size": cfg.BATCH_SIZE}
        scores = score_rows(model, tokenizer, held_out, **size, progress="validation")
        sample = on_first(
            lambda: ask(model, tokenizer, [first_question], max_new_tokens=30, temperature=0, seed=cfg.SEED)
        )
        say(f"  it now says: {' '.join(sample[0][0].split())} ...")
        return validation_losses(scores, cfg.TRAIN_ON_PROMPT)

    data = training_data(encoded, cfg.TRAIN_ON_PROMPT)
    trainer = LoRATrainer(
        model=model,
        args=config,
        train_dataset=data,
        eval_dataset=data.select([0]),  # the Trainer asks for one; `validate` scores the real one
        processing_class=tokenizer,
        validate=validate,
    )
    found = on_first(lambda: checkpoints(config.output_dir))
    if found and machine.precision != "fp16":  # a scaler left by an fp16 machine
        (found[-1] / "scaler.pt").unlink(missing_ok=True)
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)

    if trainer.args.should_save:
        save_adapter(model, tokenizer, run / "adapter", base_name)
    return {"training": training_results(trainer)} | describe_machine(machine)


def save_adapter(model, tokenizer, folder, base_name):
    """Write the adapter and its tokenizer; it names its base as the user does, not a cache's folder."""
    model.peft_config["default"].base_model_name_or_path = base_name
    # without the embeddings, which PEFT would ask the Hub about and no adapter here changes
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)


def count_parameters(model):
    """(trainable, all) parameters of a PEFT model; a head that speed_up parted from its embeddings counts once."""
    trainable, total = model.get_nb_trainable_parameters()
    head = model.get_output_embeddings().weight
    is_tied = model.config.get_text_config().tie_word_embeddings
    if is_tied and head is not model.get_input_embeddings().weight:
        total -= head.numel()
    return trainable, total


def training_results(trainer):
    """results["training"] from a finished Trainer: real tokens, seconds of the optimizer steps, log history."""
    trainable, total = count_parameters(trainer.model)
    seconds, tokens = trainer.progress.seconds, trainer.state.num_input_tokens_seen
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_answer_loss")
    history = [
        # fp16 may scale a gradient to infinity, which JSON does not know
        {name: entry[name] for name in names if name in entry and math.isfinite(entry[name])}
        for entry in trainer.state.log_history
    ]
    return {
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "log_history": history,
    }


def validation_losses(scores, on_prompt):
    """The losses that a `score_rows` array stands for in the log history, in nats per token.

    eval_loss is over what the training loss sees: whole rows, or the answers alone.
    """
    nll, tokens, answer_nll, answer_tokens, _ = np.sum(scores, axis=0)
    answer_loss = float(answer_nll / max(answer_tokens, 1))
    whole_loss = float(nll / tokens)
    return {
        "eval_loss": whole_loss if on_prompt else answer_loss,
        "eval_answer_loss": answer_loss,
    }


def peak_memory():
    """The most memory that this process has held so far, in GiB: the GPU's where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def describe_machine(machine):
    """results["hardware"] and results["versions"], as they are when the training ends."""
    hardware = machine._asdict() | {
        "processes": PartialState().num_processes,
        "threads": torch.get_num_threads(),
        "peak_memory_gib": peak_memory(),
    }
    versions = {"python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"hardware": hardware, "versions": versions}


# --------------------------------------------------------------------------------------------------
# Results: plots, report, model card

MEASURES = {
    "answer": "answers only",
    "full_text": "full text",
    "seed_protocol": "reference protocol",  # the project that is redone here is called its seed
    "bits_per_byte": "answers, bits per byte",
}
LOSS_ON = {True: "all tokens", False: "the answers only"}  # by TRAIN_ON_PROMPT: what the training loss is over
BEFORE_COLOR, AFTER_COLOR = "#999999", "#0072B2"


def percent(share):
    """A share as a percentage, in the one way that screen, report and plots write it."""
    return f"{100 * share:.0f} %"


def percent_change(before, after):
    return f"{100 * (after / before - 1):+.0f} %"


def new_plot(title, xlabel):
    """A figure with one empty plot -> (fig, ax)."""
    fig = Figure(figsize=(9, 5.4), layout="tight")
    ax = fig.subplots()
    ax.set_title(title, parse_math=False)  # a `$` in a file's name begins no formula
    ax.set_xlabel(xlabel)
    ax.spines[["top", "right"]].set_visible(False)
    return fig, ax


def plot_training_loss(log_history, path, *, title="Fine-tuning", loss_on="all tokens"):
    """Losses in nats per token over optimizer steps, from the Trainer's log history.

    A training loss is the mean since the one logged before, and stands in the middle of its window.
    """
    curves = {
        "eval_answer_loss": ("validation, answers only", AFTER_COLOR, "o-", 2.5),
        "eval_loss": (f"validation, {loss_on}", "#D55E00", "o-", 1.2),
        "loss": (f"training, {loss_on}", "#999999", ".-", 1.2),
    }
    if loss_on != "all tokens":
        del curves["eval_answer_loss"]  # it is the validation's
    fig, ax = new_plot(title, "optimizer step (0: the base model)")
    for name, (label, color, style, width) in curves.items():
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        if not points:
            continue
        steps, losses = np.array(points).T
        if name == "loss":
            steps = steps - np.diff(steps, prepend=0) / 2  # to the middle of its window
        label = f"{label}: {losses[0]:.2f} to {losses[-1]:.2f}"
        ax.plot(steps, losses, style, color=color, linewidth=width, label=label)
    ax.set_ylabel("loss (nats per token)")
    ax.grid(alpha=0.3)
    if ax.lines:
        ax.legend()
    fig.savefig(path, format="png", dpi=150)


def plot_perplexity(before, after, path, *, title="Perplexity on held-out text"):
    """Bars before and after: the answers' with their 95 % interval, and thin ones of whole rows."""
    # label, height, opacity, font size: the measure to look at is tall and dark, the others step back
    measures = {
        "answer": ("answers only\n(95 % interval)", 1.0, 1.0, 14),
        "full_text": ("full text,\nprompts too", 0.4, 0.4, 10),
        "seed_protocol": ("reference protocol,\nprompts too", 0.4, 0.4, 10),
    }
    fig, ax = new_plot(title, "perplexity (lower is better)")
    top = 0.0
    ticks, tick_labels = [], []
    for name, (label, height, alpha, size) in measures.items():
        if not before[name]:
            continue
        ticks.append(top + height)  # between the two bars
        tick_labels.append(label)
        for when, scores, color in (("before", before, BEFORE_COLOR), ("after", after, AFTER_COLOR)):
            value = end = scores[name]
            middle = top + height / 2
            ax.barh(middle, value, 0.9 * height, color=color, alpha=alpha)
            if name == "answer":
                low, end = scores["answer_ci95"]
                ax.hlines(middle, low, end, color="black")
            text = f"{when} {value:.2f}"
            if when == "after":
                text += f" ({percent_change(before[name], value)})"
            ax.annotate(text, (end, middle), (6, 0), textcoords="offset points", va="center", fontsize=size)
            top += height
        top += 0.6
    ax.set_yticks(ticks, tick_labels)
    ax.invert_yaxis()
    ax.margins(x=0.25)
    fig.savefig(path, format="png", dpi=150)


REPORT = """\
# LoRA fine-tuning of {{ short_name(model) | cell }} on {{ short_name(dataset) | cell }}

{% if offline_fallback %}
**Offline default: a tiny model and a small data set that ship with the script. No figure is GPT-2's.**

{% endif %}
None of the text below is medical advice: language models state falsehoods fluently.

{% if before.answer %}
**Answer perplexity {{ before.answer | two }} ({{ before.answer_ci95 | interval }}) before,
{{ after.answer | two }} ({{ after.answer_ci95 | interval }}) after**: how unsure {{ short_name(model) }} is of the next
token of {{ data.test_rows | count }} held-out articles, as if it chose among so many equally likely ones. In brackets:
95 % intervals. The answers' loss fell in {{ (row_change.improved * row_change.rows) | count }} of \
{{ row_change.rows | count }} articles.

{% endif %}
{% set has_shares = fall_of.prompts.fall >= 0 and fall_of.answers.fall > 0 %}
{% set the_prompts = "the prompts, which the rows share" ~ (
    ", and which are learned by heart" if settings.TRAIN_ON_PROMPT and fall_of.prompts.fall > 0) %}
{% if has_shares %}
Of the whole fall in loss over all tokens, {{ (fall_of.prompts.fall / fall_of.all.fall) | percent }} is on
{{ the_prompts }}. The articles' own share is {{ (fall_of.answers.fall / fall_of.all.fall) | percent }}.
{% else %}
The loss went from {{ fall_of.prompts.before | two }} to {{ fall_of.prompts.after | two }} nats per token on
{{ the_prompts }}{% if fall_of.answers.tokens %}, and from {{ fall_of.answers.before | two }} to \
{{ fall_of.answers.after | two }} on the articles{% endif %}.
{% endif %}

{% if titles.held_out.before %}
{% set before_title, after_title, gain = titles.held_out.before, titles.held_out.after, titles.held_out.gain_change %}
Medicine, or its tone? Under their own titles the loss of held-out articles' beginnings changed by
{{ (after_title.own_loss - before_title.own_loss) | change }} nats per token, under wrong titles by \
{{ (after_title.other_loss - before_title.other_loss) | change }}. What changes there, too, is
language, tone, what all articles share. Only the gain from the own title can be about the topic:
it changed by {{ gain.mean | change }} ({{ gain.ci95 | three_to_three }})\
{{ ", which can't be told from zero" if gain.ci95[0] <= 0 <= gain.ci95[1] }}\
{{ ", so it helps less than before" if gain.ci95[1] < 0 }} ([the test](#medicine-or-its-tone)).

{% endif %}
## The answers

{% if settings.TEMPERATURE %}
Sampled from the 50 likeliest tokens at temperature {{ settings.TEMPERATURE }} with seed {{ settings.SEED }},
{% else %}
The likeliest token each time,
{% endif %}
at most {{ settings.MAX_NEW_TOKENS }} tokens, asked in the format of the training rows; before and after alike.

<table>
<tr><th width="50%">before</th><th width="50%">after</th></tr>
{% for answer in answers %}
<tr><td colspan="2"><b>{{ answer.topic | cell }}</b><br>{{ answer.question | cell }}</td></tr>
<tr><td valign="top">{{ answer.before | cell }}</td><td valign="top">{{ answer.after | cell }}</td></tr>
{% endfor %}
</table>

| before → after | words | word pairs repeated | ended by itself |
| --- | --- | --- | --- |
{% for answer in answers %}
| {{ answer.topic | cell }} | {{ answer.before_stats.words }} → {{ answer.after_stats.words }} \
| {{ answer.before_stats | repeated }} → {{ answer.after_stats | repeated }} \
| {{ answer.before_stats | ended }} → {{ answer.after_stats | ended }} |
{% endfor %}

{% if titles.held_out.before %}
## Medicine, or its tone?

Does its own title help the model with an article? The first 500 characters of {{ titles.held_out.before.articles }}
held-out articles, and of {{ titles.trained.before.articles if titles.trained.before else "no" }} \
{{ "that were trained on" if epochs >= 1 else "of the training rows (" ~ (epochs | percent) ~ " had their turn)" }},
were scored under their own question and under those of three others; words that begin like one of the title's were
taken out, so that they can't be copied (those of up to three letters stay). The gain is how much lower the loss is
under the own title.

| articles | | before | after |
| --- | --- | ---: | ---: |
{% for name, test in titles | items if test.before %}
| {{ name | replace("_", "-") }} | gain, nats per token | {{ test.before.gain | three }} \
({{ test.before.gain_ci95 | three_to_three }}) | {{ test.after.gain | three }} \
({{ test.after.gain_ci95 | three_to_three }}) |
| | comparisons that the own title wins (chance: 50 %) | {{ test.before.own_wins | percent }} \
| {{ test.after.own_wins | percent }} |
{% endfor %}

A gain of trained articles alone is learned by heart.

{% endif %}
{% if general.before %}
**General text**: on everyday articles without a prompt (plain English, on which the tiny model of the offline default
was trained) the loss went from {{ general.before | three }} to {{ general.after | three }} nats per token. A rise means
that the adapter costs general ability.

{% endif %}
## Perplexity on the held-out rows

| | before | after | change |
| --- | ---: | ---: | ---: |
{% for name, label in measures | items %}
| {{ label }} | {{ before[name] | two }} | {{ after[name] | two }} \
| {{ (before[name], after[name]) | percent_change }} |
{% endfor %}

- **Answers only**: exp of the mean loss of the {{ before.answer_tokens | count }} tokens after `[/INST]`, the closing
  `</s>` among them. The one to look at.
- **Full text**: the same of all {{ before.tokens | count }} tokens, the prompts' too. Rows are cut at \
{{ settings.MAX_LENGTH }} tokens.
- **Reference protocol**: exp of the mean of the rows' mean losses, over the first 100 rows at most.
- **Bits per byte**: the answers' loss in bits, by bytes of text rather than tokens: comparable between tokenizers, as
  long as no row is cut.

{% if row_change %}
With every article counted alike, the answers' loss changed by {{ row_change.mean | two }} nats per token (95 % interval
{{ row_change.ci95 | interval }}, a bootstrap over rows).
{% endif %}

![Perplexity before and after](perplexity_comparison.png)

## Where the fall comes from

| tokens | number | loss before | loss after | fall | share |
| --- | ---: | ---: | ---: | ---: | ---: |
{% for name, part in fall_of | items %}
| {{ name }} | {{ part.tokens | count }} | {{ part.before | two }} | {{ part.after | two }} \
| {{ part.fall | count }} | {{ (part.fall / fall_of.all.fall) | percent if has_shares else "–" }} |
{% endfor %}

Losses in nats per token, the fall in nats over all tokens.

## Training

| step | training loss | validation loss | validation loss, answers |
| ---: | ---: | ---: | ---: |
{% for step, entry in losses | items if "eval_loss" in entry %}
| {{ step }} | {{ entry.loss | two }} | {{ entry.eval_loss | two }} | {{ entry.eval_answer_loss | two }} |
{% endfor %}

In nats per token, on {{ loss_on }}. Validation is the whole held-out split: step 0 the base model, the last line the
saved adapter. The training loss, with dropout, is the mean over the steps since it was last logged; the plot shows
them all.

![Training and validation loss](training_loss.png)

## Use the adapter

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "{{ adapter_folder }}"  # from where this file is
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = {{ answers[0].prompt | pprint }}
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
output = model.generate(**inputs, max_new_tokens={{ settings.MAX_NEW_TOKENS }}, \
{{ "do_sample=True, top_k=50, temperature=%s" % settings.TEMPERATURE if settings.TEMPERATURE else "do_sample=False" }})
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer.split("</s>")[0])
```

## What was run

- **Model**: {{ model | cell }}, {{ "revision " ~ model_revision if model_revision else "a local folder" }}
- **Data**: {{ dataset | cell }}, {{ "revision " ~ dataset_revision if dataset_revision else "a local file" }}
- **Rows**: {{ data.train_rows | count }} to train on and {{ data.test_rows | count }} held out, of \
{{ data.rows | count }}; dropped: {{ data.dropped_empty | count }} without an answer, \
{{ data.dropped_duplicate | count }} duplicates, {{ data.dropped_malformed | count }} malformed (not one `[/INST]`)
- **Cut**: {{ data.truncated_train_rows | count }} training rows \
({{ (data.truncated_train_rows / data.train_rows) | percent }}) did not fit into {{ settings.MAX_LENGTH }} tokens and \
never show the model an end
- **LoRA**: r {{ settings.LORA_R }}, alpha {{ settings.LORA_ALPHA }}, dropout {{ settings.LORA_DROPOUT }}, on \
{{ settings.LORA_TARGET_MODULES or "PEFT's default modules" }}: \
{{ training.trainable_parameters | count }} trainable of {{ training.total_parameters | count }} parameters
- **Dropout of the base model** in training: \
{{ "as its config says" if settings.BASE_DROPOUT is none else settings.BASE_DROPOUT }}
- **Training**: {{ training.steps | count }} steps of {{ rows_per_step | count }} rows, learning rate \
{{ settings.LEARNING_RATE }}, linear, warm-up {{ settings.WARMUP_RATIO | percent }}, gradient norm at most \
{{ settings.MAX_GRAD_NORM or "any" }}, seed {{ settings.SEED }}, loss on {{ loss_on }}
- **Speed**: {{ training.seconds | count }} s of optimizer steps for {{ training.tokens | count }} tokens, \
{{ training.tokens_per_second | count }} a second
{% if hardware.stage_seconds %}
- **Time**: {{ hardware.stage_seconds.values() | sum | count }} s for all stages (each from its last start)\
{% for stage, seconds in hardware.stage_seconds | items %}
; {{ stage }} {{ seconds | count }} s\
{% endfor %}

{% endif %}
- **Memory**: at most {{ hardware.peak_memory_gib | two }} GiB until the training's end
- **Hardware** of the training: {{ hardware.name }}, {{ hardware.device }}, {{ hardware.precision }}; \
{{ hardware.processes }} process(es) of {{ hardware.threads }} threads
- **Versions**: {{ version_list }}
"""


def as_cell(text):
    """Text that stays in its place in Markdown and HTML, whatever it holds: escaped, on one line."""
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in str(text))
    text = html.escape(text).replace("|", "&#124;").replace("`", "&#96;")
    return text.replace("\n", "<br>")


def repeated_pairs(stats):
    """The share of an answer's word pairs that it has said before."""
    pairs = max(stats["words"] - 1, 1)
    return percent(max(0, 1 - stats["distinct_bigrams"] / pairs) if stats["words"] > 1 else 0)


FILTERS = {
    "two": lambda x: f"{x:,.2f}" if isinstance(x, int | float) else "–",
    "three": lambda x: f"{x:.3f}",
    "change": lambda x: f"{x:+.3f}",
    "count": lambda n: f"{n:,.0f}",
    "percent": percent,
    "interval": lambda ends: f"{ends[0]:,.2f} to {ends[1]:,.2f}",
    "three_to_three": lambda ends: f"{ends[0]:.3f} to {ends[1]:.3f}",
    "percent_change": lambda pair: percent_change(*pair) if pair[0] else "–",
    "cell": as_cell,
    "repeated": repeated_pairs,
    "ended": lambda stats: "yes" if stats["finished"] else "no",
}


def split_fall(before, after):
    """The fall in loss over all held-out tokens, split between prompts and answers.

    Takes the perplexities before and after -> {"prompts", "answers", "all"}, each with its tokens, loss
    per token before and after, and the fall in nats.
    """
    all_tokens, answer_tokens = before["tokens"], before["answer_tokens"]
    # a perplexity is exp(NLL / tokens); (2,), before and after
    nll = np.array([all_tokens * math.log(scores["full_text"]) for scores in (before, after)])
    answer_nll = np.array([answer_tokens * math.log(scores["answer"] or 1) for scores in (before, after)])
    parts = {
        "prompts": (all_tokens - answer_tokens, nll - answer_nll),
        "answers": (answer_tokens, answer_nll),
        "all": (all_tokens, nll),
    }
    split = {}
    for name, (tokens, (nll_before, nll_after)) in parts.items():
        per_token = {"before": nll_before / max(tokens, 1), "after": nll_after / max(tokens, 1)}
        split[name] = {"tokens": tokens, "fall": nll_before - nll_after, **per_token}
    return split


def render_report(results, adapter_folder):
    """The report as Markdown, from what results.json holds and from that alone."""
    settings = results["settings"]
    losses = {}  # step -> the log entries of that step, as one
    for entry in results["training"]["log_history"]:
        losses.setdefault(entry["step"], {}).update(entry)
    rows_per_step = settings["BATCH_SIZE"] * settings["GRADIENT_ACCUMULATION_STEPS"]

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters.update(FILTERS)
    environment.globals["short_name"] = short_name
    perplexity = results["perplexity"]
    return environment.from_string(REPORT).render(
        results,  # every key of results.json is a name in the template, as are these:
        before=perplexity["before"],
        after=perplexity["after"],
        row_change=perplexity["change"],
        fall_of=split_fall(perplexity["before"], perplexity["after"]),
        titles=perplexity["title"],
        general=perplexity["general"],
        measures=MEASURES,
        losses=losses,
        epochs=results["training"]["log_history"][-1]["epoch"],
        loss_on=LOSS_ON[settings["TRAIN_ON_PROMPT"]],
        rows_per_step=rows_per_step * results["hardware"]["processes"],
        version_list=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        adapter_folder=adapter_folder,
    )


def write_report(results, path):
    """Write report.md; `results` is what results.json holds."""
    write_text(path, render_report(results, adapter_folder="adapter"))


def write_model_card(results, folder):
    """Write the adapter's README.md: the report, with the metadata that the Hub reads in front.

    The plots are copied beside it, so that a pushed adapter shows its whole story.
    """
    model, dataset = results["model"], results["dataset"]
    is_gpt2 = re.fullmatch(r"(openai-community/)?gpt2(-\w+)?", model)
    metadata = huggingface_hub.ModelCardData(
        model_name=f"{short_name(model)}-{short_name(dataset)}-lora",
        library_name="peft",
        tags=["lora", "sft", "trl"],
        license="mit" if is_gpt2 else "other",
        license_name=None if is_gpt2 else "as-the-base-model",
        pipeline_tag="text-generation",
        base_model=model if results["model_revision"] else None,
        datasets=[dataset] if results["dataset_revision"] else None,
    )
    report = render_report(results, adapter_folder=".")
    write_text(folder / "README.md", f"---\n{metadata.to_yaml()}\n---\n\n{report}")
    for plot in ("training_loss.png", "perplexity_comparison.png"):
        shutil.copyfile(folder.parent / plot, folder / plot)


# --------------------------------------------------------------------------------------------------
# Settings, machine, folder, errors


def is_text(value):
    return isinstance(value, str) and value.strip() != ""


def are_texts(values):
    return len(values) > 0 and all(is_text(value) for value in values)


def is_whole(value, least=1):
    return type(value) is int and least <= value < 2**31  # type(), as True is an int, too


def is_number(value, below=math.inf):
    return type(value) in (int, float) and 0 <= value < below  # which neither NaN nor infinity is


TRACKERS = ("none", "tensorboard", "trackio", "wandb")
# What a value must be, as the error says it -> (a test of the value, the constants that must pass it).
RULES = {
    "a name": (is_text, "MODEL_NAME DATASET_NAME OUTPUT_DIR"),
    "None, or a commit, tag or branch": (lambda x: x is None or is_text(x), "MODEL_REVISION DATASET_REVISION"),
    "True or False": (lambda x: isinstance(x, bool), "OFFLINE_FALLBACK TRAIN_ON_PROMPT DROP_EMPTY_ANSWERS SAVE_MERGED"),
    "a whole number from 1": (
        is_whole,
        "LORA_R BATCH_SIZE GRADIENT_ACCUMULATION_STEPS LOGGING_STEPS EVAL_STEPS MAX_NEW_TOKENS",
    ),
    "a whole number from 2": (lambda x: is_whole(x, least=2), "MAX_LENGTH"),
    "a whole number from 0": (lambda x: is_whole(x, least=0), "SEED"),
    "-1, or a whole number from 1": (lambda x: is_whole(x) or x == -1, "MAX_STEPS"),
    "a number above 0": (lambda x: is_number(x) and x > 0, "NUM_EPOCHS LEARNING_RATE LORA_ALPHA"),
    "a number from 0": (is_number, "MAX_GRAD_NORM TEMPERATURE"),
    "a share between 0 and 1, such as 0.1": (lambda x: is_number(x, below=1) and x > 0, "TEST_SIZE"),
    "a share from 0 to below 1": (lambda x: is_number(x, below=1), "LORA_DROPOUT WARMUP_RATIO"),
    "None, or a share from 0 to below 1": (lambda x: x is None or is_number(x, below=1), "BASE_DROPOUT"),
    "None, a name, or a list of names of modules": (
        lambda x: x is None or is_text(x) or (isinstance(x, list) and are_texts(x)),
        "LORA_TARGET_MODULES",
    ),
    "a dict {topic: question} with at least one question": (
        lambda x: isinstance(x, dict) and are_texts([*x, *x.values()]),
        "QUESTIONS",
    ),
    " or ".join(map(repr, TRACKERS)): (lambda x: x in TRACKERS, "REPORT_TO"),
}


def check_settings(cfg):
    """Raise InputError for the first constant that is of a wrong type, or can't be followed here."""
    for wanted, (fits, names) in RULES.items():
        for name in names.split():
            value = getattr(cfg, name)
            if not fits(value):
                raise InputError(f"{name} = {value!r}: must be {wanted}; edit it in the script")
    if not PROMPT.endswith(ANSWER_MARK) or format_prompt("A?") == format_prompt("B?"):
        raise InputError(f"PROMPT = ...{PROMPT[-40:]!r}: must hold {{question}} and end with {ANSWER_MARK}")
    if cfg.REPORT_TO != "none" and importlib.util.find_spec(cfg.REPORT_TO) is None:
        raise InputError(f"REPORT_TO = {cfg.REPORT_TO!r}: not installed; pip install {cfg.REPORT_TO}, or use 'none'")
    try:
        folder = Path(cfg.OUTPUT_DIR).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # only writing tells: of quotas and read-only disks, too
    except OSError as error:
        raise InputError(f"OUTPUT_DIR = {cfg.OUTPUT_DIR!r}: no folder to write to ({error.strerror})") from error


def check_fit(cfg, model, tokenizer, encoded):
    """Raise InputError where the settings don't fit the model's vocabulary, context or rows."""
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise InputError(
            f"MODEL_NAME: the tokenizer of {cfg.MODEL_NAME} has {len(tokenizer):,} tokens, the model "
            f"embeddings for {embeddings:,}: resize the model (resize_token_embeddings), or use the "
            "tokenizer that it was trained with"
        )
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or math.inf
    prompts = [format_prompt(question) for question in cfg.QUESTIONS.values()]
    longest = max(len(row.ids) for row in encode(tokenizer, prompts, sys.maxsize))
    if max(cfg.MAX_LENGTH, longest + cfg.MAX_NEW_TOKENS) > context:
        raise InputError(
            f"MAX_LENGTH = {cfg.MAX_LENGTH}, and prompts of {longest} tokens + MAX_NEW_TOKENS = "
            f"{cfg.MAX_NEW_TOKENS}, must fit the context of {cfg.MODEL_NAME}: {context} tokens"
        )
    if not cfg.TRAIN_ON_PROMPT and all(row.first == len(row.ids) for row in encoded):
        raise InputError(f"MAX_LENGTH = {cfg.MAX_LENGTH}: no room for answers, the rows' prompts alone are that long")


def hush():
    """Silence what a user can do nothing about; warnings of torch and of the data stay."""
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # the Hub's download bars as well
    if sys.stderr.isatty():
        huggingface_hub.utils.enable_progress_bars()
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL's trainers would call home
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|trl")


def find_inputs(cfg):
    """Model and data on this disk -> (model path, commit, data path, commit, whether offline).

    Where the Hub is out of reach and nothing is cached, `cfg` gets the offline default's settings.
    """
    try:
        model = on_first(lambda: fetch("model", cfg.MODEL_NAME, cfg.MODEL_REVISION))
        data = on_first(lambda: fetch("dataset", cfg.DATASET_NAME, cfg.DATASET_REVISION))
        return *model, *data, False
    except HubUnreachable as error:
        if not cfg.OFFLINE_FALLBACK:
            raise InputError(f"{error}; go online once, or name local files") from error
        cause = error
    vars(cfg).update(OFFLINE_SETTINGS)
    line = "=" * 100
    say(
        f"\n{line}\n"
        "  OFFLINE DEFAULT: not the model and data that the constants name!\n\n"
        f"  Why: {cause}.\n"
        "  The same pipeline now runs on what ships with the script:\n"
        f"  {cfg.MODEL_NAME}, a tiny GPT-2, and {cfg.DATASET_NAME}, with settings of their own "
        f"(OFFLINE_SETTINGS).\n{line}\n"
    )
    here = Path(__file__).resolve().parent
    return here / cfg.MODEL_NAME, None, here / cfg.DATASET_NAME, None, True


# Settings on which the adapter doesn't depend; nor does it on where model and data lie, but on what they are.
ASKED = ("QUESTIONS", "MAX_NEW_TOKENS", "TEMPERATURE")
LOCATIONS = ("MODEL_NAME", "MODEL_REVISION", "DATASET_NAME", "DATASET_REVISION")
NOT_TRAINED = (*ASKED, *LOCATIONS, "OUTPUT_DIR", "REPORT_TO", "SAVE_MERGED", "OFFLINE_FALLBACK")


def run_folder(cfg, model_path, commit, train, held_out):
    """The run's folder: the model's name, and a hash of settings, prompt, model and rows.

    Model and data are in it by their content, wherever they lie. Questions are not: others can be
    asked without training again. Nor is the code: who edits it moves the folder away.
    """
    model = commit
    if model is None:
        files = [x for x in model_path.iterdir() if x.suffix in (".json", ".safetensors", ".txt", ".model")]
        model = {}
        for path in sorted(files):
            with open(path, "rb") as file:
                model[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    # Only their product counts: who halves the one and doubles the other, for memory, goes on with this run.
    cut = ("BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS")
    identity = {
        "settings": {name: getattr(cfg, name) for name in SETTINGS if name not in (*NOT_TRAINED, *cut)},
        "rows_per_step": cfg.BATCH_SIZE * cfg.GRADIENT_ACCUMULATION_STEPS,
        "prompt": PROMPT,
        "model": model,
        "train": train,
        "held_out": held_out,
        "processes": PartialState().num_processes,  # more of them, more rows in a step
    }
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(cfg.MODEL_NAME).name)
    return Path(cfg.OUTPUT_DIR).expanduser() / f"{name}-{key}"


def is_finished(run, cfg):
    """Whether every product is there, for these questions; results.json is written last."""
    results = load_json(run / "results.json")
    names = ["report.md", "training_loss.png", "perplexity_comparison.png", "adapter/README.md"]
    if cfg.SAVE_MERGED:
        names.append("merged")
    if results is None or not all((run / name).exists() for name in names):
        return False
    return all(results["settings"][name] == getattr(cfg, name) for name in ASKED)


def lock_run(run):
    """Make the run's folder, and keep other processes out of it for as long as the lock lives."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run / "checkpoints" / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(f"another process is at work in {run}: wait for it; start several with torchrun") from error
    except (OSError, NotImplementedError) as error:  # some network disks have none
        say(f"no file locks in {run} ({error}): see that no other process works there")
    return lock


@contextlib.contextmanager
def one_line_errors():
    """Around `main`: what a user can mend ends with one line on stderr and an exit code."""
    # from the environment, as an error may come before the processes know each other
    rank = os.environ.get("RANK") or "0"
    try:
        yield
        return
    except InputError as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt:
        code = 130
        message = f"interrupted: the same command goes on from the last checkpoint in {OUTPUT_DIR}/"
    except BrokenPipeError:  # as in `| head -1`
        code = 130
        message = "interrupted: nobody reads the output any more; the same command goes on"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except torch.OutOfMemoryError:
        rank = "0"  # to be said by whichever process it meets
        code = 2
        message = "error: out of GPU memory: halve BATCH_SIZE, double GRADIENT_ACCUMULATION_STEPS, and go on"
    except Exception as error:
        # torch and safetensors don't pass a full disk's error number on
        folder = Path(OUTPUT_DIR).expanduser()
        free = shutil.disk_usage(folder).free if folder.exists() else math.inf
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and free > 2**20:
            raise
        code = 2
        message = f"error: no space left in {OUTPUT_DIR}/: free some, and the same command goes on"
    if rank == "0":
        print(message, file=sys.stderr)
    raise SystemExit(code)


# --------------------------------------------------------------------------------------------------
# The story


def is_trained(run):
    """Whether the training of a run is done. Raises InputError where something it left is gone."""
    training = run / "checkpoints" / "training.json"
    adapter = run / "adapter" / "adapter_model.safetensors"
    again = "move the run's folder away to train it again"
    if (run / "results.json").exists() and not training.exists():
        raise InputError(f"{run} is finished, but its checkpoints/ are gone: {again}")
    if training.exists() and not adapter.exists():
        raise InputError(f"{run} is trained, but its adapter/ is gone: {again}")
    return training.exists()


def announce(cfg, model, encoded, held_out):
    """One line on what is coming, before the first long work."""
    rows_per_step = cfg.BATCH_SIZE * cfg.GRADIENT_ACCUMULATION_STEPS * PartialState().num_processes
    steps = cfg.MAX_STEPS
    if steps == -1:
        steps = math.ceil(cfg.NUM_EPOCHS * math.ceil(len(encoded) / rows_per_step))
    tokens = steps * rows_per_step * sum(len(row.ids) for row in encoded) / len(encoded)
    trainable, total = count_parameters(model)
    # the reference trained on a template and asked bare questions; whoever brings own data may not notice
    if not any(text.startswith(PROMPT.split("{question}")[0]) for text in held_out):
        say("note: no held-out row begins as PROMPT does, so the questions have another form than the rows")
    title_rows = 4 * (min(len(held_out), TITLE_ROWS) + min(len(encoded), TITLE_ROWS))  # each under four titles
    say(
        f"to come: {steps:,} steps of {rows_per_step:,} rows, about {tokens:,.0f} tokens, for {trainable:,} "
        f"of {total:,} parameters; before and after it {len(held_out):,} rows scored, "
        f"{title_rows:,} for the title test, and {len(cfg.QUESTIONS)} questions asked"
    )


def measure(model, tokenizer, cfg, train, held_out, machine, run, when):
    """All that is measured before and after alike, each kept in the run's folder -> dict of results."""
    found = {}

    def stage(name, job, **depends_on):
        """found[name] = job(label), or what it was in an earlier start; `label` is that of its progress bar."""
        # an interrupted run may go on on another machine, where the figures would be others
        depends_on |= {"device": machine.device, "precision": machine.precision}
        path = run / "checkpoints" / f"{when}-{name}.json"
        found[name] = kept(path, lambda: job(f"{when}: {name.replace('_', ' ')}"), depends_on)

    size = {"max_length": cfg.MAX_LENGTH, "batch_size": cfg.BATCH_SIZE}
    stage("scores", lambda label: score_rows(model, tokenizer, held_out, **size, progress=label).tolist())
    perplexity = summarize_scores(found["scores"])["answer"] or math.nan
    say(f"{when}: answer perplexity {perplexity:.2f} on {len(held_out):,} held-out rows")

    asked = {
        "questions": list(cfg.QUESTIONS.values()),
        "max_new_tokens": cfg.MAX_NEW_TOKENS,
        "temperature": cfg.TEMPERATURE,
        "seed": cfg.SEED,
    }
    stage("answers", lambda label: on_first(lambda: ask(model, tokenizer, **asked, progress=label)), **asked)

    limits = {"articles": [TITLE_ROWS, GENERAL_ARTICLES]}
    stage("held_out_titles", lambda label: score_titles(model, tokenizer, held_out, **size, progress=label), **limits)
    stage("trained_titles", lambda label: score_titles(model, tokenizer, train, **size, progress=label), **limits)
    stage("general_text", lambda label: score_general_text(model, tokenizer, **size, progress=label), **limits)
    say(f"{when}: all measured in {tqdm.format_interval(stage_seconds(run)[when])}")
    return found


def stage_seconds(run):
    """Seconds before, in and after the training, of what `kept` has kept."""
    seconds = {"before": 0.0, "training": 0.0, "after": 0.0}
    for stage in seconds:
        for path in (run / "checkpoints").glob(f"{stage}*.json"):
            seconds[stage] += load_json(path)["seconds"]
    return seconds


def model_prompt(tokenizer, question):
    """All that the model is given, as text: the prompt, after a BOS where the model expects one."""
    prompt = format_prompt(question)
    bos = tokenizer.decode(leading_bos(tokenizer))
    return prompt if prompt.startswith(bos) else bos + prompt


def compare_scores(before, after):
    """results["perplexity"], from what `measure` found before and after."""
    ends = {"before": before, "after": after}
    return {
        **{when: summarize_scores(found["scores"]) for when, found in ends.items()},
        "change": paired_change(before["scores"], after["scores"]),
        "title": {
            name: compare_titles(before[f"{name}_titles"], after[f"{name}_titles"]) for name in ("held_out", "trained")
        },
        "general": {when: found["general_text"] for when, found in ends.items()},
    }


def compare_answers(cfg, tokenizer, before, after):
    """results["answers"], from what `ask` returned before and after."""
    answers = []
    for (topic, question), one, two in zip(cfg.QUESTIONS.items(), before, after, strict=True):
        answers.append(
            {
                "topic": topic,
                "question": question,
                "prompt": model_prompt(tokenizer, question),
                "before": one[0],
                "after": two[0],
                "before_stats": answer_stats(one[0], finished=one[1]),
                "after_stats": answer_stats(two[0], finished=two[1]),
            }
        )
    return answers


def save_merged(model_path, adapter, tokenizer, folder):
    """Write a plain model folder, with the adapter merged into the fp32 weights."""
    model = PeftModel.from_pretrained(load_model(model_path), str(adapter)).merge_and_unload()
    part = Path(f"{folder}.tmp")  # whole or not at all: what has this name counts as finished
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def write_products(results, run):
    """The plots, the report and the adapter's model card, from what results.json will hold."""
    title = f"{short_name(results['model'])} on {short_name(results['dataset'])}"
    if results["offline_fallback"]:
        title += " (offline default)"
    plot_training_loss(
        results["training"]["log_history"],
        run / "training_loss.png",
        title=f"LoRA fine-tuning of {title}",
        loss_on=LOSS_ON[results["settings"]["TRAIN_ON_PROMPT"]],
    )
    plot_perplexity(
        results["perplexity"]["before"],
        results["perplexity"]["after"],
        run / "perplexity_comparison.png",
        title=f"{results['data']['test_rows']:,} held-out rows: {title}",
    )
    write_model_card(results, run / "adapter")
    write_report(results, run / "report.md")


def show_results(results, run):
    """The end on the screen: perplexities, medicine or tone, one question with both answers, where the rest is."""
    before, after = results["perplexity"]["before"], results["perplexity"]["after"]
    say(f"\n{'perplexity, held-out rows':28}{'before':>10}{'after':>10}{'change':>10}")
    for name, label in MEASURES.items():
        if before[name]:
            change = percent_change(before[name], after[name])
            say(f"{label:28}{before[name]:10.2f}{after[name]:10.2f}{change:>10}")
    titles = results["perplexity"]["title"]["held_out"]
    if titles["before"]:
        own, wrong = (titles["after"][loss] - titles["before"][loss] for loss in ("own_loss", "other_loss"))
        topic, (low, high) = titles["gain_change"]["mean"], titles["gain_change"]["ci95"]
        say(f"\nthe articles' loss changed by {own:+.3f} nats per token, by {wrong:+.3f} under wrong titles; only the")
        say(f"gain from the own title can be about the topic: {topic:+.3f} ({low:.3f} to {high:.3f})")
    general = results["perplexity"]["general"]
    if general["before"]:
        say(f"on everyday text the loss went from {general['before']:.3f} to {general['after']:.3f} nats per token")
    answer = results["answers"][0]
    say(f"\n{answer['question']}")
    for when in ("before", "after"):
        text = textwrap.shorten(answer[when], 180, placeholder=" ...")
        say(textwrap.fill(text, 100, initial_indent=f"  {when:6}  ", subsequent_indent=" " * 10))
    total = sum(results["hardware"]["stage_seconds"].values())
    say(f"\n{tqdm.format_interval(total)} in all. Everything is in {run}/; read report.md first.")


def add_ends(training, before, after, on_prompt):
    """results["training"] with its log history's two ends: the base model, and the saved adapter."""
    history = training["log_history"]
    first = {"step": 0, "epoch": 0.0} | validation_losses(before, on_prompt)
    last = {"step": training["steps"], "epoch": history[-1]["epoch"]} | validation_losses(after, on_prompt)
    return training | {"log_history": [first, *history, last]}


@one_line_errors()
def main():
    """The whole story, in order -> the run's folder."""
    # Settings and machine: all that can be checked before anything takes time.
    cfg = SimpleNamespace(**{name: globals()[name] for name in SETTINGS})
    check_settings(cfg)
    machine = choose_hardware()
    # joins the processes that torchrun started; one may download for hours while the others wait
    processes = PartialState(cpu=machine.device == "cpu", timeout=timedelta(hours=12)).num_processes
    hush()
    say(f"{cfg.MODEL_NAME} on {cfg.DATASET_NAME}; {', '.join(machine)}, {processes} process(es)")

    # Model and data: from here on they are on this disk, and the Hub is left alone.
    model_path, commit, data_path, data_commit, is_offline_default = find_inputs(cfg)
    split = {"test_size": cfg.TEST_SIZE, "seed": cfg.SEED, "drop_empty": cfg.DROP_EMPTY_ANSWERS}
    train, test, counts = load_splits(data_path, **split)
    train, held_out = train["text"][:], test["text"][:]
    tokenizer = load_tokenizer(model_path)
    encoded = encode(tokenizer, train, cfg.MAX_LENGTH, end=True)
    counts["truncated_train_rows"] = sum(row.ids[-1] != tokenizer.eos_token_id for row in encoded)
    say("data: " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items()))

    # A finished run is left alone; one that is interrupted, or asked other questions, goes on in its folder.
    run = run_folder(cfg, model_path, commit, train, held_out)
    if on_first(lambda: is_finished(run, cfg)):
        say(f"already finished: {run}/report.md (to repeat it, move the folder away or change a setting)")
        return run

    # Measured with its LoRA adapter disabled, then trained; "after" gets a fresh one.
    model = load_model(model_path, machine.device, machine.precision, dropout=cfg.BASE_DROPOUT)
    check_fit(cfg, model, tokenizer, encoded)
    check_model(model, tokenizer)
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
    locks = []  # the first process's, held until this list is gone
    on_first(lambda: locks.append(lock_run(run)))
    if on_first(lambda: is_trained(run)):
        say("trained already: what is asked or measured now goes without training")
    else:
        announce(cfg, model, encoded, held_out)

    # Before, fine-tuning, after: each is kept as soon as it is there, and not done twice.
    inputs = (tokenizer, cfg, train, held_out, machine, run)
    with model.disable_adapter():
        before = measure(model, *inputs, when="before")
    base_name = cfg.MODEL_NAME if commit else str(model_path.resolve())
    trained = kept(
        run / "checkpoints" / "training.json",
        lambda: fine_tune(cfg, model, tokenizer, encoded, held_out, run, machine, base_name),
        depends_on={},
    )

    # "After" is the adapter as it was saved, on a model that no training has touched.
    del model  # two may not fit into memory
    gc.collect()
    model = load_model(model_path, machine.device, machine.precision)  # dropout takes no part in measuring
    model = PeftModel.from_pretrained(model, str(run / "adapter"))
    after = measure(model, *inputs, when="after")
    if not PartialState().is_main_process:
        return run

    # All figures in one place; plots, report and card are made of them. With results.json the run is finished.
    results = {
        "model": cfg.MODEL_NAME,
        "model_revision": commit,
        "dataset": cfg.DATASET_NAME,
        "dataset_revision": data_commit,
        "offline_fallback": is_offline_default,
        "settings": vars(cfg),
        "versions": trained["versions"],
        "hardware": trained["hardware"] | {"stage_seconds": stage_seconds(run)},
        "data": counts,
        "perplexity": compare_scores(before, after),
        "training": add_ends(trained["training"], before["scores"], after["scores"], cfg.TRAIN_ON_PROMPT),
        "answers": compare_answers(cfg, tokenizer, before["answers"], after["answers"]),
    }
    (run / "results.json").unlink(missing_ok=True)  # of other questions: it must not stand beside the new report
    write_products(results, run)
    if cfg.SAVE_MERGED and not (run / "merged").exists():
        save_merged(model_path, run / "adapter", tokenizer, run / "merged")
    write_json(run / "results.json", results)
    show_results(results, run)
    return run


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGTERM is how Slurm and spot machines end a job
        signal.signal(number, signal.default_int_handler)
    main()
