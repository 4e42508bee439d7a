"""Reading, cleaning and splitting; and every bad input or setting that must end with one clear line."""

import gzip
import json
import os
import shutil

import datasets
import pytest
from conftest import TESTS, set_constants

import finetune_medical_gpt2 as script
from finetune_medical_gpt2 import InputError, format_prompt, load_splits


def row(title, answer="It is a thing. "):
    return format_prompt(f"What is {title} and explain in detail?") + f" {answer}</s>"


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(path)


def test_cleaning_counts_and_keeps_no_row_on_both_sides(tmp_path):
    texts = [row(i) for i in range(20)] + [
        row(3),
        row(3),
        row("x", ""),
        row("y", " "),
        row("y", " "),
        None,
        5,
        "no mark",
    ]
    train, test, stats = load_splits(write_jsonl(tmp_path / "a.jsonl", texts), test_size=0.1, seed=42)
    assert stats == {
        "rows": 28,
        "train_rows": 18,
        "test_rows": 2,
        "dropped_empty": 2,
        "dropped_duplicate": 3,
        "dropped_malformed": 3,
    }
    assert sorted(train["text"][:] + test["text"][:]) == sorted(row(i) for i in range(20))
    kept = load_splits(write_jsonl(tmp_path / "a.jsonl", texts), test_size=0.1, seed=42, drop_empty=False)[2]
    assert (kept["dropped_empty"], kept["train_rows"] + kept["test_rows"]) == (0, 22)


