"""A server on this machine that answers as the Hugging Face Hub does when a model is uploaded."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

from huggingface_hub import ModelCard

TOKEN = "hf_secretOfTheTests"  # the one that may write


@contextmanager
def hub(owner: str = "anna"):
    """Yields its `url`; `repositories`, by name {"private": bool, "files": {path: bytes}}; and the `tokens` it saw."""
    state = SimpleNamespace(repositories={}, blobs={}, tokens=set(), commits=0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state, "owner": owner}))
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self._body()
        if not self._is_known():
            return self._answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":
            data = ModelCard(json.loads(body)["content"]).data  # raises for YAML that cannot be read
            return self._answer(200 if data.get("library_name") else 400, {"warnings": [], "errors": []})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            modes = [{"path": file["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self._answer(200, {"files": modes})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [{**each, "actions": {"upload": {"href": f"{self.state.url}/lfs/{each['oid']}", "header": {}}}}
                       for each in json.loads(body)["objects"]]  # fmt: skip
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        return self._answer(404, {"error": self.path})

    def do_PUT(self):
        oid, body = self.path.removeprefix("/lfs/"), self._body()
        assert hashlib.sha256(body).hexdigest() == oid
        self.state.blobs[oid] = body
        self._answer(200, {})

    def do_GET(self):
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/(.+)/resolve/main/(.+)", path):
            content = self.state.repositories[match[1]]["files"].get(match[2])
            if content is None:
                return self._answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
            headers = {"X-Repo-Commit": "c" * 40, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            return self._answer(200, content, headers)
        match = re.fullmatch(r"/api/models/(.+?)(/tree/main|/revision/main)?", path)
        if not match or match[1] not in self.state.repositories:
            return self._answer(404, {"error": path}, {"X-Error-Code": "RepoNotFound"})
        repository = self.state.repositories[match[1]]
        if match[2] == "/tree/main":
            return self._answer(200, [{"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                                      for name, content in repository["files"].items()])  # fmt: skip
        return self._answer(200, {"id": match[1], "private": repository["private"], "sha": "c" * 40})

    do_HEAD = do_GET

    def _create(self, wanted: dict):
        name = f"{wanted['organization'] or self.owner}/{wanted['name']}"
        is_there = name in self.state.repositories
        private = wanted.get("visibility") == "private"
        self.state.repositories.setdefault(name, {"private": private, "files": {".gitattributes": b""}})
        return self._answer(409 if is_there else 200, {"url": f"{self.state.url}/{name}"})

    def _commit(self, name: str, lines: list[dict]):
        files = self.state.repositories[name]["files"]
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        self.state.commits += 1
        return self._answer(200, {"commitUrl": f"{self.state.url}/{name}/commit/{'c' * 40}", "commitOid": "c" * 40})

    def _is_known(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.state.tokens.add(token)
        return token == TOKEN

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, content, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
