"""The Hub path for real, without the internet: a server on loopback answers as the Hub does, on good days and bad."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import TESTS, set_constants
from huggingface_hub import constants

import finetune_medical_gpt2 as script

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "model": {path.name: path.read_bytes() for path in (TESTS / "tiny_gpt2").glob("*[!d]") if path.is_file()},
    "dataset": {"train.jsonl": b"".join((TESTS / "medical_terms.jsonl").read_bytes().splitlines(True)[:30])},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as loading a model and a data set needs; `server.mood` makes it fail."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        path, mood = self.path.split("?")[0].strip("/"), self.server.mood
        self.server.requests.append(path)
        if mood == "hang":
            time.sleep(20)
        if mood in ("hang", "close"):
            self.close_connection = True
            return
        kind = "dataset" if "datasets/" in path else "model"
        missing = {"X_Error_Code": "RepoNotFound", "X_Error_Message": "Repository not found"}
        if mood == 500 or mood == 403:
            self.reply(mood, {"error": "oh no"})
        elif mood == f"no {kind}":
            self.reply(404, {"error": "Repository not found"}, **missing)
        elif mood == "private":
            self.reply(401, {"error": "Invalid username or password."})
        elif mood == "no revision" and "revision" in path:
            self.reply(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        elif "/resolve/" in path:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            if name not in FILES[kind]:
                self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=COMMIT)
            else:
                content = FILES[kind][name]
                self.reply(200, content, ETag=f'"{abs(hash(content)):x}"', X_Repo_Commit=COMMIT, Accept_Ranges="none")
        elif "/tree/" in path or "/paths-info/" in path:
            entries = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in FILES[kind].items()]
            self.reply(200, entries)
        else:
            siblings = [{"rfilename": name} for name in FILES[kind]]
            self.reply(200, {"id": f"some/{kind}", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    do_HEAD = do_POST = do_GET


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.mood, server.requests = None, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def run(tmp_path, port, body, **changes):
    """Run `body` in a new process with the Hub at `port` and an own cache -> the JSON that it prints."""
    constants = {
        "MODEL_NAME": "some/model",
        "MODEL_REVISION": None,
        "DATASET_NAME": "some/data",
        "MAX_STEPS": 1,
        "BATCH_SIZE": 2,
        "MAX_LENGTH": 64,
        "MAX_NEW_TOKENS": 2,
        "TITLE_ROWS": 4,
        "GENERAL_ARTICLES": 1,
        "OUTPUT_DIR": str(tmp_path / "out"),
        **changes,
    }
    code = "import contextlib, io, json, urllib.request\nimport finetune_medical_gpt2 as script\n"
    code += f"vars(script).update({constants!r})\nHUB = script.huggingface_hub.constants.ENDPOINT\n"
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "cache")}
    environment |= {"PYTHONPATH": str(TESTS.parent), "no_proxy": "127.0.0.1"}
    process = subprocess.run(
        [sys.executable, "-c", code + body], env=environment, capture_output=True, text=True, timeout=240
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


RUN = "print(json.dumps(json.loads((script.main() / 'results.json').read_text())))"
TRY = """
class Fallback(Exception): pass
def tiny(folder):  # instead of the fallback's whole run
    if "tiny_gpt2" in str(folder): raise Fallback
    return real(folder)
real, script.load_tokenizer = script.load_tokenizer, tiny
def outcome():
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try: script.main(); code = 0
        except Fallback: code = "fallback"
        except SystemExit as stop: code = stop.code
    return code, error.getvalue() + out.getvalue()
"""


def test_found_then_cached(hub, tmp_path):
    hub.requests.clear()
    found = run(tmp_path, hub.server_port, RUN)
    assert not found["offline_fallback"] and found["training"]["steps"] == 1
    assert (found["model"], found["model_revision"]) == ("some/model", COMMIT)
    assert (found["dataset"], found["dataset_revision"]) == ("some/data", COMMIT)
    assert hub.requests
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    body = (
        TRY
        + """
