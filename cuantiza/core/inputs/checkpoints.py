"""Find the checkpoint that `MODEL=` names: a folder, or a Hugging Face hub id with an optional `@revision`."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuantiza.core.errors import MENDS, UserError, taken_for_hub_id
from cuantiza.core.inputs.defaults import place
from cuantiza.core.inputs.model_config import read_object
from cuantiza.core.inputs.model_types import described_file, other_format
from cuantiza.core.inputs.tokenizer_files import PATTERNS, holds_vocabulary, names_in, tokenizer_files, vocabulary_files
from cuantiza.core.store.digests import digest, sha256_file

# In order of preference: the first group that a repository has is read, and only its files are downloaded. GPT-2
# repositories hold another gigabyte of TensorFlow and Flax weights.
WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
# A LoRA adapter of peft, beside the weights or instead of them.
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
CONFIGS = ("config.json", "generation_config.json")
# What a bundle passes on: the model card and the texts of the licence.
LICENCES = ("README.md", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
# What a file begins with that Git LFS has not fetched yet.
_POINTER = b"version https://git-lfs."
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Model:
    """A checkpoint in `folder`; `name` is safe as the name of a folder."""

    name: str
    folder: Path


def weight_files(names: set[str]) -> list[str]:
    """The weight files among `names`, of the most preferred kind; empty if there are none.

    Shards that an index does not name may be among them; `files_to_read` and the hub's download leave those out.
    """
    for group in WEIGHTS:
        if group[0] in names:
            return sorted(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in group))
    return []


def index_shards(path: Path) -> list[str]:
    """The shards that the index `path` names. Raises UserError where it is broken, or names files of other folders."""
    try:
        shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: broken index ({error}); download it again") from None
    if odd := [name for name in shards if not isinstance(name, str) or Path(name).name != name or {*name} & {*"*?["}]:
        raise UserError(f"{path}: names {odd[0]!r}, which is not a file of the same folder; download it again")
    return sorted(shards)


def files_to_read(folder: Path) -> list[str]:
    """The weight files of `folder` that are read: one file, or an index and the shards that it names.

    An earlier save may have left other shards behind, which belong to another model. The list is empty if `folder` has
    no weights. Raises UserError where an index is broken or a shard is missing.
    """
    names = {file.name for file in folder.iterdir()}
    main = next((group[0] for group in WEIGHTS if group[0] in names), None)
    if main is None or not main.endswith(".index.json"):
        return [main] if main else []
    shards = index_shards(folder / main)
    if missing := [name for name in shards if name not in names]:
        raise UserError(f"{folder / main}: names {', '.join(missing)}, which is not there; download the missing shards")
    return [main, *shards]


def has_all_weights(folder: Path) -> bool:
    """Whether `folder` holds weights, and every shard of them: a download may have been interrupted."""
    try:
        return bool(files_to_read(folder))
    except UserError:
        return False


def base_folder(folder: Path, label: str = "") -> Path:
    """The folder that holds the weights and the config.json of the checkpoint in `folder`.

    It is `folder` itself, unless that holds an adapter and no model: then it is the base that adapter_config.json names as a
    folder (seen from `folder`, or from the working directory) or as a hub id, which is taken from the hub's cache, or
    else downloaded. Raises UserError where that base cannot be found or is an adapter itself; the line names `label`, or
    the file adapter_config.json.
    """
    path = folder / ADAPTER[0]
    if not _lacks_base({file.name for file in folder.iterdir()}):
        return folder
    fields, label = adapter_fields(folder), label or str(path)
    spec = fields.get("base_model_name_or_path")
    if not isinstance(spec, str) or not spec:
        raise UserError(
            f"{label}: does not say which model it adapts; write its folder or hub id to base_model_name_or_path of {ADAPTER[0]}"
        )
    base = next((found for found in (folder / spec, place(spec)) if found.is_dir()), None) or _base_on_hub(
        label, spec, fields.get("revision")
    )
    if any((base / name).is_file() for name in ADAPTER):
        raise UserError(
            f"{label}: its base {spec} has a LoRA adapter itself; merge that one first with peft's merge_and_unload"
        )
    return base


def _lacks_base(names: set[str]) -> bool:
    """Whether files `names` are an adapter without its base. Weights without a config.json are none: trl keeps a value
    head so.
    """
    return ADAPTER[0] in names and not (weight_files(names) and CONFIGS[0] in names)


def is_base_of_working_folder(folder: Path) -> bool:
    """Whether the checkpoint in `folder` is an adapter whose base is a folder seen from the working directory."""
    base = base_folder(folder)
    if base == folder or base.is_absolute():
        return False
    return base == Path(adapter_fields(folder)["base_model_name_or_path"])


def tokenizer_folder(folder: Path) -> Path:
    """The folder with the tokenizer of the checkpoint in `folder`: an adapter may have one of its own, or its base's."""
    return folder if holds_vocabulary(names_in(folder)) else base_folder(folder)


