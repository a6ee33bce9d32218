"""Artifacts: folders that are published whole or not at all, and verified by their manifest.

An artifact is artifacts/<model>/<recipe>/ with manifest.json and the files that it lists.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError
from cuantiza.core.store.digests import digest, sha256_file, sha256_known, sha256_once
from cuantiza.core.store.folders import replace

SCHEMA = "cuantiza/artifact/1"
MODEL = "model.onnx"
MANIFEST = "manifest.json"
# The files of every artifact besides its graph, external data and manifest. Only some have a chat template, which
# tokenizer_config.json repeats for readers that know no other file.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class File:
    """A file of an artifact: its size in bytes, and the sha256 of its content in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Describes an artifact and its origin. It has no measurement that another run could change.

    `inputs` names everything that the bytes depend on: with equal inputs, nothing has to be rebuilt. `details` is what
    the stage did: parity, which layers are quantized, what stays in floating point.
    """

    name: str
    model: str
    recipe: dict[str, Any]
    inputs: dict[str, Any]
    parent: str | None
    calibration: str | None
    files: dict[str, File]
    versions: dict[str, str]
    details: dict[str, Any]
    schema: str = SCHEMA


@dataclass(frozen=True)
class Artifact:
    """A published folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def model(self) -> Path:
        return self.path / MODEL

    @property
    def digest(self) -> str:
        """sha256 over the names and hashes of the files, which identifies the content."""
        return digest({name: file.sha256 for name, file in self.manifest.files.items()})


def name_in(path: Path, fields: dict[str, Any]) -> str:
    """The name of the artifact of the recipe `fields` in the file `path`: its stem, or what a manifest says.

    Raises KeyError where a manifest has no name.
    """
    return str(fields["name"]) if "recipe" in fields else path.stem


def name_by(recipe: str) -> str:
    """The name of the artifact that RECIPES=`recipe` makes: that of the recipe, or by `name_in` where it is a .json file."""
    path = Path(recipe)
    if path.suffix != ".json":
        return recipe
    try:
        return name_in(path, json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return path.stem


def open_artifact(path: Path, sha256: Callable[[Path], str] = sha256_file) -> Artifact:
    """Read and verify a published artifact.

    `sha256` reads its files: all of each, or only what may have changed (cuantiza/core/store/digests.py). Whoever makes
    something of an artifact that was opened with `sha256_known` calls `verify` first. Raises UserError if the manifest is
    missing or broken, or if a file's size or sha256 differs.
    """
    manifest_path = path / MANIFEST
    try:
        text = manifest_path.read_bytes().decode()
        fields = json.loads(text)
        if fields["schema"] != SCHEMA:
            raise ValueError(f"schema {fields['schema']!r} is not {SCHEMA!r}")
        # Manifests written before this field existed have no `sha256`.
        if "sha256" in fields and (fields.pop("sha256") != digest(fields) or _manifest_text(fields) != text):
            raise ValueError("changed since it was published")
        files = {name: File(**file) for name, file in fields.pop("files").items()}
        manifest = Manifest(**fields, files=files)
        if not isinstance(manifest.inputs, dict) or MODEL not in files:
            raise ValueError(f"no inputs, or no {MODEL}")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no {MANIFEST}, so not a whole artifact; run `make export quantize`, or `cuantiza export` and `cuantiza quantize`"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{manifest_path}: broken manifest ({error}); delete the folder and run make again") from None
    for name in files:
        if Path(name).name != name:
            raise UserError(
                f"{manifest_path}: file name {name!r} leaves the folder; delete the folder and run make again"
            )
    found = Artifact(path, manifest)
    _check_files(found, sha256)
    return found


def verify(found: Artifact, sha256: Callable[[Path], str] = sha256_once) -> None:
    """Check the files of `found` again. Raises UserError where one is not as it was.

    `sha256` reads them: by default all of each, unless this process did so.
    """
    _check_files(found, sha256)


def _check_files(found: Artifact, sha256: Callable[[Path], str]) -> None:
    for name, file in found.manifest.files.items():
        target = found.path / name
        if not target.is_file() or target.stat().st_size != file.bytes or sha256(target) != file.sha256:
            raise UserError(f"{target}: missing or changed since it was published; run make again to rebuild it")


def copy_companions(source: Path, target: Path) -> None:
    """Copy the companions that an artifact's folder `source` has to the folder `target`."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def up_to_date(path: Path, inputs: dict[str, Any]) -> Artifact | str:
    """The artifact at `path` if it is whole and made from `inputs`; else why it must be built, in a few words.

    Files that have not changed since an earlier run read them are not read again.
    """
    if not path.exists():
        return "new"
    try:
        found = open_artifact(path, sha256_known)
    except UserError as error:
        return str(error).split(";")[0]
    built = found.manifest.inputs
    changed = sorted(key for key in inputs.keys() | built.keys() if inputs.get(key) != built.get(key))
    return f"changed: {', '.join(changed)}" if changed else found


def rebuild_reason(path: Path, inputs: dict[str, Any]) -> str | None:
    """Why the artifact at `path` must be built, in a few words; None if it is up to date."""
    found = up_to_date(path, inputs)
    return found if isinstance(found, str) else None


def publish(
    work: Path,
    target: Path,
    *,
    name: str,
    model: str,
    recipe: dict[str, Any],
    inputs: dict[str, Any],
    parent: str | None,
    calibration: str | None,
    versions: dict[str, str],
    details: dict[str, Any],
) -> Artifact:
    """Write the manifest of the files in `work` and publish them as `target`."""
    files = {
        file.name: File(file.stat().st_size, sha256_file(file, target / file.name)) for file in sorted(work.iterdir())
    }
    manifest = Manifest(name, model, recipe, inputs, parent, calibration, files, versions, details)
    fields = json.loads(
        json.dumps(dataclasses.asdict(manifest))
    )  # numbers as keys become strings before they are sorted, as in the file
    (work / MANIFEST).write_bytes(_manifest_text(fields).encode())
    work.chmod(0o755)
    replace(work, target)
    return Artifact(target, manifest)


def _manifest_text(fields: dict[str, Any]) -> str:
    """The text of manifest.json: `fields`, and their digest as `sha256`."""
    return json.dumps(fields | {"sha256": digest(fields)}, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
