"""The Hub path for real, without the internet: a server on loopback answers as the Hub does, on good days and bad."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import loopback_hub
import pytest
from conftest import ONE_STEP, SHORT_RUN
from loopback_hub import COMMIT, FEW_LINES

import finetune_medical_gpt2 as script


@pytest.fixture(scope="module")
def hub():
    """The port of the loopback Hub."""
    with loopback_hub.running() as port:
        yield port


def in_process(folder, port, body, **changes):
    """Run `body` in a new process with the Hub at `port` and a cache in `folder` -> the JSON that it prints."""
    constants = {**SHORT_RUN, **ONE_STEP, "MODEL_NAME": "some/model", "MODEL_REVISION": None}
    constants |= {"DATASET_NAME": "some/data", "OUTPUT_DIR": str(folder / "out"), **changes}
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(folder / "cache")}
    environment |= {"no_proxy": "127.0.0.1"}
    program = PRELUDE + f"vars(script).update({constants!r})\n" + body
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


PRELUDE = """
import contextlib, io, json, urllib.request
import finetune_medical_gpt2 as script


def ask_server(path):
    with urllib.request.urlopen(script.huggingface_hub.constants.ENDPOINT + "/" + path) as reply:
        return reply.read()


def results():
    return json.loads((script.main() / "results.json").read_text())


class Fallback(Exception):
    "The offline default was about to run."


def outcome():
    "(exit code or 'fallback', what was shown) of main() where the inputs can't be had."
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            script.main()
            code = 0
        except Fallback:
            code = "fallback"
        except SystemExit as stop:
            code = stop.code
    return code, shown.getvalue()


def stop_before_the_fallback(folder):
    if "tiny_gpt2" in str(folder):
        raise Fallback
    return load_tokenizer(folder)


load_tokenizer, script.load_tokenizer = script.load_tokenizer, stop_before_the_fallback
"""

RUN_ON_THE_HUBS = """
def load_splits_and_count(*args, **kwargs):
    global asked_before
    asked_before = len(json.loads(ask_server("requests")))
    return load_splits(*args, **kwargs)


load_splits, script.load_splits = script.load_splits, load_splits_and_count
ask_server("mood/good")
found = results()
asked = json.loads(ask_server("requests"))
print(json.dumps([found, asked[:asked_before], asked[asked_before:]]))
"""


@pytest.fixture(scope="module")
def downloaded(hub, tmp_path_factory):
    """A run on what the Hub has: its folder, its results, and the requests before the data is read and after."""
    folder = tmp_path_factory.mktemp("hub")
    found, before, after = in_process(folder, hub, RUN_ON_THE_HUBS)
    return SimpleNamespace(folder=folder, results=found, asked_before=before, asked_after=after)


def test_model_and_data_are_taken_from_the_hub_and_their_commits_noted(downloaded):
    results = downloaded.results
    assert not results["offline_fallback"]
    assert results["training"]["steps"] == 1
    assert (results["model"], results["model_revision"]) == ("some/model", COMMIT)
    assert (results["dataset"], results["dataset_revision"]) == ("some/data", COMMIT)
    assert results["data"]["rows"] == len(FEW_LINES)


def test_nothing_is_asked_of_the_hub_once_the_inputs_are_there(downloaded):
    assert any("some/model" in path for path in downloaded.asked_before)
    assert any("some/data" in path for path in downloaded.asked_before)
    assert downloaded.asked_after == []


def test_weights_of_another_format_are_not_downloaded(downloaded):
    assert any("model.safetensors" in path for path in downloaded.asked_before)
    assert not any("pytorch_model.bin" in path for path in downloaded.asked_before)


RUN_WITHOUT_HUB = """
cached = results()
script.DATASET_REVISION, script.OFFLINE_FALLBACK = "e" * 40, False
print(json.dumps([cached, outcome()]))
"""


def test_without_the_hub_the_cache_is_used_but_not_for_another_commit(downloaded):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    changes = {"SEED": 43, "DATASET_REVISION": COMMIT}
    cached, (code, message) = in_process(downloaded.folder, port, RUN_WITHOUT_HUB, **changes)
    assert not cached["offline_fallback"]
    assert (cached["model_revision"], cached["dataset_revision"]) == (COMMIT, COMMIT)
    assert cached["data"]["rows"] == len(FEW_LINES)
    assert code == 2
    assert "some/data is not in the cache" in message


# The Hub's mood -> (how main() ends, what it says). What isn't there, or refused, is the user's to mend; else there is
# the offline default. "hang" comes last, as its requests stay open.
BAD_DAYS = {
    "no model": (2, "error: MODEL_NAME: the Hub has no 'some/model'"),
    "no dataset": (2, "error: DATASET_NAME: the Hub has no 'some/data'"),
    "private": (2, "error: MODEL_NAME: the Hub refuses 'some/model' (401)"),
    "no revision": (2, "error: MODEL_REVISION: some/model has no"),
    "403": (2, "error: MODEL_NAME: the Hub refuses 'some/model' (403)"),
    "500": ("fallback", "it answered 500"),
    "close": ("fallback", "can't be reached (RemoteProtocolError"),
    "hang": ("fallback", "can't be reached (ReadTimeout"),
}
RUN_ON_BAD_DAYS = f"""
outcomes = {{}}
for mood in {list(BAD_DAYS)}:
    ask_server("mood/" + mood.replace(" ", "-"))
    script.MODEL_REVISION = "{COMMIT}" if mood == "no revision" else None
    outcomes[mood] = outcome(), json.loads(ask_server("requests"))
ask_server("mood/close")
script.OFFLINE_FALLBACK = False
outcomes["no fallback"] = outcome(), []
print(json.dumps(outcomes))
"""


def test_on_a_bad_day_of_the_hub_there_is_one_line_or_the_offline_default(hub, tmp_path):
    outcomes = in_process(tmp_path, hub, RUN_ON_BAD_DAYS)
    expected = BAD_DAYS | {"no fallback": (2, "error: the Hub can't be reached")}
    assert outcomes.keys() == expected.keys()
    for mood, (code, message) in expected.items():
        (found, text), requests = outcomes[mood]
        assert found == code and message in text, (mood, outcomes[mood])
        assert "Traceback" not in text
        if code == "fallback":  # a Hub that fails is not asked again and again
            assert 1 <= len(requests) <= 2, (mood, requests)


def test_a_folder_that_is_only_called_as_a_model_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    assert not script.is_local("model", "gpt2")
    assert not script.is_local("dataset", "owner/name")
    (Path("gpt2") / "config.json").write_text("{}")
    assert script.is_local("model", "gpt2")


def test_a_relative_folder_is_local_however_it_is_written_and_stays_so(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("./rows", "rows/"):
        path, commit = script.fetch("dataset", name)
        assert (path, commit) == (tmp_path / "rows", None)
        assert script.fetch("dataset", str(path)) == (path, None)  # not taken for a Hub id called rows
