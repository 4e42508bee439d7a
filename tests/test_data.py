"""Model and data: reading, cleaning and splitting; a file that won't do ends with one clear line."""

import gzip
import json
import os

import pandas
import pytest
from conftest import row
from datasets import Dataset

from finetune_medical_gpt2 import load_splits


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def rows_of(path):
    """All rows that are read from a file, in order of the alphabet."""
    train, test, _ = load_splits(str(path), test_size=0.2, seed=1)
    return sorted(train["text"][:] + test["text"][:])


def test_cleaning_counts_and_keeps_no_row_on_both_sides(tmp_path):
    good = [row(i) for i in range(20)]
    bad = [row(3), row(3), row("x", ""), row("y", " "), row("y", " "), None, 5, "no mark"]
    source = write_jsonl(tmp_path / "a.jsonl", good + bad)
    train, test, stats = load_splits(source, test_size=0.1, seed=42)
    assert stats == {
        "rows": 28,
        "train_rows": 18,
        "test_rows": 2,
        "dropped_empty": 2,
        "dropped_duplicate": 3,
        "dropped_malformed": 3,
    }
    assert sorted(train["text"][:] + test["text"][:]) == sorted(good)
    stats = load_splits(source, test_size=0.1, seed=42, drop_empty=False)[2]
    assert (stats["dropped_empty"], stats["train_rows"] + stats["test_rows"]) == (0, 22)


def test_rows_of_several_turns_are_malformed(tmp_path):
    texts = [row(i) for i in range(9)] + [row(i) + row(i + 1) for i in range(3)]
    stats = load_splits(write_jsonl(tmp_path / "a.jsonl", texts), test_size=0.2, seed=1)[2]
    assert stats["dropped_malformed"] == 3
    assert stats["train_rows"] + stats["test_rows"] == 9


def test_as_many_rows_as_the_references_are_split_as_its_were(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [row(i) for i in range(6861)])
    train, test, _ = load_splits(source, test_size=0.1, seed=42)
    assert (len(train), len(test)) == (6174, 687)


def test_the_seed_decides_which_rows_are_held_out(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [row(i) for i in range(100)])
    first, again, other = (load_splits(source, test_size=0.1, seed=seed)[1]["text"][:] for seed in (42, 42, 43))
    assert first == again
    assert first != other


def test_all_formats_give_the_same_rows(tmp_path):
    texts = sorted(row(i, f'A "quoted", ünï-coded\nanswer {i}.') for i in range(10))
    table = Dataset.from_dict({"text": texts})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    write_jsonl(tmp_path / "a.jsonl", texts)
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.csv.gz"):
        assert rows_of(tmp_path / name) == texts, name


ROWS = sorted(row(i) for i in range(10))
JSON_LINES = "".join(json.dumps({"text": text}) + "\n" for text in ROWS)
CSV = "\n".join(["text", *(f'"{text}"' for text in ROWS)])
CODES = [0, 1, 2, 3, 4, "A", "B", "C", "D", "E"]  # a column of two types
MIXED_JSON_LINES = [json.dumps({"code": code, "text": text}) for code, text in zip(CODES, ROWS, strict=True)]
MIXED_CSV = ["code,text", *(f'{code},"{text}"' for code, text in zip(CODES, ROWS, strict=True))]
READABLE_FILES = {
    "a BOM": ("a.jsonl", b"\xef\xbb\xbf" + JSON_LINES.encode()),
    "a BOM in CSV": ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
    "UTF-16, as PowerShell redirects": ("a.jsonl", JSON_LINES.encode("utf-16")),
    "JSON lines called .json": ("a.json", JSON_LINES.encode()),
    "an indented array": ("a.json", json.dumps([{"text": text} for text in ROWS], indent=1).encode()),
    "pandas' to_json": ("a.json", json.dumps({"text": dict(enumerate(ROWS))}).encode()),
    "a column of two types": ("a.jsonl", "\n".join(MIXED_JSON_LINES).encode()),
    "a column of two types in CSV": ("a.csv", "\n".join(MIXED_CSV).encode()),
    "a delimiter at the end of each row": ("a.csv", CSV.replace('"\n', '",\n').encode()),
    "a name that is a pattern": ("a[2]*.csv", CSV.encode()),
    "half a character": ("a.jsonl", (JSON_LINES + json.dumps({"text": row("\ud83d")})).encode()),
}


@pytest.mark.parametrize("case", READABLE_FILES)
def test_files_as_real_tools_write_them_are_read(tmp_path, case):
    name, content = READABLE_FILES[case]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "a2.csv").write_text(f'text\n"{row("another file")}"')  # which the pattern would find
    assert rows_of(tmp_path / name) == ROWS


def test_pandas_parquet_is_read_by_its_columns_alone(tmp_path, expect_error):
    pandas.DataFrame({"n": range(10)}, index=pandas.Index(ROWS, name="text")).to_parquet(tmp_path / "index.parquet")
    assert rows_of(tmp_path / "index.parquet") == ROWS
    pandas.DataFrame([ROWS]).to_parquet(tmp_path / "numbers.parquet")
    expect_error("no column `text`, only 0, 1, 2", DATASET_NAME=str(tmp_path / "numbers.parquet"))


WRITERS = {"csv": Dataset.to_csv, "parquet": Dataset.to_parquet, "jsonl": Dataset.to_json, "json": Dataset.to_json}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_replaced_under_its_name_and_date_is_read_anew(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    for answer in ("It is a thing.", "It is more."):
        texts = sorted(row(i, answer) for i in range(10))
        WRITERS[kind](Dataset.from_dict({"text": texts}), path)
        os.utime(path, (1577836800, 1577836800))
        assert rows_of(path) == texts


ONE_ROW = json.dumps({"text": row(1)}) + "\n"
BAD_FILES = {
    "wrong column": ("a.jsonl", '{"txt": "x"}\n', "no column `text`, only txt"),
    "not JSON": ("a.jsonl", ONE_ROW + "\n{'text': 1}\n", "line 3: not JSON"),
    "half a row": ("a.jsonl", ONE_ROW + '{"text": "x"\n' + ONE_ROW, "line 2: not JSON"),
    "not JSON in an array": ("a.json", '[{"text": "x"},\n{"text": oops}]', "line 2: not JSON"),
    "empty": ("a.jsonl", "", "is empty"),
    "no rows": ("a.json", "[]", "no column `text`, only no rows"),
    "no text": ("a.jsonl", '{"text": 5}\n{"text": null}\n', "2 are no text with"),
    "no mark": ("a.jsonl", '{"text": "plain"}\n' * 9, "9 are no text with"),
    "only duplicates": ("a.jsonl", ONE_ROW * 9, "8 duplicates"),
    "parquet": ("a.parquet", "not parquet", "can't be read as parquet"),
    "csv without column": ("a.csv", "a,b\n1,2\n", "no column `text`, only a, b"),
    "not gzip": ("a.jsonl.gz", "plain", "a.jsonl.gz can't be read as jsonl"),
    "missing": ("b.jsonl", None, "is no file"),
    "an object of something else": ("a.json", '{"version": 1,\n"data": []}', "no column `text`, only data, version"),
    "other format": ("a.txt", "text", "is no .jsonl, .json, .csv or .parquet"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_ends_with_one_line(tmp_path, expect_error, case):
    name, content, message = BAD_FILES[case]
    if content is not None:
        (tmp_path / name).write_text(content)
    expect_error(message, DATASET_NAME=str(tmp_path / name))
