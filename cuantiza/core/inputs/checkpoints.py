"""Find the checkpoint that `MODEL=` names: a folder, or a Hugging Face hub id with an optional `@revision`."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path

from cuantiza.core.errors import MENDS, UserError
from cuantiza.core.inputs.defaults import place
from cuantiza.core.store.digests import digest, sha256_file

# In order of preference: the first group that a repository has is read, and only its files are downloaded. GPT-2
# repositories hold another gigabyte of TensorFlow and Flax weights.
WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# What a bundle passes on: the model card and the texts of the licence.
LICENCES = ("README.md", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Model:
    """A checkpoint in `folder`; `name` is safe as the name of a folder."""

    name: str
    folder: Path


def weight_files(names: set[str]) -> list[str]:
    """The weight files among `names`, of the most preferred kind; empty if there are none."""
    for group in WEIGHTS:
        if group[0] in names:
            return sorted(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in group))
    return []


def model_name(spec: str) -> str:
    """The name of the folder for the outputs of model `spec`, found without a network.

    Raises UserError if `spec` gives no name.
    """
    name = place(spec).resolve().name if place(spec).is_dir() else spec.replace("/", "--")
    if not spec or not name:
        raise _no_model(spec)
    return name


def checkpoint_digest(folder: Path) -> str:
    """sha256 over the files in `folder` that an export reads."""
    names = [*CONFIGS, *TOKENIZER, *weight_files({file.name for file in folder.iterdir()})]
    return digest({name: sha256_file(folder / name) for name in names if (folder / name).is_file()})


def resolve_model(spec: str) -> Model:
    """Find model `spec` on disk, or download it from the hub (an interrupted download is resumed).

    Offline, the hub's local cache is used. Raises UserError if `spec` is neither a folder nor a hub id, or cannot be
    downloaded.
    """
    path = place(spec)
    if path.is_dir():
        return Model(model_name(spec), path)
    match = _HUB_ID.fullmatch(spec)
    if path.exists() or match is None or spec.startswith("."):
        raise _no_model(spec)
    return Model(model_name(spec), _download(spec, match["repo"], match["revision"]))


def _no_model(spec: str) -> UserError:
    return UserError(
        f"MODEL={spec}: is neither a folder nor a hub id such as datificate/gpt2-small-spanish or owner/name@revision"
    )


def _download(spec: str, repo: str, revision: str | None) -> Path:
    """Download the files of `repo` that an export reads; returns their folder in the hub's cache."""
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
        if not weights:
            raise UserError(
                f"MODEL={spec}: has no safetensors and no pytorch_model.bin (TensorFlow and Flax weights are not read); "
                "convert it with transformers' save_pretrained first"
            )
        patterns = [*weights, *(name for name in (*CONFIGS, *TOKENIZER) if name in names)]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[*patterns, *LICENCES]))
    except HFValidationError:
        raise _no_model(spec) from None
    except GatedRepoError:
        raise UserError(f"MODEL={spec}: is gated; accept its terms on the hub and run `hf auth login`") from None
    except RevisionNotFoundError:
        raise UserError(f"MODEL={spec}: has no such revision; check what follows the @") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"MODEL={spec}: is neither a folder here nor a repository on the hub; check its spelling"
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, http.HTTPError, OSError) as error:
        if getattr(error, "errno", None) in MENDS:  # an error of the disk, not of the network
            raise
        cause = type(error.__cause__ or error).__name__
        reason = (
            "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else f"the hub does not answer ({cause})"
        )
    folder = _cached(repo, revision)
    if folder is None:
        raise UserError(
            f"MODEL={spec}: is not whole in the local cache, and {reason}; "
            "check the network, or download it elsewhere and give its folder"
        )
    return folder


def _cached(repo: str, revision: str | None) -> Path | None:
    """The folder in the hub's cache with all that an earlier run needed of `repo`; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        for group in WEIGHTS:
            # Raises if the cached listing names one of these files but the file itself is not cached.
            folder = Path(
                snapshot_download(
                    repo, revision=revision, allow_patterns=[*group, *CONFIGS, *TOKENIZER], local_files_only=True
                )
            )
            if (folder / group[0]).is_file():
                return folder
    except LocalEntryNotFoundError:
        pass
    return None
