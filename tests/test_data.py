"""Model and data: reading, cleaning and splitting; a file that won't do ends with one clear line."""

import gzip
import json
import os
import unicodedata

import pandas
import pytest
from conftest import row
from datasets import Dataset

from finetune_medical_gpt2 import InputError, format_prompt, load_splits, read_texts

WRITERS = {"csv": Dataset.to_csv, "parquet": Dataset.to_parquet, "jsonl": Dataset.to_json}


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


TWINS = {  # changes that give a row a twin
    "white space": lambda text: text.replace(". ", ".  ") + "\n",
    "Windows line ends": lambda text: text.replace(". ", ".\r\n"),
    "Unicode's form": lambda text: unicodedata.normalize("NFD", text),
}


@pytest.mark.parametrize("what", TWINS)
def test_twins_that_differ_only_in_form_are_never_on_both_sides(tmp_path, what):
    texts = [row(i, "It is naïve. Most doctors\nsay so.") for i in range(10)]
    twins = [TWINS[what](text) for text in texts]
    assert not set(twins) & set(texts)
    train, test, stats = load_splits(write_jsonl(tmp_path / "a.jsonl", texts + twins), test_size=0.5, seed=1)
    assert stats["dropped_duplicate"] == 10
    assert sorted(train["text"][:] + test["text"][:]) == sorted(texts)  # the first of two stays


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


@pytest.mark.parametrize("names", [["question", "answer"], ["prompt", "completion"]])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_questions_and_answers_give_the_same_rows_as_their_texts(tmp_path, names, kind):
    questions = [f'What is "{i}",\nand why?' for i in range(10)]
    columns = [questions, [f" It is a thing: ünï, {i}.\n" for i in range(10)]]
    table = Dataset.from_dict({"id": range(10), **dict(zip(names, columns, strict=True))})
    WRITERS[kind](table, tmp_path / f"a.{kind}")
    texts = [f"{format_prompt(question)} It is a thing: ünï, {i}. </s>" for i, question in enumerate(questions)]
    assert rows_of(tmp_path / f"a.{kind}") == sorted(texts)


def test_a_pair_with_something_that_is_no_text_is_malformed(tmp_path):
    pairs = [{"question": f"What is {i}?", "answer": "A thing."} for i in range(10)]
    pairs += [{"question": 5, "answer": "x"}, {"question": "x", "answer": None}, {"answer": "x"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    stats = load_splits(str(tmp_path / "a.jsonl"), test_size=0.2, seed=1)[2]
    assert (stats["rows"], stats["dropped_malformed"]) == (13, 3)
    assert stats["train_rows"] + stats["test_rows"] == 10


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
    expect_error("or `text`; it has index, 0, 1, 2", DATASET_NAME=str(tmp_path / "numbers.parquet"))


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
    "wrong column": ("a.jsonl", '{"txt": "x"}\n', "needs columns `question` and `answer`, or `text`; it has txt"),
    "half a pair": ("a.csv", "question,completion\n1,2\n", "it has question, completion"),
    "not JSON": ("a.jsonl", ONE_ROW + "\n{'text': 1}\n", "line 3 is not valid JSON"),
    "half a row": ("a.jsonl", ONE_ROW + '{"text": "x"\n' + ONE_ROW, "line 2 is not valid JSON"),
    "not JSON in an array": ("a.json", '[{"text": "x"},\n{"text": oops}]', "line 2 column"),
    "empty": ("a.jsonl", "", "it has none"),
    "no text": ("a.jsonl", '{"text": 5}\n{"text": null}\n', "'dropped_malformed': 2"),
    "no mark": ("a.jsonl", '{"text": "plain"}\n' * 9, "'dropped_malformed': 9"),
    "only duplicates": ("a.jsonl", ONE_ROW * 9, "'dropped_duplicate': 8"),
    "parquet": ("a.parquet", "not parquet", "a.parquet can't be read"),
    "CSV without quotes": ("a.csv", "text\nOne, two, three.\nOne.\n", "a.csv can't be read"),
    "CSV without quotes further down": ("a.csv", "text\nOne.\nOne, two.\n", "line 3"),
    "not gzip": ("a.jsonl.gz", "plain", "a.jsonl.gz can't be read"),
    "missing": ("b.jsonl", None, "b.jsonl can't be read: [Errno 2] No such file"),
    "an object of something else": ("a.json", '{"version": 1,\n"data": []}', "it has version, data"),
    "other format": ("a.txt", "text", "it is not a .jsonl, .json, .csv or .parquet"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_ends_with_one_line(tmp_path, expect_error, case):
    name, content, message = BAD_FILES[case]
    if content is not None:
        (tmp_path / name).write_text(content)
    expect_error(message, DATASET_NAME=str(tmp_path / name))


def test_a_folder_is_refused_by_its_name(tmp_path, expect_error):
    expect_error(f"DATASET_NAME: {tmp_path} is a folder", DATASET_NAME=str(tmp_path))


def test_a_thousand_columns_are_not_all_listed(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({f"id {i}": {"question": "x"} for i in range(1000)}))
    with pytest.raises(InputError, match="it has id 0, id 1, ") as error:
        read_texts(tmp_path / "a.json")
    assert len(str(error.value)) - len(str(tmp_path)) < 300
