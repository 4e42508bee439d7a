"""Settings, paths, locks and disks: a run goes through, or ends with one clear line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import MICRO, ONE_STEP, TINY, read, row, set_constants
from transformers import AutoTokenizer

import finetune_medical_gpt2 as script

IMPOSSIBLE_VALUES = [
    ("TEST_SIZE", 0),
    ("TEST_SIZE", 1.5),
    ("TEST_SIZE", float("nan")),
    ("MAX_LENGTH", 0),
    ("MAX_LENGTH", 512.0),
    ("MAX_LENGTH", None),
    ("SEED", -1),
    ("LORA_R", 0),
    ("LORA_R", True),
    ("LORA_ALPHA", 0),
    ("LORA_DROPOUT", 1),
    ("NUM_EPOCHS", 0),
    ("MAX_STEPS", 1.5),
    ("MAX_STEPS", -2),
    ("MAX_STEPS", 0),
    ("LEARNING_RATE", -1e-4),
    ("LEARNING_RATE", "1e-4"),
    ("LEARNING_RATE", float("inf")),
    ("BATCH_SIZE", 0),
    ("GRADIENT_ACCUMULATION_STEPS", 0),
    ("WARMUP_RATIO", -0.1),
    ("MAX_GRAD_NORM", -1),
    ("LOGGING_STEPS", 0),
    ("EVAL_STEPS", 0.5),
    ("MAX_NEW_TOKENS", 0),
    ("TEMPERATURE", -1),
    ("BASE_DROPOUT", 1.5),
]


def test_every_number_has_one_rule():
    names = [name for *_, names in script.RULES.values() for name in names.split()]
    numbers = [name for name in script.SETTINGS if type(getattr(script, name)) in (int, float)]
    assert sorted(names) == sorted(numbers)


@pytest.mark.parametrize("name, value", IMPOSSIBLE_VALUES)
def test_an_impossible_number_ends_with_one_line(expect_error, name, value):
    expect_error(f"{name} = {value!r}: must be", **{name: value})


@pytest.mark.parametrize(
    "message, changes",
    [
        ("QUESTIONS", {"QUESTIONS": {}}),
        ("QUESTIONS", {"QUESTIONS": ["What is gout?"]}),
        ("QUESTIONS", {"QUESTIONS": {1: "What is gout?"}}),
        ("REPORT_TO = 'numpy': not installed; pip install numpy", {"REPORT_TO": "numpy"}),
        ("PROMPT: ", {"PROMPT": "[INST] Tell me. [/INST]"}),
        ("PROMPT: ", {"PROMPT": "{question}"}),
        ("PROMPT: ", {"PROMPT": "[INST] {question} [/INST] Well,"}),
        ("MAX_LENGTH", {"MAX_LENGTH": 100_000}),
        ("MAX_NEW_TOKENS", {"MAX_NEW_TOKENS": 1000}),
        ("MAX_LENGTH = 16: the prompts alone fill it", {"MAX_LENGTH": 16}),
        ("LORA_TARGET_MODULES: the model has no module 'c_fcc'", {"LORA_TARGET_MODULES": ["c_attn", "c_fcc"]}),
        ("LORA_TARGET_MODULES: the model has no module 'c_fcc'", {"LORA_TARGET_MODULES": ("c_attn", "c_fcc")}),
        ("nothing_like_it", {"LORA_TARGET_MODULES": ["nothing_like_it"]}),
        ("LORA_TARGET_MODULES: ", {"LORA_TARGET_MODULES": []}),
        ("LORA_TARGET_MODULES: ", {"LORA_TARGET_MODULES": "("}),
        ("LORA_TARGET_MODULES: not embeddings or the LM head", {"LORA_TARGET_MODULES": ["lm_head"]}),
        ("LORA_TARGET_MODULES: not embeddings or the LM head", {"LORA_TARGET_MODULES": ["c_attn", "wte"]}),
    ],
)
def test_another_value_that_will_not_do_ends_with_one_line(expect_error, message, changes):
    expect_error(message, **changes)


def test_the_longest_answer_that_fits_the_context_is_allowed(tiny):
    question = "What is gout?"
    prompt = len(tiny[1](script.format_prompt(question))["input_ids"])
    cfg = SimpleNamespace(MAX_LENGTH=1024, QUESTIONS={"Gout": question}, MAX_NEW_TOKENS=1024 - prompt)
    encoded = script.encode(tiny[1], [row("gout")], 1024)
    script.check_fit(cfg, *tiny, encoded, [row("gout")])
    cfg.MAX_NEW_TOKENS += 1
    with pytest.raises(script.InputError, match="MAX_NEW_TOKENS"):
        script.check_fit(cfg, *tiny, encoded, [row("gout")])


def test_a_prompt_may_hold_other_braces(monkeypatch):
    monkeypatch.setattr(script, "PROMPT", '[INST] As JSON: {"answer": "..."}. {question} [/INST]')
    assert script.format_prompt("Why?") == '[INST] As JSON: {"answer": "..."}. Why? [/INST]'


def test_an_output_dir_that_is_a_file_ends_with_one_line(tmp_path, expect_error):
    (tmp_path / "out").write_text("mine")
    expect_error("OUTPUT_DIR = ")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("add", [lambda to: to.add_tokens(["[INST]"]), lambda to: setattr(to, "eos_token", "<end>")])
def test_a_token_without_an_embedding_is_refused(tmp_path, expect_error, add):
    folder = shutil.copytree(TINY, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add(tokenizer)
    tokenizer.save_pretrained(folder)
    expect_error("tokens without an embedding", MODEL_NAME=str(folder))


def test_a_home_folder_in_a_path_is_found(tmp_path, monkeypatch, few_rows):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    set_constants(monkeypatch, "~/runs", DATASET_NAME=f"~/{few_rows.name}", **ONE_STEP)
    run = script.main()
    assert run.parent == tmp_path / "runs"
    assert (run / "results.json").exists()
    assert not Path("~").exists()


def test_a_path_and_a_whole_temperature_are_taken_as_a_text_and_a_fraction(tmp_path, monkeypatch, few_rows):
    changes = {"MODEL_NAME": MICRO, "DATASET_NAME": few_rows, "TEMPERATURE": 2}
    set_constants(monkeypatch, tmp_path, **{**ONE_STEP, **changes, "OUTPUT_DIR": tmp_path})
    assert read(script.main())["settings"]["MODEL_NAME"] == str(MICRO)


HOLD_LOCK = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_run_that_another_process_works_on_is_left_alone(tmp_path):
    run = tmp_path / "run"
    script.Progress(run).lock.release()
    (lock,) = (run / "checkpoints").glob(".*")
    command = [sys.executable, "-c", HOLD_LOCK, lock]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(script.InputError, match="another process is using"):
            script.Progress(run)
        other.stdin.close()
    script.Progress(run).lock.release()


@pytest.mark.parametrize("free, message", [(0, "error: no space left"), (2**30, None)])
def test_a_full_disk_is_one_line_and_what_exists_stays(tmp_path, monkeypatch, capsys, few_rows, free, message):
    set_constants(monkeypatch, tmp_path / "out", DATASET_NAME=str(few_rows), **ONE_STEP)

    def fail(*args):
        raise RuntimeError("a library's words")

    monkeypatch.setattr(script, "fine_tune", fail)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(SystemExit if message else RuntimeError) as stop:
        script.main()
    if message:
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(message) and error.count("\n") == 1
    (progress,) = tmp_path.glob("out/*/checkpoints/progress.json")
    assert list(json.loads(progress.read_text())) == ["before"]
