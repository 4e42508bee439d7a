"""The Hub path for real, without the internet: a server on loopback answers as the Hub does, on good days and bad."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import loopback_hub
import pytest
from conftest import ONE_STEP_DRAWN, SHORT_RUN
from loopback_hub import COMMIT, FEW_LINES

import finetune_medical_gpt2 as script

PRELUDE = """
import contextlib, io, json, os, urllib.request
from pathlib import PosixPath  # as the constants are printed
import finetune_medical_gpt2 as script

constants = script.huggingface_hub.constants
HUB = constants.ENDPOINT


def ask_server(path):
    with urllib.request.urlopen(f"{HUB}/{path}") as reply:
        return reply.read()


def results():
    return json.loads((script.main() / "results.json").read_text())


class Fallback(Exception):
    "The demo was about to run."


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


def read_texts_and_count(path):
    global asked_before
    asked_before = len(json.loads(ask_server("requests")))
    return read_texts(path)


def repo_info_soon(*args, **kwargs):
    "The script's question, with a tenth of its patience."
    if "timeout" in kwargs:  # a download's own questions have none
        kwargs["timeout"] /= 10
    return repo_info(*args, **kwargs)


repo_info = script.huggingface_hub.HfApi.repo_info
load_tokenizer, script.load_tokenizer = script.load_tokenizer, stop_before_the_fallback
read_texts, script.read_texts = script.read_texts, read_texts_and_count
"""

# The Hub's mood -> (how main() ends, what it says). What isn't there, or refused, is the user's to mend; without an
# answer there is the demo. "hang" comes last, as its requests stay open.
NO_MODEL = (
    "error: MODEL_NAME: the Hub has no model 'other/model' of MODEL_REVISION = {!r} (None: the newest), or you have"
)
BAD_DAYS = {
    "no model": (2, NO_MODEL.format(None)),
    "no dataset": (2, "error: DATASET_NAME: the Hub has no dataset 'other/data' of DATASET_REVISION = None (None: the"),
    "private": (2, NO_MODEL.format(None)),
    "no revision": (2, NO_MODEL.format(COMMIT)),
    "403": (2, NO_MODEL.format(None)),
    "429": ("fallback", "the Hub can't be reached (HfHubHTTPError: "),
    "500": ("fallback", "the Hub can't be reached (HfHubHTTPError: "),
    "login page": ("fallback", "the Hub can't be reached (JSONDecodeError: "),
    "close": ("fallback", "the Hub can't be reached (RemoteProtocolError: "),
    "hang": ("fallback", "the Hub can't be reached (ReadTimeout: "),
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

# The client can't even be made: conda, for one, sets this variable.
os.environ["SSL_CERT_FILE"] = "/nowhere/cacert.pem"
script.huggingface_hub.close_session()
found["no_certificates"] = outcome()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def visits(tmp_path_factory):
    """What the script found on its VISITS; in one new process, as the Hub's address is read at the import."""
    folder = tmp_path_factory.mktemp("hub")
    settings = {
        **SHORT_RUN,
        **ONE_STEP_DRAWN,
        "MAX_LENGTH": 192,
        "MAX_STEPS": 2,
        "LOGGING_STEPS": 1,  # so there is a checkpoint, for which nothing is asked of the Hub, either
        "MODEL_NAME": "some/model",
        "DATASET_NAME": "some/data",
        "OUTPUT_DIR": str(folder / "out"),
    }
    program = PRELUDE + f"vars(script).update({settings!r})\n" + VISITS
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(folder / "cache"), "no_proxy": "127.0.0.1"}
    environment |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as a notebook may hand it down
    with loopback_hub.running() as port:
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{port}"
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return SimpleNamespace(**json.loads(done.stdout.splitlines()[-1]))


def test_model_and_data_are_taken_from_the_hub_and_their_commits_noted(visits):
    results = visits.results
    assert not results["offline_fallback"]
    assert results["training"]["steps"] == 2
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
def test_on_a_bad_day_of_the_hub_there_is_one_line_or_the_demo(visits, mood):
    (code, shown), requests = visits.bad_days[mood]
    assert (code, "Traceback" in shown) == (BAD_DAYS[mood][0], False)
    assert BAD_DAYS[mood][1] in shown
    if code == "fallback":  # a Hub that fails is not asked again and again
        assert 1 <= len(requests) <= 2
        assert "RUNNING THE DEMO" in shown
    else:
        assert len([line for line in shown.splitlines() if line and "Fetching" not in line]) == 1


def test_without_the_fallback_a_hub_out_of_reach_is_one_line(visits):
    code, shown = visits.no_fallback
    assert (code, shown.count("\n")) == (2, 1)
    assert "error: the Hub can't be reached" in shown


def test_without_certificates_the_hub_counts_as_out_of_reach(visits):
    code, shown = visits.no_certificates
    assert code == "fallback"
    assert "the Hub can't be reached (FileNotFoundError: " in shown


def test_a_download_that_breaks_off_is_the_users_to_repeat(monkeypatch):
    def break_off(*args, **kwargs):
        raise OSError("connection reset")

    monkeypatch.setattr(script.huggingface_hub.HfApi, "repo_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(script.huggingface_hub, "snapshot_download", break_off)
    with pytest.raises(
        script.InputError, match=r"owner/name: download failed \(connection reset\); run the same command"
    ):
        script.fetch("model", "owner/name")


def test_a_folder_that_is_only_called_as_a_model_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "gpt2"
    model.mkdir()
    for kind, name in (("model", "gpt2"), ("dataset", "owner/name")):
        with pytest.raises(ConnectionError):  # it is asked of the Hub, which the tests can't reach
            script.fetch(kind, name)
    (model / "config.json").write_text("{}")
    for name in ("gpt2", "./gpt2", "gpt2/", str(model)):
        assert script.fetch("model", name) == (model, None)
    with pytest.raises(script.InputError, match="gpt2 is local, so set MODEL_REVISION = None"):
        script.fetch("model", "gpt2", COMMIT)


def test_a_data_file_is_local_however_it_is_written_and_a_folder_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    for name in ("rows.csv", "./rows/rows.jsonl", "rows/rows.parquet", "rows.json.gz"):  # there or not
        assert script.fetch("dataset", name) == (tmp_path / name, None)
    for name in ("rows", "./rows", "rows/", str(tmp_path / "rows")):
        with pytest.raises(script.InputError, match="rows is a folder: name the file in it"):
            script.fetch("dataset", name)
