"""A hub on localhost: the part of Hugging Face's HTTP protocol that its client uses to list and download."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS_BYTES = 100_000  # larger files are redirected to a "CDN", as the hub does with LFS
Files = dict[str, bytes]


def files_of(folder: Path) -> Files:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@dataclass
class Hub:
    """What the server has, what it was asked, and how it misbehaves."""

    url: str = ""
    cdn: str = ""  # of another name, as the client treats redirects to the same host otherwise
    # (kind, repository) -> revision -> files; kind is "models" or "datasets"
    repositories: dict[tuple[str, str], dict[str, Files]] = field(default_factory=dict)
    # (method, path, status, Range header) of every request, in order
    requests: list[tuple[str, str, int, str | None]] = field(default_factory=list)
    # file name -> how many of its next transfers break off in the middle; -1 is all of them
    cuts: dict[str, int] = field(default_factory=dict)
    # answer everything with this status
    broken: int | None = None

    def add(self, repository: str, files: Files, revision: str = "main", kind: str = "models") -> None:
        self.repositories.setdefault((kind, repository), {})[revision] = files

    def transferred(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {
            path.rsplit("/", 1)[1]
            for method, path, status, _ in self.requests
            if method == "GET" and status in (200, 206) and ("/resolve/" in path or path.startswith("/cdn/"))
        }

    def commit(self, kind: str, repository: str, revision: str) -> tuple[str, Files] | None:
        """(commit hash, files) of a revision, which may be a commit hash itself."""
        for name, files in self.repositories.get((kind, repository), {}).items():
            content = [(path, hashlib.sha256(data).hexdigest()) for path, data in sorted(files.items())]
            sha = hashlib.sha1(repr(content).encode()).hexdigest()
            if revision in (name, sha):
                return sha, files
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+(?:/[^/]+)??)(?:/(revision|tree|paths-info)/(.+?))?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+(?:/[^/]+)?)/resolve/(.+)", path)
        if self.hub.broken:
            self._answer(self.hub.broken, b"down")
        elif path.startswith("/cdn/"):
            self._cdn(path)
        elif api:
            self._api(*api.groups())
        elif file:
            self._resolve("datasets" if file[1] else "models", file[2], file[3])
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _split(self, kind: str, repository: str, rest: str) -> tuple[str, Files, str] | None:
        """(commit, files, path inside) of "revision/path"; revisions may hold slashes themselves."""
        parts = rest.split("/")
        for end in range(len(parts), 0, -1):
            if found := self.hub.commit(kind, repository, "/".join(parts[:end])):
                return *found, "/".join(parts[end:])
        return None

    def _api(self, kind: str, repository: str, action: str | None, rest: str | None) -> None:
        if (kind, repository) not in self.hub.repositories:
            # The hub does not tell strangers whether a repository is missing or private.
            self._answer(401, b'{"error": "Invalid username or password."}', {"X-Error-Code": "RepoNotFound"})
            return
        found = self._split(kind, repository, rest or "main")
        if found is None:
            self._answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
            return
        sha, files, inside = found
        if action in ("tree", "paths-info"):
            entries = [self._entry(name, data) for name, data in files.items() if name.startswith(inside)]
            if action == "paths-info":
                wanted = (
                    json.loads(self.body)["paths"]
                    if self.body.startswith(b"{")
                    else [unquote(p[6:]) for p in self.body.decode().split("&")]
                )
                entries = [entry for entry in entries if entry["path"] in wanted]
            elif inside and not entries:
                self._answer(404, b'{"error": "no such path"}', {"X-Error-Code": "EntryNotFound"})
                return
            self._json(entries)
            return
        self._json(
            {
                "_id": sha[:24],
                "id": repository,
                "modelId": repository,
                "sha": sha,
                "private": False,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "lastModified": "2020-11-21T03:19:14.000Z",
                "createdAt": "2020-11-21T03:19:14.000Z",
                "siblings": [{"rfilename": name} for name in files],
            }
        )

    def _entry(self, name: str, data: bytes) -> dict:
        entry = {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
        if len(data) > LFS_BYTES:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _resolve(self, kind: str, repository: str, rest: str) -> None:
        found = self._split(kind, repository, rest)
        if found is None:
            known = (kind, repository) in self.hub.repositories
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
            return
        sha, files, name = found
        if name not in files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        data = files[name]
        if len(data) > LFS_BYTES:
            etag = hashlib.sha256(data).hexdigest()
            self._answer(
                302,
                b"",
                {
                    "X-Repo-Commit": sha,
                    "X-Linked-Etag": f'"{etag}"',
                    "X-Linked-Size": str(len(data)),
                    "ETag": '"of-the-pointer"',
                    "Location": f"{self.hub.cdn}/cdn/{kind}/{repository}/{sha}/{name}",
                },
            )
        else:
            self._content(name, data, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def _cdn(self, path: str) -> None:
        match = re.fullmatch(r"/cdn/(models|datasets)/(.+)/([0-9a-f]{40})/(.+)", path)
        _, files = self.hub.commit(match[1], match[2], match[3])
        self._content(match[4], files[match[4]], {})

    def _content(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        status, start, end = 200, 0, len(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            status, start, end = 206, int(match[1]), min(end, int(match[2] or end) + 1)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        headers["Accept-Ranges"] = "bytes"
        part = data[start:end]
        if self.command == "GET" and self.hub.cuts.get(name, 0):
            self.hub.cuts[name] -= 1
            self._answer(status, part[: len(part) // 2], headers, length=len(part))
            self.close_connection = True
        else:
            self._answer(status, part, headers)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.hub.requests.append((self.command, unquote(self.path), status, self.headers.get("Range")))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body) if length is None else length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body)


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of this machine, empty at first."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url, hub.cdn = f"http://127.0.0.1:{server.server_port}", f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
