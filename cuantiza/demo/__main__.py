"""Serves a web page that continues text with an artifact in the browser, or writes the page to a folder."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from cuantiza.core.cli import Parser, add_folder
from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.defaults import ARTIFACTS, MODEL, RECIPES, packaged
from cuantiza.core.store import artifact, folders
from cuantiza.demo.site import HEADERS, assemble, names


class Handler(SimpleHTTPRequestHandler):
    """Serves the files of a folder.

    The headers allow the page to use threads, and make the browser check for changed files at each visit.
    """

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".js": "text/javascript", ".wasm": "application/wasm"}

    def end_headers(self) -> None:
        for name, value in {**HEADERS, "Cache-Control": "no-cache"}.items():
            self.send_header(name, value)
        super().end_headers()

    def send_head(self) -> BytesIO | BinaryIO | None:
        try:
            return super().send_head()
        except ValueError:  # a name with a zero byte
            self.send_error(HTTPStatus.NOT_FOUND)
            return None

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing, so that the terminal keeps the one line that says where the page is."""


class Server(ThreadingHTTPServer):
    """A server that prints no traceback if a browser closes the connection during a download."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _arguments(arguments)
    found = artifact.open_artifact(args.artifact)
    if args.build:
        build(found, args.js, args.build.absolute())
        print(f"demo      {args.build}: open it through a web server, such as `python -m http.server -d {args.build}`")
        return 0
    with tempfile.TemporaryDirectory(prefix="cuantiza-demo-") as folder, suppress(KeyboardInterrupt):
        assemble(found, args.js, Path(folder), lambda source, target: target.symlink_to(source.absolute()))
        serve(Path(folder), args.port)
    return 0


def build(found: artifact.Artifact, js: Path, target: Path) -> None:
    """Write the page and all files that it needs to the folder `target`, completely or not at all.

    A folder that an earlier run wrote is replaced. Raises UserError if `target` holds any other file.
    """
    if target.exists():
        there = {file.name for file in target.iterdir()} if target.is_dir() else {target.name}
        if foreign := sorted(there - names(found, js)):
            raise UserError(
                f"{target}: holds {foreign[0]!r}, which is not ours and would be lost; give another folder to --build"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    with folders.staging(target) as work:
        site = work / "site"
        site.mkdir()
        assemble(found, js, site)
        folders.replace(site, target)


def serve(folder: Path, port: int) -> None:
    """Serve `folder` until Ctrl-C. Only this machine can reach the server. Port 0 means any free port."""
    try:
        server = Server(("127.0.0.1", port), partial(Handler, directory=str(folder)))
    except OSError as error:
        raise UserError(
            f"--port {port}: {(error.strerror or str(error)).lower()}; give another one, or --port 0 for any that is free"
        ) from None
    with server:
        print(f"demo      http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("demo", __doc__, "cuantiza demo --artifact artifacts/es-mini/int8-dynamic")
    default = ARTIFACTS / Path(MODEL).name / RECIPES[0]
    add_folder(parser, "--artifact", default, "folder of the artifact")
    parser.add_argument("--port", type=int, default=8000, help="port on 127.0.0.1 (default 8000; 0: any free port)")
    add_folder(parser, "--js", packaged("js"), "folder in which npm has installed the JavaScript packages")
    parser.add_argument(
        "--build", type=Path, metavar="FOLDER", help="write the page to this folder instead of serving it"
    )
    args = parser.parse_args(arguments)
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: is not a port; give a number from 0 to 65535")
    return args


if __name__ == "__main__":
    run(main)
