"""A W&B server on this machine, of the few answers that its client needs to log and resume runs."""

import gzip
import json
import re
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OWNER = {"id": "e", "name": "team"}


class WandbServer(ThreadingHTTPServer):
    """Holds what it was sent.

    Attributes:
        rows: of each run, by its id.
        exit_codes: of each run, one for each time that it was logged.
        inputs: the last variables of each GraphQL operation.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rows: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self.summaries: dict[str, str] = {}
        self.exit_codes: defaultdict[str, list[int]] = defaultdict(list)
        self.inputs: dict[str, dict[str, Any]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What sends a client here."""
        url = f"http://127.0.0.1:{self.server_port}"
        return {"WANDB_BASE_URL": url, "WANDB_API_KEY": 40 * "a", "WANDB_MODE": "online"}

    def bucket(self, name: str) -> dict[str, Any]:
        """A run, as the client knows one."""
        rows = self.rows[name]
        return {
            "id": f"id-{name}",
            "name": name,
            "displayName": name,
            "config": "{}",
            "project": {"id": "p", "name": "study", "entity": OWNER},
            "historyLineCount": len(rows),
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "summaryMetrics": self.summaries.get(name, "{}"),
            "eventsTail": "[]",
            "eventsLineCount": 0,
            "logLineCount": 0,
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),  # of a run that has begun
        }

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL query."""
        self.inputs[operation] = given
        if operation == "RunResumeStatus":
            known = given["name"] in self.rows
            bucket = self.bucket(given["name"]) if known else None
            return {"model": {"id": "p", "name": "study", "entity": OWNER, "bucket": bucket}}
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": self.bucket(given["name"]), "inserted": True}}
        if operation == "CreateRunFiles":
            url = self.environment["WANDB_BASE_URL"]
            files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        return {}


class Handler(BaseHTTPRequestHandler):
    """Takes requests for a `WandbServer`."""

    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        """Take GraphQL and the stream of a run's rows; anything else is welcome."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            query = json.loads(body)
            operation = re.search(r"(?:query|mutation) (\w+)", query["query"])
            assert operation
            answer["data"] = self.server.answer(operation[1], query.get("variables") or {})
        elif stream := re.fullmatch(r"/files/\w+/\w+/(\w+)/file_stream", self.path):
            sent, name = json.loads(body), stream[1]
            files = sent.get("files") or {}
            for line in files.get("wandb-history.jsonl", {}).get("content", []):
                self.server.rows[name].append(json.loads(line))
            for line in files.get("wandb-summary.json", {}).get("content", []):
                self.server.summaries[name] = line
            if sent.get("complete"):
                self.server.exit_codes[name].append(sent["exitcode"])
        reply = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_PUT = do_POST  # noqa: N815
