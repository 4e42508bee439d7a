"""A server on loopback that answers as the Hub does, on good days and bad: what test_hub.py runs the script against."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from conftest import MICRO, TESTS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FEW_LINES = (TESTS / "medical_terms.jsonl").read_bytes().splitlines(keepends=True)[:30]
FILES = {
    "model": {path.name: path.read_bytes() for path in [*MICRO.glob("*.json"), *MICRO.glob("*.safetensors")]},
    "dataset": {"train.jsonl": b"".join(FEW_LINES)},
}
FILES["model"]["pytorch_model.bin"] = b"the same weights again, as many repositories have them"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as loading a model and a data set needs.

    `server.mood` makes it fail, and a request for /mood/<mood> sets it; `server.requests` are the paths asked for.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        path = self.path.split("?")[0].strip("/")
        if path.startswith("mood/"):
            self.server.mood = path.removeprefix("mood/").replace("-", " ")
            self.server.requests.clear()
            return self.reply(200)
        if path == "requests":
            return self.reply(200, self.server.requests)
        self.server.requests.append(path)
        if self.server.mood == "hang":
            self.server.stopping.wait()
        if self.server.mood in ("hang", "close"):
            self.close_connection = True
            return None
        return self.answer(path, "dataset" if "datasets/" in path else "model")

    do_HEAD = do_POST = do_GET

    def answer(self, path, kind):
        mood, missing = self.server.mood, {"X_Error_Code": "RepoNotFound", "X_Error_Message": "Repository not found"}
        if mood.isdecimal():
            self.reply(int(mood), {"error": "oh no"})
        elif mood == "login page":
            self.reply(200, b"<html>Please accept our terms.</html>", Content_Type="text/html")
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


@contextlib.contextmanager
def running():
    """The port of a server that runs meanwhile, at first in a good mood."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.mood, server.requests, server.stopping = "", [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.stopping.set()
        server.shutdown()
