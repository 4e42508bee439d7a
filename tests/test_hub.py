"""The Hub path for real, without the internet: a server on loopback answers as the Hub does, on good days and bad."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import loopback_hub
import pytest
from conftest import ONE_STEP, SHORT_RUN
from loopback_hub import COMMIT, FEW_LINES

import finetune_medical_gpt2 as script

PRELUDE = """
import contextlib, io, json, urllib.request
import finetune_medical_gpt2 as script

constants = script.huggingface_hub.constants
HUB = constants.ENDPOINT


def ask_server(path):
    with urllib.request.urlopen(f"{HUB}/{path}") as reply:
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


def load_splits_and_count(*args, **kwargs):
    global asked_before
    asked_before = len(json.loads(ask_server("requests")))
    return load_splits(*args, **kwargs)


def repo_info_soon(*args, **kwargs):
    "The script's question, with a tenth of its patience."
    if "timeout" in kwargs:  # a download's own questions have none
        kwargs["timeout"] /= 10
    return repo_info(*args, **kwargs)


repo_info = script.huggingface_hub.HfApi.repo_info
load_tokenizer, script.load_tokenizer = script.load_tokenizer, stop_before_the_fallback
load_splits, script.load_splits = script.load_splits, load_splits_and_count
"""

# The Hub's mood -> (how main() ends, what it says). What isn't there, or refused, is the user's to mend; else there is
# the offline default. "hang" comes last, as its requests stay open.
BAD_DAYS = {
    "no model": (2, "error: MODEL_NAME: the Hub has no 'other/model'"),
    "no dataset": (2, "error: DATASET_NAME: the Hub has no 'other/data'"),
    "private": (2, "error: MODEL_NAME: the Hub refuses 'other/model' (401)"),
    "no revision": (2, "error: MODEL_REVISION: other/model has no"),
    "403": (2, "error: MODEL_NAME: the Hub refuses 'other/model' (403)"),
    "500": ("fallback", "it answered 500"),
    "close": ("fallback", "can't be reached (RemoteProtocolError"),
    "hang": ("fallback", "can't be reached (ReadTimeout"),
}
VISITS = f"""
# A good day, and an empty cache.
ask_server("mood/good")
found = dict(results=results())
asked = json.loads(ask_server("requests"))
found |= dict(asked_before=asked[:asked_before], asked_after=asked[asked_before:])

# Nothing listens at the Hub's address.
constants.ENDPOINT = "http://127.0.0.1:9"
script.SEED, script.DATASET_REVISION = 43, "{COMMIT}"
found["cached_results"] = results()
script.OFFLINE_FALLBACK, script.DATASET_REVISION = False, "e" * 40
found["another_commit"] = outcome()

# Bad days, and what is asked for is not in the cache.
constants.ENDPOINT = HUB
script.MODEL_NAME, script.DATASET_NAME, script.DATASET_REVISION = "other/model", "other/data", None
ask_server("mood/close")
found["no_fallback"] = outcome()
script.OFFLINE_FALLBACK = True
found["bad_days"] = {{}}
script.huggingface_hub.HfApi.repo_info = repo_info_soon
for mood in {list(BAD_DAYS)}:
    ask_server("mood/" + mood.replace(" ", "-"))
    script.MODEL_REVISION = "{COMMIT}" if mood == "no revision" else None
    found["bad_days"][mood] = outcome(), json.loads(ask_server("requests"))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def visits(tmp_path_factory):
    """What the script found on its VISITS; in one new process, as the Hub's address is read at the import."""
    folder = tmp_path_factory.mktemp("hub")
    settings = {
        **SHORT_RUN,
        **ONE_STEP,
        "MODEL_NAME": "some/model",
        "MODEL_REVISION": None,
        "DATASET_NAME": "some/data",
    }
    settings["OUTPUT_DIR"] = str(folder / "out")
    program = PRELUDE + f"vars(script).update({settings!r})\n" + VISITS
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(folder / "cache"), "no_proxy": "127.0.0.1"}
    # what schedulers may leave empty, and what a notebook hands down and is not installed here
    environment |= dict.fromkeys(("WORLD_SIZE", "RANK", "LOCAL_RANK"), "") | {"MPLBACKEND": "not_installed"}
    with loopback_hub.running() as port:
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{port}"
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return SimpleNamespace(**json.loads(done.stdout.splitlines()[-1]))


def test_model_and_data_are_taken_from_the_hub_and_their_commits_noted(visits):
    results = visits.results
    assert not results["offline_fallback"]
    assert results["training"]["steps"] == 1
    assert (results["model"], results["model_revision"]) == ("some/model", COMMIT)
    assert (results["dataset"], results["dataset_revision"]) == ("some/data", COMMIT)
    assert results["data"]["rows"] == len(FEW_LINES)


def test_nothing_is_asked_of_the_hub_once_the_inputs_are_there(visits):
    assert any("some/model" in path for path in visits.asked_before)
    assert any("some/data" in path for path in visits.asked_before)
    assert visits.asked_after == []


def test_weights_of_another_format_are_not_downloaded(visits):
    assert any("model.safetensors" in path for path in visits.asked_before)
    assert not any("pytorch_model.bin" in path for path in visits.asked_before)


def test_without_the_hub_the_cache_is_used_but_not_for_another_commit(visits):
    cached = visits.cached_results
    assert not cached["offline_fallback"]
    assert (cached["model_revision"], cached["dataset_revision"]) == (COMMIT, COMMIT)
    assert cached["data"]["rows"] == len(FEW_LINES)
    code, message = visits.another_commit
    assert code == 2
    assert "some/data is not in the cache" in message


@pytest.mark.parametrize("mood", BAD_DAYS)
def test_on_a_bad_day_of_the_hub_there_is_one_line_or_the_offline_default(visits, mood):
    (code, shown), requests = visits.bad_days[mood]
    assert (code, "Traceback" in shown) == (BAD_DAYS[mood][0], False)
    assert BAD_DAYS[mood][1] in shown
    if code == "fallback":  # a Hub that fails is not asked again and again
        assert 1 <= len(requests) <= 2


def test_without_the_fallback_a_hub_out_of_reach_is_one_line(visits):
    code, shown = visits.no_fallback
    assert code == 2
    assert "error: the Hub can't be reached" in shown


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
