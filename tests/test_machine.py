"""Terminals, paths, clocks and disks as they are elsewhere: a run goes through, or ends with one line."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHORT_RUN, TESTS, set_constants

import finetune_medical_gpt2 as script

FEW_STEPS = {"MAX_STEPS": 1, "MAX_LENGTH": 64, "MAX_NEW_TOKENS": 2, "GRADIENT_ACCUMULATION_STEPS": 1}


@pytest.fixture
def few_rows(tmp_path):
    """A small data file whose name has what plots and some terminals can't take."""
    path = tmp_path / "cost$_$данные.jsonl"
    path.write_text("".join((TESTS / "medical_terms.jsonl").read_text().splitlines(keepends=True)[:24]))
    return path


def command(tmp_path, **changes):
    """The command of a new process that runs main(), and its environment."""
    constants = {**SHORT_RUN, **FEW_STEPS, "OUTPUT_DIR": str(tmp_path / "out"), **changes}
    code = f"import finetune_medical_gpt2 as script\nvars(script).update({constants!r})\nscript.main()\n"
    return [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(TESTS.parent)}


def test_a_notebooks_backend_a_narrow_encoding_and_empty_variables_do_no_harm(tmp_path, few_rows):
    run, environment = command(tmp_path, DATASET_NAME=str(few_rows))
    environment |= {
        "MPLBACKEND": "module://not_installed.backend_inline",
        "PYTHONIOENCODING": "cp1252",
        "WORLD_SIZE": "",
        "RANK": "",
        "LOCAL_RANK": "",
    }
    done = subprocess.run(run, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").glob("*/results.json")
    assert json.loads(results.read_text(encoding="utf-8"))["dataset"] == str(few_rows)


def test_a_reader_that_goes_away_ends_the_run_with_one_line(tmp_path):
    run, environment = command(tmp_path)
    process = subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 130 and error.startswith("interrupted: ") and error.count("\n") == 1, error


def test_a_home_folder_in_a_path_is_found_and_a_folder_called_gpt2_is_not_the_model(tmp_path, monkeypatch, few_rows):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    assert not script.is_local("model", "gpt2") and not script.is_local("dataset", "owner/name")
    set_constants(monkeypatch, "~/runs", DATASET_NAME=f"~/{few_rows.name}", **FEW_STEPS)
    run = script.main()
    assert run.parent == tmp_path / "runs" and (run / "results.json").exists()
    assert not Path("~").exists()


def test_the_adapter_of_a_relative_model_name_finds_its_base_from_anywhere(tmp_path, monkeypatch, few_rows):
    monkeypatch.chdir(TESTS)
    set_constants(monkeypatch, tmp_path / "out", MODEL_NAME="tiny_gpt2", DATASET_NAME=str(few_rows), **FEW_STEPS)
    adapter = json.loads((script.main() / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(TESTS / "tiny_gpt2")


def test_checkpoints_dated_ahead_are_kept_by_their_steps(tmp_path, monkeypatch):
    set_constants(monkeypatch, tmp_path, **(FEW_STEPS | {"MAX_STEPS": 5, "LOGGING_STEPS": 1}))
    real, seen = script.Progress.on_save, []

    def on_save(self, args, state, control, **kwargs):
        for path in script.checkpoints(args.output_dir):
            os.utime(path, (2**32 - state.global_step,) * 2)  # the later the step, the older its date
        real(self, args, state, control, **kwargs)
        seen.append([path.name for path in script.checkpoints(args.output_dir)])

    monkeypatch.setattr(script.Progress, "on_save", on_save)
    script.main()
    assert seen[-1] == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_disk_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys, error):
    def acquire(*args, **kwargs):
        raise error

    monkeypatch.setattr(script.filelock.FileLock, "acquire", acquire)
    script.lock_run(tmp_path / "run").release()
    assert "no file locks" in capsys.readouterr().out
