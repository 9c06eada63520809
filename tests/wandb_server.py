"""A W&B server on the loopback: the GraphQL calls, the file stream and the uploads that a run makes, and how they fail.

It keeps what a real server would show: history rows by line number, summary, config, files, alerts. `hang()` makes it
accept and never answer; `die()` closes the door in the middle of a run; `stopping.set()` is the Stop button of the UI.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass
class Run:
    """What the server holds of one run."""

    name: str
    project: str = ""
    entity: str = ""
    upserts: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    preempting: bool = False
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """History rows in order; a hole in the line numbers is an error."""
        lines = self.lines.get("wandb-history.jsonl", {})
        assert sorted(lines) == list(range(len(lines))), f"holes in {sorted(lines)}"
        return [json.loads(lines[i]) for i in range(len(lines))]

    def values(self, key: str) -> list[tuple[int, Any]]:
        """(step, value) of every history row that has `key`."""
        return [(row["step"], row[key]) for row in self.history if key in row]

    def count(self, name: str) -> int:
        """Lines of one of the streamed files."""
        return len(self.lines.get(name, {}))


class WandbServer:
    """A context manager; `url` goes into WANDB_BASE_URL."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.bodies: list[bytes] = []
        self.stopping = threading.Event()
        self.hanging = threading.Event()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self._http.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that was killed
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.die()

    def hang(self) -> None:
        """From here on accept connections and answer none of them."""
        self.hanging.set()

    def die(self) -> None:
        """Close the port."""
        if not self._over.is_set():
            self._over.set()
            self._http.shutdown()
            self._http.server_close()

    def wait(self, condition: Any, seconds: float = 20.0) -> None:
        """Until `condition()` holds."""
        stop = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < stop, f"not within {seconds} s; the runs are {self.runs}"
            time.sleep(0.02)

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The `data` of an answer."""
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": self._upsert(variables), "inserted": True}}
        if "RunResumeStatus" in query:
            return {"model": self._resume_status(variables)}
        if "notifyScriptableRunAlert" in query:
            self.runs[variables["runName"]].alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        if "createRunFiles" in query:
            run = variables["run"]
            files = [{"name": n, "uploadUrl": f"{self.url}/upload/{run}/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            viewer = {"id": "u", "entity": "tester", "username": "tester", "email": "t@e", "flags": "{}"}
            return {"viewer": {**viewer, "teams": {"edges": []}}}
        if "rtifact" in query:
            return self._artifact(query, variables)
        return {}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(variables["name"], Run(variables["name"]))
        run.upserts.append(variables)
        run.project, run.entity = variables["project"] or "", variables["entity"] or "tester"
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        entity = {"id": "e", "name": run.entity}
        return {
            "id": run.name,
            "name": run.name,
            "displayName": variables.get("displayName") or run.name,
            "description": "",
            "config": json.dumps(run.config),
            "sweepName": None,
            "project": {"id": "p", "name": run.project, "entity": entity},
            "historyLineCount": run.count("wandb-history.jsonl"),
        }

    def _artifact(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "query ArtifactType" in query:
            return {"project": {"artifact": None}}
        if "mutation CreateArtifact " in query:  # as if the same bytes were there already: no upload of its own
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "a"}}}
            return {"createArtifact": {"artifact": artifact}}
        return {}

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        run = self.runs.get(variables["name"])
        entity = {"id": "e", "name": "tester"}
        if run is None:
            return {"id": "p", "name": variables["project"], "entity": entity, "bucket": None}
        tails = {
            name: json.dumps([lines[max(lines)]] if (lines := run.lines.get(f"wandb-{name}.jsonl")) else [])
            for name in ("history", "events")
        }
        bucket = {
            "id": run.name,
            "name": run.name,
            "displayName": run.name,
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": run.count("output.log"),
            "historyLineCount": run.count("wandb-history.jsonl"),
            "eventsLineCount": run.count("wandb-events.jsonl"),
            "historyTail": tails["history"],
            "eventsTail": tails["events"],
            "config": json.dumps(run.config),
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"id": "p", "name": variables["project"], "entity": entity, "bucket": bucket}

    def stream(self, name: str, body: dict[str, Any]) -> None:
        """One post of the file stream."""
        run = self.runs.setdefault(name, Run(name))
        for file, part in (body.get("files") or {}).items():
            lines = run.lines.setdefault(file, {})
            for i, line in enumerate(part["content"]):
                lines[part["offset"] + i] = line
            if file == "wandb-summary.json" and part["content"]:
                run.summary = json.loads(part["content"][-1])
        run.preempting = run.preempting or bool(body.get("preempting"))
        if body.get("complete"):
            run.exit_code = body.get("exitcode")

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if server.hanging.is_set():
                    server._over.wait()
                if server._over.is_set():
                    self.close_connection = True
                    return
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                out: dict[str, Any] = {}
                with server._lock:
                    server.bodies.append(body)
                    parts = self.path.strip("/").split("/")
                    if self.path == "/graphql":
                        call = json.loads(body)
                        out = {"data": server.graphql(call["query"], call.get("variables") or {})}
                    elif parts[-1] == "file_stream":
                        server.stream(parts[-2], json.loads(body))
                        out = {"stopped": server.stopping.is_set()}
                    elif parts[0] == "upload":
                        server.runs[parts[1]].files["/".join(parts[2:])] = body
                raw = json.dumps(out).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST = do_PUT = answer

        return Handler
