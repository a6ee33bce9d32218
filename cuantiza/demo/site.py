"""The files of the demo page, by the names under which the page requests them.

They are the project's own files, ONNX Runtime's, the tokenizer library's and the artifact's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.defaults import packaged
from cuantiza.core.inputs.model_config import end_tokens, max_positions, read_config, start_token
from cuantiza.core.store.artifact import MODEL, Artifact

HERE = Path(__file__).resolve().parent / "web"
PAGE = ("index.html", "demo.css", "demo.js", "texts.js", "worker.js", "sampling.js", "licenses.txt")
# All names end in .js, because some web servers do not know that .mjs is JavaScript.
PACKAGES = {
    "ort.js": "onnxruntime-web/dist/ort.wasm.min.mjs",
    "ort-wasm.js": "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "ort-wasm.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "tokenizers.js": "@huggingface/tokenizers/dist/tokenizers.min.mjs",
    "license-tokenizers.txt": "@huggingface/tokenizers/LICENSE",
}
NPM = ("onnxruntime-web", "@huggingface/tokenizers")
ARTIFACT = (MODEL, "tokenizer.json", "tokenizer_config.json")
# If the server sends these headers, the page may use several threads. Without them it uses one.
HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


def assemble(
    artifact: Artifact, js: Path, folder: Path, place: Callable[[Path, Path], object] = shutil.copyfile
) -> None:
    """Put the page's files into the existing folder `folder` with `place(source, target)`.

    `js` is the folder where npm has installed the JavaScript packages. Raises UserError if a package is missing, or if
    the artifact's weights are in a file of their own.
    """
    for name, source in sources(artifact, js).items():
        place(source, folder / name)
    (folder / "demo.json").write_text(json.dumps(description(artifact, js)), encoding="utf-8")


def sources(artifact: Artifact, js: Path) -> dict[str, Path]:
    """{name on the server: file} for all files of the page but demo.json."""
    if unfit := sorted(name for name in artifact.manifest.files if name.startswith(f"{MODEL}.")):
        raise UserError(
            f"{artifact.path / unfit[0]}: the weights are more than 2 GB, too large for a browser; use a smaller model"
        )
    packages = {name: js / "node_modules" / path for name, path in PACKAGES.items()}
    if missing := [path for path in packages.values() if not path.is_file()]:
        raise UserError(
            f"{missing[0]}: is missing; install the JavaScript packages by `make js`, or outside a checkout by "
            f"`npm install {' '.join(NPM)}` in a folder that --js names"
        )
    return {
        **{name: HERE / name for name in PAGE},
        "causal_lm.js": packaged("js/causal_lm.mjs"),
        **packages,
        **{name: artifact.path / name for name in ARTIFACT},
    }


def names(artifact: Artifact, js: Path) -> set[str]:
    """The names of all files that `assemble` puts into a folder."""
    return {*sources(artifact, js), "demo.json"}


def description(artifact: Artifact, js: Path) -> dict:
    """The content of demo.json: facts about the artifact that the page needs before it downloads it."""
    config = read_config(artifact.path)
    return {
        "model": artifact.manifest.model,
        "recipe": artifact.manifest.name,
        "start": start_token(artifact.path),
        "end": sorted(end_tokens(artifact.path)),
        "positions": max_positions(config),
        "bytes": {
            "model": artifact.manifest.files[MODEL].bytes,
            "runtime": (js / "node_modules" / PACKAGES["ort-wasm.wasm"]).stat().st_size,
        },
    }
