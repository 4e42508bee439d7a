"""Processes as users start and end them: killed, interrupted, with a wrong word, or several at once."""

import contextlib
import io
import os
import runpy
import signal
import socket
import subprocess
import sys

import pytest
from child import Child
from conftest import ONE_STEP, ONE_STEP_DRAWN, SHORT_RUN, TESTS, flat, read, set_constants, without_times
from transformers import TrainerState

import finetune_medical_gpt2 as script

SCRIPT = TESTS.parent / "finetune_medical_gpt2.py"


def run_main(constants):
    vars(script).update(constants)
    script.main()


def run_file(folder, *arguments):
    """The script as `python finetune_medical_gpt2.py` runs it, in a folder."""
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's background job has it
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def run_in_a_notebook(folder, word):
    """The same by a notebook's %run, whose standard output can't be reconfigured."""
    with contextlib.redirect_stdout(io.StringIO()):
        run_file(folder, word)


def run_main_killed(constants, moment):
    """main() in a process that is killed: right after a stage is noted, or where it begins to write a file."""
    write_json, save_state = script.write_json, TrainerState.save_to_json

    def write_json_or_die(path, content):
        die_if(path.name == moment)
        write_json(path, content)
        die_if(path.name == "progress.json" and list(content)[-1] == moment)

    def save_state_or_die(state, path):
        die_if(f"{moment}/" in str(path))
        save_state(state, path)

    def die_if(now):
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    script.write_json, TrainerState.save_to_json = write_json_or_die, save_state_or_die
    run_main(constants)


# the state is a checkpoint's last file, so checkpoint-2 is half written
MOMENTS = ["before", "checkpoint-2", "training", "after", "results.json"]


def test_killed_at_any_moment_it_goes_on_to_the_same_end(tmp_path, few_rows):
    changes = {**ONE_STEP_DRAWN, "MAX_STEPS": 3, "EVAL_STEPS": 2, "LOGGING_STEPS": 1, "DATASET_NAME": str(few_rows)}
    constants = {**SHORT_RUN, **changes, "OUTPUT_DIR": str(tmp_path / "undisturbed")}
    child = Child(tmp_path, run_main, constants)
    assert child.exit_code() == 0, child.error()
    (undisturbed,) = (tmp_path / "undisturbed").iterdir()
    constants["OUTPUT_DIR"] = str(tmp_path / "killed")
    shown = ""
    for moment in MOMENTS:
        child = Child(tmp_path, run_main_killed, constants, moment)
        shown += child.stdout.read()
        assert child.exit_code() == -signal.SIGKILL, (moment, child.error())
    run = tmp_path / "killed" / undisturbed.name
    assert (run / "report.md").exists() and not (run / "results.json").exists()
    child = Child(tmp_path, run_main, {**constants, "score_rows": None, "fine_tune": None, "generate_answers": None})
    shown += child.stdout.read()
    assert child.exit_code() == 0, child.error()
    assert without_times(read(run)) == without_times(read(undisturbed))
    for name in ("report.md", "training_loss.png", "perplexity_comparison.png", "adapter/README.md"):
        assert (run / name).exists()
    # checkpoint-1 was whole before the kill in checkpoint-2, so only step 2 is taken twice
    assert [shown.count(f"step    {step}/3  loss") for step in (1, 2, 3)] == [1, 2, 1]
    for stage in ("before", "training", "after", "answers"):
        assert shown.count(f"{stage}: done in ") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_the_demo_with_one_line(tmp_path, number):
    child = Child(tmp_path, run_file, tmp_path)
    shown = ""
    for line in child.stdout:
        shown += line
        if line.startswith("data:"):
            break
    os.kill(child.process.pid, number)
    assert child.exit_code() == 130, child.error()
    assert child.error() == "interrupted: run the same command again to resume (outputs/)\n"
    assert "RUNNING THE DEMO, not the model and data that the constants name." in shown