def _base_on_hub(label: str, spec: str, revision: object) -> Path:
    match = _HUB_ID.fullmatch(spec)
    if match is None or spec.startswith("."):
        raise UserError(
            f"{label}: base_model_name_or_path is {spec!r}, which is neither a folder here nor a hub id; "
            f"write the base's folder or hub id there, in {ADAPTER[0]}"
        )
    version = match["revision"] or (revision if isinstance(revision, str) and revision else None)
    base = f"{label}: its base {spec}"
    with taken_for_hub_id(base):
        return _cached(match["repo"], version) or _download(base, match["repo"], version)


def adapter_fields(folder: Path) -> dict[str, Any]:
    """The fields of adapter_config.json. Raises UserError where it is not a JSON object."""
    path = folder / ADAPTER[0]
    if not path.is_file():
        raise UserError(
            f"{folder}: has an adapter's weights but no {ADAPTER[0]}; put it beside them, or remove the adapter"
        )
    return read_object(path, "adapter")


def model_name(spec: str) -> str:
    """The name of the folder for the outputs of model `spec`, found without a network.

    Raises UserError if `spec` gives no name.
    """
    name = place(spec).resolve().name if place(spec).is_dir() else spec.replace("/", "--")
    if not spec or not name:
        raise _no_model(f"MODEL={spec}")
    return name


def checkpoint_digest(folder: Path, sha256: Callable[[Path], str] = sha256_file) -> str:
    """sha256 over the files that an export of the checkpoint in `folder` reads, those of an adapter's base included.

    `sha256` reads each of them (cuantiza/core/store/digests.py). Raises UserError where an index or an adapter does not lead to its files.
    """
    names = [*CONFIGS, *tokenizer_files(names_in(folder)), *ADAPTER, *files_to_read(folder)]
    found = {name: sha256(folder / name) for name in names if (folder / name).is_file()}
    base = base_folder(folder)
    return digest(found if base == folder else found | {"base": checkpoint_digest(base, sha256)})


def resolve_model(spec: str, weights: bool = True) -> Model:
    """Find model `spec` on disk, or download it from the hub (an interrupted download is resumed).

    Without `weights`, the weights of a model on the hub are not downloaded, unless an adapter is among its files.

    Offline, the hub's local cache is used. Raises UserError if `spec` is neither a folder nor a hub id, or cannot be
    downloaded. An adapter's base is found and downloaded too.
    """
    path = place(spec)
    if path.is_dir():
        _refuse_pointers(path)
        _refuse_pointers(base_folder(path))
        return Model(model_name(spec), path)
    if path.is_file():
        raise UserError(f"MODEL={spec}: {described_file(path.name)}")
    match = _HUB_ID.fullmatch(spec)
    if path.exists() or match is None or spec.startswith("."):
        raise _no_model(f"MODEL={spec}")
    with taken_for_hub_id(f"MODEL={spec}"):
        folder = _download(f"MODEL={spec}", match["repo"], match["revision"], weights)
    base_folder(folder, f"MODEL={spec}")
    return Model(model_name(spec), folder)