def test_the_reference_data_set_splits_as_in_the_reference_run(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [row(i) for i in range(6861)])
    train, test, _ = load_splits(source, test_size=0.1, seed=42)
    assert (len(train), len(test)) == (6174, 687)
    assert -(-len(train) // 4) // 4 == 386  # optimizer steps of an epoch
    assert load_splits(source, test_size=0.1, seed=42)[1]["text"][:] == test["text"][:]
    assert load_splits(source, test_size=0.1, seed=43)[1]["text"][:] != test["text"][:]


def test_all_formats_give_the_same_rows(tmp_path):
    texts = [row(i, f'A "quoted", ünï-coded\nanswer {i}. ') for i in range(10)]
    table = datasets.Dataset.from_dict({"text": texts})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    write_jsonl(tmp_path / "a.jsonl", texts)
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.csv.gz"):
        train, test, _ = load_splits(str(tmp_path / name), test_size=0.2, seed=1)
        assert sorted(train["text"][:] + test["text"][:]) == sorted(texts), name


def rows_of(path):
    train, test, _ = load_splits(str(path), test_size=0.2, seed=1)
    return sorted(train["text"][:] + test["text"][:])


ROWS = sorted(row(i) for i in range(10))
JSON_LINES = "".join(json.dumps({"text": text}) + "\n" for text in ROWS)
CSV = "\n".join(["text", *(f'"{text}"' for text in ROWS)])
MIXED = [{"code": i if i < 5 else "A", "text": text} for i, text in enumerate(ROWS)]
READABLE_FILES = {
    "a BOM": ("a.jsonl", b"\xef\xbb\xbf" + JSON_LINES.encode()),
    "a BOM in CSV": ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
    "UTF-16, as PowerShell redirects": ("a.jsonl", JSON_LINES.encode("utf-16")),
    "JSON lines called .json": ("a.json", JSON_LINES.encode()),
    "an indented array": ("a.json", json.dumps([{"text": text} for text in ROWS], indent=1).encode()),
    "pandas' to_json": ("a.json", json.dumps({"text": dict(enumerate(ROWS))}).encode()),
    "a column of two types": ("a.jsonl", "\n".join(map(json.dumps, MIXED)).encode()),
    "a column of two types in CSV": (
        "a.csv",
        "\n".join(["code,text", *(f'{x["code"]},"{x["text"]}"' for x in MIXED)]).encode(),
    ),
    "a name that is a pattern": ("a[2]*.csv", CSV.encode()),
    "half a character": ("a.jsonl", (JSON_LINES + json.dumps({"text": row("\ud83d")})).encode()),
}


@pytest.mark.parametrize("case", READABLE_FILES)
def test_files_as_real_tools_write_them_are_read(tmp_path, case):
    name, content = READABLE_FILES[case]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "a2.csv").write_text(f'text\n"{row("another file")}"')
    assert rows_of(tmp_path / name) == ROWS


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "json"])
def test_a_file_replaced_under_its_name_and_date_is_read_anew(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    for answer in ("It is a thing. ", "It is more. "):
        texts = [row(i, answer) for i in range(10)]
        table = datasets.Dataset.from_dict({"text": texts})
        table.to_json(path) if kind.startswith("json") else getattr(table, f"to_{kind}")(path)
        os.utime(path, (1577836800, 1577836800))
        assert rows_of(path) == sorted(texts)


def test_rows_of_several_turns_are_malformed(tmp_path):
    texts = [row(i) for i in range(9)] + [row(i) + row(i + 1) for i in range(3)]
    stats = load_splits(write_jsonl(tmp_path / "a.jsonl", texts), test_size=0.2, seed=1)[2]
    assert stats["dropped_malformed"] == 3 and stats["train_rows"] + stats["test_rows"] == 9


def test_a_prompt_may_hold_other_braces(monkeypatch):
    monkeypatch.setattr(script, "PROMPT", '[INST] As JSON: {"answer": "..."}. {question} [/INST]')
    assert format_prompt("Why?") == '[INST] As JSON: {"answer": "..."}. Why? [/INST]'


@pytest.mark.parametrize("prompt", ["[INST] Tell me. [/INST]", "{question}", "[INST] {question} [/INST] Well,"])
def test_a_prompt_without_its_question_or_mark_ends_with_one_line(tmp_path, monkeypatch, capsys, prompt):
    monkeypatch.setattr(script, "PROMPT", prompt)
    expect_error(monkeypatch, capsys, tmp_path, "PROMPT = ")


BAD_FILES = {
    "wrong column": ("a.jsonl", '{"txt": "x"}\n', "no column `text`, only txt"),
    "not JSON": ("a.jsonl", f"{json.dumps({'text': row(1)})}\n\n{{'text': 1}}\n", "line 3: not JSON"),
    "not JSON in an array": ("a.json", '[{"text": "x"},\n{"text": oops}]', "line 2: not JSON"),
    "empty": ("a.jsonl", "", "is empty"),
    "no rows": ("a.json", "[]", "no column `text`, only no rows"),
    "no text": ("a.jsonl", '{"text": 5}\n{"text": null}\n', "2 are no text with"),
    "no mark": ("a.jsonl", '{"text": "plain"}\n' * 9, "9 are no text with"),
    "only duplicates": ("a.jsonl", f"{json.dumps({'text': row(1)})}\n" * 9, "8 duplicates"),
    "parquet": ("a.parquet", "not parquet", "can't be read as parquet"),
    "csv without column": ("a.csv", "a,b\n1,2\n", "no column `text`, only a, b"),
    "not gzip": ("a.jsonl.gz", "plain", "can't be read"),
    "missing": ("b.jsonl", None, "is no file"),
    "an object of something else": ("a.json", '{"version": 1,\n"data": []}', "no column `text`, only data, version"),
    "other format": ("a.txt", "text", "is no .jsonl, .json, .csv or .parquet"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_ends_with_one_line(tmp_path, monkeypatch, capsys, case):
    name, content, message = BAD_FILES[case]
    if content is not None:
        (tmp_path / name).write_text(content)
    expect_error(monkeypatch, capsys, tmp_path, message, DATASET_NAME=str(tmp_path / name))


BAD_SETTINGS = [
    ("MODEL_NAME", "", None),
    ("MODEL_NAME", 5, None),
    ("DATASET_NAME", None, None),
    ("OFFLINE_FALLBACK", "yes", None),
    ("TEST_SIZE", 0, None),
    ("TEST_SIZE", 1.5, None),
    ("TEST_SIZE", float("nan"), None),
    ("MAX_LENGTH", 0, None),
    ("MAX_LENGTH", 512.0, None),
    ("MAX_LENGTH", 100_000, "must fit the context"),
    ("MAX_NEW_TOKENS", 5000, "must fit the context"),
    ("SEED", -1, None),
    ("LORA_R", 0, None),
    ("LORA_R", True, None),
    ("LORA_ALPHA", 0, None),
    ("LORA_DROPOUT", 1, None),
    ("LORA_TARGET_MODULES", ["nothing_like_it"], "LORA_TARGET_MODULES"),
    ("LORA_TARGET_MODULES", [], None),
    ("LORA_TARGET_MODULES", ["lm_head"], "the LM head"),
    ("NUM_EPOCHS", 0, None),
    ("MAX_STEPS", 0, None),
    ("LEARNING_RATE", -1e-4, None),
    ("LEARNING_RATE", "1e-4", None),
    ("BATCH_SIZE", 0, None),
    ("GRADIENT_ACCUMULATION_STEPS", 0, None),
    ("WARMUP_RATIO", -0.1, None),
    ("MAX_GRAD_NORM", -1, None),
    ("LOGGING_STEPS", 0, None),
    ("EVAL_STEPS", 0.5, None),
    ("TRAIN_ON_PROMPT", 1, None),
    ("BASE_DROPOUT", 1.0, None),
    ("QUESTIONS", {}, None),
    ("QUESTIONS", {"a": ""}, None),
    ("TEMPERATURE", -1, None),
    ("REPORT_TO", "numpy", "must be 'none' or 'tensorboard'"),
]


def expect_error(monkeypatch, capsys, tmp_path, message, **changes):
    """main() with `changes` must exit with 2 and one line, and leave no run behind."""
    set_constants(monkeypatch, tmp_path / "out", **changes)
    with pytest.raises(SystemExit) as stop:
        script.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert not list(tmp_path.glob("out/*/*"))


def test_a_tracker_that_is_not_there_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    expect_error(monkeypatch, capsys, tmp_path, "not installed; pip install wandb", REPORT_TO="wandb")


@pytest.mark.parametrize("name, value, message", BAD_SETTINGS)
def test_bad_settings_end_with_one_line(tmp_path, monkeypatch, capsys, name, value, message):
    expect_error(monkeypatch, capsys, tmp_path, message or f"{name} = {value!r}: must be", **{name: value})


@pytest.mark.parametrize(
    "remove, message",
    [
        ("all", "no model folder"),
        ("config.json", "has no config.json"),
        ("model.safetensors", "no .safetensors weights"),
        ("tokenizer.json", "MODEL_NAME"),
        ("eos", "end-of-sequence token"),
    ],
)
def test_bad_model_folders_end_with_one_line(tmp_path, monkeypatch, capsys, remove, message):
    folder = tmp_path / "model"
    if remove != "all":
        shutil.copytree(TESTS / "tiny_gpt2", folder)
    if remove == "eos":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    elif remove != "all":
        (folder / remove).rename(folder / "pytorch_model.bin")
    expect_error(monkeypatch, capsys, tmp_path, message, MODEL_NAME=str(folder))


def test_an_output_dir_that_is_a_file_ends_with_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("mine")
    expect_error(monkeypatch, capsys, tmp_path, "OUTPUT_DIR")
    assert (tmp_path / "out").read_text() == "mine"


def test_several_gpus_and_one_process_are_an_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES=0"):
        script.choose_hardware()
