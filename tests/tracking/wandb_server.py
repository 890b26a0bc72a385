"""A stand-in for W&B's server on this machine, for `wandb.init(mode="online")` and `wandb sync` of W&B 0.31.

It keeps what it is sent and answers what the client needs. It does not prove what W&B's own server does: tests look at
what leaves this project.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["WandbServer", "wandb_server"]


@dataclass
class WandbServer:
    """What one run has sent to the server.

    Attributes:
        url: Its address.
        history: All rows so far; a client says at which offset its own begin.
        summary: The last summary.
        config: The last configuration, as the client sends it.
        runs: Arguments of each request that created or changed the run.
        artifacts: Arguments of each request that created an artifact.
        files: Uploaded files, by path.
        queries: Names of the queries, in order.
        decide: HTTP status of the answer to a request, by the name of its query or its path; a test may set it.
        viewer: The user whose key it is; None for a key that nobody has.
    """

    url: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    queries: list[str] = field(default_factory=list)
    decide: Callable[[str], int] = lambda _: 200
    viewer: dict[str, str] | None = field(
        default_factory=lambda: {"id": "u", "entity": "us", "username": "me", "flags": "{}"}
    )

    def stream(self, files: dict[str, Any]) -> None:
        """Rows and summary."""
        if rows := files.get("wandb-history.jsonl"):
            content = [json.loads(row) for row in rows["content"]]
            self.history[rows["offset"] : rows["offset"] + len(content)] = content
        if summary := files.get("wandb-summary.json"):
            self.summary = json.loads(summary["content"][-1])

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL query."""
        answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "RunResumeStatus": self._resume_status,
            "UpsertBucket": self._run,
            "CreateRunFiles": self._run_files,
            "CreateArtifact": self._artifact,
            "CreateArtifactManifest": self._artifact_manifest,
            "CreateArtifactFiles": self._artifact_files,
            "ArtifactType": lambda _: {"project": {"artifact": None}},
            "Viewer": lambda _: {"viewer": self.viewer},
            "ServerFeaturesQuery": lambda _: {"serverInfo": {"features": []}},
            "CommitArtifact": lambda _: {"commitArtifact": {"artifact": {"id": "A", "digest": "d"}}},
        }
        return answers[name](given.get("input", given)) if name in answers else {}

    def _resume_status(self, _: dict[str, Any]) -> dict[str, Any]:
        bucket = {
            "id": "i",
            "name": "r",
            "displayName": "r",
            "summaryMetrics": json.dumps(self.summary),
            "historyLineCount": len(self.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsTail": "[]",
            "config": json.dumps(self.config),
            "tags": [],
            "wandbConfig": '{"t": {}}',
        }
        entity = {"id": "e", "name": "us"}
        return {"model": {"id": "p", "name": "nucleus", "entity": entity, "bucket": bucket if self.runs else None}}

    def _run(self, given: dict[str, Any]) -> dict[str, Any]:
        self.runs.append(given)
        if given.get("config"):
            self.config = json.loads(given["config"])
        project = {"id": "p", "name": "nucleus", "entity": {"id": "e", "name": "us"}}
        bucket = {"id": "i", "name": given.get("name") or "r", "displayName": "r", "project": project, "config": "{}"}
        return {"upsertBucket": {"bucket": bucket, "inserted": len(self.runs) == 1}}

    def _run_files(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/files/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": "i", "uploadHeaders": [], "files": files}}

    def _artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(given)
        sequence = {"id": "S", "latestArtifact": None}
        artifact = {"id": f"A{len(self.artifacts)}", "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def _artifact_manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/manifests/{given['artifactID']}"
        file = {"id": "F", "name": "m", "displayName": "m", "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": file}}}

    def _artifact_files(self, given: dict[str, Any]) -> dict[str, Any]:
        edges = [
            {
                "node": {
                    "id": item["name"],
                    "name": item["name"],
                    "displayName": item["name"],
                    "uploadUrl": f"{self.url}/artifacts/{item['name']}",
                    "uploadHeaders": [],
                    "artifact": {"id": item["artifactID"]},
                    "storagePath": item["name"],
                    "uploadMultipartUrls": None,
                }
            }
            for item in given["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": edges}}}


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server until the block ends."""
    state = WandbServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def _handler(state: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # a connection a request: none is left open at the end

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def _reply(self, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._reply({})

        def do_PUT(self) -> None:
            state.files[self.path.lstrip("/")] = self.rfile.read(int(self.headers["Content-Length"]))
            self._reply({})

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            name = self._name(data)
            if (status := state.decide(name)) != 200:
                self.send_error(status)
                return
            content = json.loads(data) if data and self.path.endswith(("graphql", "file_stream")) else {}
            if self.path.endswith("file_stream"):
                state.stream(content.get("files") or {})
            self._reply({"data": state.answer(name, content.get("variables") or {})})

        def _name(self, data: bytes) -> str:
            """The name of a query, which is noted, or the path of another request."""
            if not self.path.endswith("graphql"):
                return self.path
            found = re.search(r"\b(?:query|mutation)\s+(\w+)", json.loads(data)["query"])
            name = found.group(1) if found else ""
            state.queries.append(name)
            return name

    return Handler