def _refuse_pointers(folder: Path) -> None:
    """Raise UserError where a file that an export reads is a pointer, as a clone without Git LFS leaves it."""
    names = names_in(folder)
    read = [*weight_files(names), *tokenizer_files(names), *(name for name in (*CONFIGS, *ADAPTER) if name in names)]
    pointers = []
    for name in read:
        with (folder / name).open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                pointers.append(name)
    if pointers:
        more = f", and so is {', '.join(pointers[1:])}" if pointers[1:] else ""
        raise UserError(
            f"{folder / pointers[0]}: is a pointer of Git LFS instead of the file's content{more}; run `git lfs pull` in its folder, "
            "or download it from the hub"
        )


def _no_model(label: str) -> UserError:
    return UserError(
        f"{label}: is neither a folder nor a hub id such as datificate/gpt2-small-spanish or owner/name@revision"
    )


def _download(label: str, repo: str, revision: str | None, wanted: bool = True) -> Path:
    """Download the files of `repo` that an export reads; returns their folder in the hub's cache.

    Messages begin with `label`. Weights are left out if they are not `wanted` and no adapter has to find them.
    """
    import httpx2 as http
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        names = {file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()}
        weights = weight_files(names)
        other = not weights and ADAPTER[0] not in names
        if other and (found := other_format(names)):
            raise UserError(f"{label}: {found}")
        if other:
            raise UserError(
                f"{label}: has no safetensors and no pytorch_model.bin (TensorFlow and Flax weights are not read); "
                "convert it with transformers' save_pretrained first"
            )
        if weights and not _lacks_base(names):
            vocabulary_files(names, label)  # raises before gigabytes are downloaded
        if not wanted and ADAPTER[0] not in names:
            weights = []
        if index := next((name for name in weights if name.endswith(".index.json")), None):
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[index]))
            weights = [index, *index_shards(folder / index)]
        more = (name for name in (*CONFIGS, *ADAPTER) if name in names)
        patterns = [*weights, *more, *tokenizer_files(names), *LICENCES]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise _no_model(label) from None
    except GatedRepoError:
        raise UserError(f"{label}: is gated; accept its terms on the hub and run `hf auth login`") from None
    except RevisionNotFoundError:
        raise UserError(f"{label}: has no such revision; check what follows the @") from None
    except RepositoryNotFoundError:
        raise UserError(f"{label}: is neither a folder here nor a repository on the hub; check its spelling") from None
    # What hf_xet, which transfers large files, cannot do is a RuntimeError.
    except (
        OfflineModeIsEnabled,
        LocalEntryNotFoundError,
        HfHubHTTPError,
        http.HTTPError,
        OSError,
        RuntimeError,
    ) as error:
        if getattr(error, "errno", None) in MENDS:  # an error of the disk, not of the network
            raise
        cause = type(error.__cause__ or error).__name__
        reason = (
            "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else f"the hub does not answer ({cause})"
        )
    cached = _cached(repo, revision)
    if cached is None:
        raise UserError(
            f"{label}: is not whole in the local cache, and {reason}; "
            "check the network, or download it elsewhere and give its folder"
        )
    return cached


def _cached(repo: str, revision: str | None) -> Path | None:
    """The folder in the hub's cache with all that an earlier run needed of `repo`; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(*names: str) -> Path:
        # Raises if the cached listing names one of these files but the file itself is not cached.
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[*names], local_files_only=True))

    try:
        for main in (*(group[0] for group in WEIGHTS), ADAPTER[0]):
            folder = snapshot(main, *CONFIGS, *PATTERNS, *ADAPTER)
            if (folder / main).is_file():
                found = snapshot(*index_shards(folder / main)) if main.endswith(".index.json") else folder
                # A cache without a listing, as older versions of the library made it, gives a folder unchecked.
                config = (found / CONFIGS[0]).is_file() or (found / ADAPTER[0]).is_file()  # or the base's
                whole = main == ADAPTER[0] or (has_all_weights(found) and config)
                return found if whole else None
    except LocalEntryNotFoundError:
        pass
    return None
