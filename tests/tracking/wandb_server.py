"""As much of W&B's server as its own client needs to be online with: GraphQL, the stream of rows, files.

What the client sends is kept by run, as the real server does: rows by their line number, so that what a resumed process
sends follows what is there.
"""

import base64
import gzip
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_ENTITY = {"id": "e", "name": "somebody"}


@dataclass
class SentRun:
    """What one run id was sent."""

    project: str
    display_name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)  # history by line number
    summary: str = "{}"
    exit_codes: list[int] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(self.lines[number]) for number in sorted(self.lines)]


class Server:
    """Answers on 127.0.0.1 whoever shows `key`, and 401 else.

    `runs` is by id; `opened` is set once there is one; `refused` counts requests that were sent away.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.runs: dict[str, SentRun] = {}
        self.refused = 0
        self.opened = threading.Event()
        self.closed = False
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"server_of": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        """From now on nobody answers, as of a server that has died; nor on connections that are open."""
        self.closed = True
        self._http.shutdown()
        self._http.server_close()

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer; what is not known here is null, as for an old server."""
        if operation == "RunResumeStatus":
            run = self.runs.get(given["name"])
            bucket = run and _bucket(given["name"], run)
            return {"model": {"id": "p", "name": given["project"], "entity": _ENTITY, "bucket": bucket}}
        if operation == "UpsertBucket":
            inserted = given["name"] not in self.runs
            run = self.runs.setdefault(given["name"], SentRun(given["project"]))
            run.display_name = given.get("displayName") or run.display_name
            run.config = json.loads(given.get("config") or "null") or run.config
            self.opened.set()
            return {"upsertBucket": {"bucket": _bucket(given["name"], run), "inserted": inserted}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{given['run']}/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        return {}


def _bucket(name: str, run: SentRun) -> dict[str, Any]:
    last = [run.lines[max(run.lines)]] if run.lines else []
    return {
        "id": f"storage-{name}", "name": name, "displayName": run.display_name, "description": "", "notes": "",
        "tags": [], "config": json.dumps(run.config), "sweepName": None, "summaryMetrics": run.summary,
        "project": {"id": "p", "name": run.project, "entity": _ENTITY},
        "historyLineCount": len(run.lines), "eventsLineCount": 0, "logLineCount": 0,
        "historyTail": json.dumps(last), "eventsTail": "[]", "wandbConfig": json.dumps({"t": 1}),
    }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server_of: Server
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with suppress(ConnectionResetError):  # the client leaves without a word
            super().handle()

    def do_POST(self) -> None:
        server, body = self.server_of, self._body()
        if server.closed:
            self.close_connection = True
            return
        if self.path.startswith("/sdk/otel/"):  # the client's reports about itself, which show no key
            self._reply({})
            return
        if not self._allowed():
            return
        with server.lock:
            if self.path == "/graphql":
                asked = json.loads(body)
                self._reply({"data": server.answer(asked["operationName"], asked.get("variables") or {})})
            elif stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                self._stream(server.runs[stream[1]], json.loads(body))
                self._reply({})
            else:
                self._reply({}, 404)

    def do_PUT(self) -> None:
        body = self._body()
        _, _, run, name = self.path.split("/", 3)
        self.server_of.runs[run].files[name] = body
        self._reply({})

    def log_message(self, *words: object) -> None:
        """Say nothing."""

    def _stream(self, run: SentRun, sent: dict[str, Any]) -> None:
        files = sent.get("files") or {}
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        run.lines |= dict(enumerate(history["content"], start=history["offset"]))
        if "wandb-summary.json" in files:
            run.summary = files["wandb-summary.json"]["content"][-1]
        if sent.get("complete"):
            run.exit_codes.append(sent["exitcode"])

    def _allowed(self) -> bool:
        kind, _, word = self.headers.get("Authorization", "").partition(" ")
        if kind == "Basic" and base64.b64decode(word) == f"api:{self.server_of.key}".encode():
            return True
        self.server_of.refused += 1
        self._reply({"errors": [{"message": "invalid API key"}]}, 401)
        return False

    def _body(self) -> bytes:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw

    def _reply(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