INTERRUPT = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
signal.pause()  # until it takes effect
"""


def test_ctrl_c_during_the_imports_is_quiet(tmp_path):
    (tmp_path / "datasets.py").write_text(INTERRUPT)  # the first of the slow imports
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode in (-signal.SIGINT, 130)
    assert done.stderr == ""


@pytest.mark.parametrize("word, code", [("--help", 0), ("--other", 2)])
def test_the_command_line_knows_the_demo_alone(tmp_path, word, code):
    child = Child(tmp_path, run_file, tmp_path, word)
    shown = child.stdout.read()
    assert child.exit_code() == code
    assert "--demo" in shown + child.error()
    assert (word in child.error()) == (code == 2)
    assert not (tmp_path / "outputs").exists()


def test_a_notebook_can_run_the_file(tmp_path):
    child = Child(tmp_path, run_in_a_notebook, tmp_path, "--help")
    assert child.exit_code() == 0, child.error()


def fail(*args):
    raise script.InputError("not this one")


def fail_unexpectedly(*args):
    raise ZeroDivisionError(lambda: 0)  # which can't be sent to another process


def start_two(tmp_path, constants):
    """Two processes of one main(), with the variables that torchrun sets."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for rank in ("0", "1"):
        variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        children.append(Child(tmp_path, run_main, constants, variables=variables))
    return children


@pytest.mark.parametrize(
    "failure, code, errors",
    [
        (fail, 2, ["error: not this one\n", ""]),
        (
            fail_unexpectedly,
            1,
            [", in fail_unexpectedly\n", "\nRuntimeError: ZeroDivisionError("],
        ),  # one has the traceback
    ],
)
def test_what_fails_on_the_first_process_ends_the_others_too(tmp_path, failure, code, errors):
    children = start_two(tmp_path, {**SHORT_RUN, "OUTPUT_DIR": str(tmp_path / "out"), "fetch": failure})
    assert [child.exit_code() for child in children] == [code, code]
    for child, error in zip(children, errors, strict=True):
        if code == 2:
            assert child.error() == error
        else:
            assert error in child.error()


def test_two_processes_give_the_figures_of_one(tmp_path, monkeypatch, few_rows):
    changes = {**ONE_STEP, "MAX_STEPS": 3, "MAX_LENGTH": 180, "TEST_SIZE": 0.2, "SAMPLE_ROWS": 4}
    changes |= {"LOGGING_STEPS": 1, "DATASET_NAME": str(few_rows)}
    changes["LORA_DROPOUT"] = 0.0  # its random draws differ between processes
    children = start_two(tmp_path, {**SHORT_RUN, **changes, "OUTPUT_DIR": str(tmp_path / "two"), "BATCH_SIZE": 1})
    set_constants(monkeypatch, tmp_path / "one", **changes)
    one = read(script.main())
    shown = [child.stdout.read() for child in children]
    assert [child.exit_code() for child in children] == [0, 0], children[0].error()
    (run,) = (tmp_path / "two").iterdir()
    two = read(run)
    assert two["hardware"]["processes"] == 2
    assert [text.count("Everything is in") for text in shown] == [1, 0]
    assert [child.error() for child in children] == ["", ""]
    for name in ("loss", "grad_norm"):
        one_by_one = [[e[name] for e in result["training"]["log_history"] if name in e] for result in (one, two)]
        assert one_by_one[0] == pytest.approx(one_by_one[1], rel=1e-2), name
    assert two["training"]["tokens"] == one["training"]["tokens"]
    one, two = one["perplexity"], two["perplexity"]
    assert two["before"]["answer"] > 1  # there are answers
    for when, tolerance in (("before", 1e-3), ("after", 5e-3)):
        assert flat(two[when]) == pytest.approx(flat(one[when]), rel=tolerance)
        for name in ("trained", "everyday"):
            assert two[name][when] == pytest.approx(one[name][when], rel=tolerance)
    assert two["shown_one_row"] == pytest.approx(one["shown_one_row"], rel=1e-3)
