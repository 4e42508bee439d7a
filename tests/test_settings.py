"""Settings, paths, locks and disks: a run goes through, or ends with one clear line."""

import errno
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ONE_STEP, TINY, set_constants
from transformers import AutoTokenizer

import finetune_medical_gpt2 as script

IMPOSSIBLE_VALUES = [
    ("MODEL_NAME", ""),
    ("MODEL_NAME", 5),
    ("DATASET_NAME", None),
    ("OFFLINE_FALLBACK", "yes"),
    ("TEST_SIZE", 0),
    ("TEST_SIZE", 1.5),
    ("TEST_SIZE", float("nan")),
    ("MAX_LENGTH", 0),
    ("MAX_LENGTH", 512.0),
    ("SEED", -1),
    ("LORA_R", 0),
    ("LORA_R", True),
    ("LORA_ALPHA", 0),
    ("LORA_DROPOUT", 1),
    ("LORA_TARGET_MODULES", []),
    ("NUM_EPOCHS", 0),
    ("MAX_STEPS", 0),
    ("LEARNING_RATE", -1e-4),
    ("LEARNING_RATE", "1e-4"),
    ("BATCH_SIZE", 0),
    ("GRADIENT_ACCUMULATION_STEPS", 0),
    ("WARMUP_RATIO", -0.1),
    ("MAX_GRAD_NORM", -1),
    ("LOGGING_STEPS", 0),
    ("EVAL_STEPS", 0.5),
    ("TRAIN_ON_PROMPT", 1),
    ("BASE_DROPOUT", 1.0),
    ("QUESTIONS", {}),
    ("QUESTIONS", {"a": ""}),
    ("TEMPERATURE", -1),
    ("REPORT_TO", "numpy"),
]


def test_every_setting_has_one_rule():
    names = [name for _, names in script.RULES.values() for name in names.split()]
    assert sorted(names) == sorted(script.SETTINGS)


@pytest.mark.parametrize("name, value", IMPOSSIBLE_VALUES)
def test_an_impossible_value_ends_with_one_line(expect_error, name, value):
    expect_error(f"{name} = {value!r}: must be", **{name: value})


@pytest.mark.parametrize(
    "message, changes",
    [
        ("MAX_LENGTH = 100000, and prompts of", {"MAX_LENGTH": 100_000}),
        ("MAX_NEW_TOKENS = 5000, must fit the context", {"MAX_NEW_TOKENS": 5000}),
        ("MAX_LENGTH = 16: no room for answers", {"MAX_LENGTH": 16, "TRAIN_ON_PROMPT": False}),
        ("Target modules {'nothing_like_it'} not found", {"LORA_TARGET_MODULES": ["nothing_like_it"]}),
        ("not embeddings or the LM head", {"LORA_TARGET_MODULES": ["lm_head"]}),
    ],
)
def test_a_value_that_does_not_fit_the_model_ends_with_one_line(expect_error, message, changes):
    expect_error(message, **changes)


def test_a_prompt_may_hold_other_braces(monkeypatch):
    monkeypatch.setattr(script, "PROMPT", '[INST] As JSON: {"answer": "..."}. {question} [/INST]')
    assert script.format_prompt("Why?") == '[INST] As JSON: {"answer": "..."}. Why? [/INST]'


@pytest.mark.parametrize("prompt", ["[INST] Tell me. [/INST]", "{question}", "[INST] {question} [/INST] Well,"])
def test_a_prompt_without_its_question_or_mark_ends_with_one_line(expect_error, prompt):
    expect_error("PROMPT = ", PROMPT=prompt)


def test_a_tracker_that_is_not_there_ends_with_one_line(monkeypatch, expect_error):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    expect_error("not installed; pip install wandb", REPORT_TO="wandb")


def test_an_output_dir_that_is_a_file_ends_with_one_line(tmp_path, expect_error):
    (tmp_path / "out").write_text("mine")
    expect_error("OUTPUT_DIR")
    assert (tmp_path / "out").read_text() == "mine"


def test_more_tokens_than_embeddings_are_refused(tmp_path, expect_error):
    folder = shutil.copytree(TINY, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    expect_error("has 6,145 tokens, the model embeddings for 6,144", MODEL_NAME=str(folder))


def test_a_home_folder_in_a_path_is_found(tmp_path, monkeypatch, few_rows):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    set_constants(monkeypatch, "~/runs", DATASET_NAME=f"~/{few_rows.name}", **ONE_STEP)
    run = script.main()
    assert run.parent == tmp_path / "runs"
    assert (run / "results.json").exists()
    assert not Path("~").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_disk_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys, error):
    def acquire(*args, **kwargs):
        raise error

    monkeypatch.setattr(script.filelock.FileLock, "acquire", acquire)
    script.lock_run(tmp_path / "run").release()
    assert "no file locks" in capsys.readouterr().out


HOLD_LOCK = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_run_that_another_process_works_on_is_left_alone(tmp_path):
    run = tmp_path / "run"
    script.lock_run(run).release()
    (lock,) = (run / "checkpoints").glob(".*")
    command = [sys.executable, "-c", HOLD_LOCK, lock]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(script.InputError, match="another process is at work"):
            script.lock_run(run)
        other.stdin.close()
    script.lock_run(run).release()


def test_a_full_disk_is_one_line_and_what_exists_stays(tmp_path, monkeypatch, capsys, few_rows):
    set_constants(monkeypatch, tmp_path / "out", DATASET_NAME=str(few_rows), **ONE_STEP)
    write_text = script.write_text

    def write_until_full(path, text):
        if not path.name.startswith("before-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_text(path, text)

    monkeypatch.setattr(script, "write_text", write_until_full)
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    assert "error: no space left" in capsys.readouterr().err
    kept = [path.name for path in tmp_path.glob("out/*/checkpoints/*.json")]
    assert "before-answers.json" in kept
    assert all(name.startswith("before-") for name in kept)


def test_letters_that_the_terminal_lacks_become_question_marks(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    script.say("данные, ünï")
    assert terminal.buffer.getvalue().decode("cp1252").strip() == "??????, ünï"
