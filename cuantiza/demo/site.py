"""The files of the page by the names that it asks for: ours, ONNX Runtime's, the tokenizer's, the artifact's."""

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
# Names end in .js throughout, as not every web server knows that .mjs is JavaScript.
PACKAGES = {
    "ort.js": "onnxruntime-web/dist/ort.wasm.min.mjs",
    "ort-wasm.js": "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "ort-wasm.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "tokenizers.js": "@huggingface/tokenizers/dist/tokenizers.min.mjs",
    "license-tokenizers.txt": "@huggingface/tokenizers/LICENSE",
}
NPM = ("onnxruntime-web", "@huggingface/tokenizers")
ARTIFACT = (MODEL, "tokenizer.json", "tokenizer_config.json")
# What a server has to send for a page to run on several threads; without them it runs on one.
HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


def assemble(
    artifact: Artifact, js: Path, folder: Path, place: Callable[[Path, Path], object] = shutil.copyfile
) -> None:
    """Put the page's files into `folder`, which exists, by `place(source, target)`.

    npm has installed the JavaScript packages in folder `js`. Raises UserError where a package of JavaScript is missing or the artifact is more than one file's weights.
    """
    for name, source in sources(artifact, js).items():
        place(source, folder / name)
    (folder / "demo.json").write_text(json.dumps(description(artifact, js)), encoding="utf-8")


def sources(artifact: Artifact, js: Path) -> dict[str, Path]:
    """{name on the page's server: file}, without demo.json."""
    if unfit := sorted(name for name in artifact.manifest.files if name.startswith(f"{MODEL}.")):
        raise UserError(
            f"{artifact.path / unfit[0]}: weights beside the graph are too large for a browser; take a smaller model"
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
    """What `assemble` puts into a folder."""
    return {*sources(artifact, js), "demo.json"}


def description(artifact: Artifact, js: Path) -> dict:
    """What the page has to know of the artifact before it downloads it."""
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