results = json.loads((script.main() / "results.json").read_text())
script.DATASET_REVISION, script.OFFLINE_FALLBACK = "e" * 40, False
print(json.dumps([results, outcome()]))
"""
    )
    cached, (code, message) = run(tmp_path, port, body, SEED=43, DATASET_REVISION=COMMIT)
    assert code == 2 and "some/data is not in the cache" in message  # another commit of it is
    assert not cached["offline_fallback"] and cached["model_revision"] == COMMIT
    assert cached["data"]["rows"] == found["data"]["rows"] and cached["dataset_revision"] == COMMIT


def test_nothing_is_asked_of_the_hub_once_the_inputs_are_there(hub, tmp_path):
    hub.requests.clear()
    mark = """
real = script.score_rows
def first(*args, **kwargs):
    urllib.request.urlopen(HUB + "/mark").read()
    return real(*args, **kwargs)
script.score_rows = first
"""
    run(tmp_path, hub.server_port, mark + RUN)
    after = hub.requests[hub.requests.index("mark") :]
    assert set(after) == {"mark"}


def test_every_way_to_fail_ends_as_it_should(hub, tmp_path):
    moods = ["no model", "no dataset", "private", "no revision", 403, 500, "close", "hang"]
    body = (
        TRY
        + f"""
outcomes = {{}}
for mood in {moods!r}:
    urllib.request.urlopen(urllib.request.Request(HUB + "/mood", headers={{"X-Mood": str(mood)}}))
    script.MODEL_REVISION = "{COMMIT}" if mood == "no revision" else None
    outcomes[str(mood)] = outcome()
script.OFFLINE_FALLBACK = False
outcomes["no fallback"] = outcome()
print(json.dumps(outcomes))
"""
    )
    handler, real = hub.RequestHandlerClass, hub.RequestHandlerClass.do_GET

    def do_GET(self):
        if self.path == "/mood":
            mood = self.headers["X-Mood"]
            self.server.mood = int(mood) if mood.isdigit() else mood
            self.server.requests.append("mood")
            return self.reply(200)
        real(self)

    handler.do_GET = handler.do_HEAD = handler.do_POST = do_GET
    try:
        outcomes = run(tmp_path, hub.server_port, body)
    finally:
        handler.do_GET = handler.do_HEAD = handler.do_POST = real
        hub.mood = None
    expected = {
        "no model": (2, "error: MODEL_NAME: the Hub has no 'some/model'"),
        "no dataset": (2, "error: DATASET_NAME: the Hub has no 'some/data'"),
        "private": (2, "error: MODEL_NAME: the Hub refuses 'some/model' (401)"),
        "no revision": (2, "error: MODEL_REVISION: some/model has no"),
        "403": (2, "error: MODEL_NAME: the Hub refuses 'some/model' (403)"),
        "500": ("fallback", "it answered 500"),
        "close": ("fallback", "can't be reached (RemoteProtocolError"),
        "hang": ("fallback", "can't be reached (ReadTimeout"),
        "no fallback": (2, "error: the Hub can't be reached"),
    }
    for mood, (code, message) in expected.items():
        found, text = outcomes[mood]
        assert found == code and message in text, (mood, outcomes[mood])
        assert "Traceback" not in text
    # a Hub that fails is not asked again and again; under the last mood there are two runs
    requests = " ".join(hub.requests).split("mood ")[-len(moods) :]
    counts = [len(paths.split()) for paths in requests][moods.index(500) :]
    assert len(counts) == 3 and counts[0] <= 2 and counts[1] <= 2 and counts[2] <= 4, requests


def test_a_user_who_is_offline_stays_offline_where_everything_is_local(tmp_path, monkeypatch):
    seen = []

    def stop(*args, **kwargs):
        seen.append(constants.HF_HUB_OFFLINE)
        raise script.InputError("seen enough")

    set_constants(monkeypatch, tmp_path)
    monkeypatch.setattr(script, "load_splits", stop)
    with pytest.raises(SystemExit):
        script.main()
    assert seen == [True] and constants.HF_HUB_OFFLINE
