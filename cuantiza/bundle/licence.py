"""What a checkpoint says of its licence: the files to pass on with it, and how the new model card refers to them."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cuantiza.core.inputs.checkpoints import LICENCES

# The checkpoint's own card, in a bundle, whose README.md is another card.
CARD = "CHECKPOINT.md"
_README = "README.md"
_FIELDS = ("language", "license", "license_name", "license_link")


@dataclass(frozen=True)
class Licence:
    """The licence of a checkpoint.

    head: the fields of the new card's front matter. sentence: what the card says of the licence, as Markdown.
    files: the checkpoint's files to copy, by their names in the bundle.
    """

    head: dict[str, Any]
    sentence: str
    files: dict[str, Path]


def licence_of(checkpoint: Path, hub_id: str | None) -> Licence:
    """The licence of the checkpoint in the folder `checkpoint`, which is `hub_id` on the hub (None: only a folder)."""
    own = {key: value for key, value in front_matter(checkpoint).items() if key in _FIELDS and _is_text(value)}
    files = {CARD if path.name == _README else path.name: path for path in _documents(checkpoint)}
    head = {key: own[key] for key in _FIELDS if own.get(key)}
    texts = [name for name in files if name != CARD]
    if link := head.pop("license_link", None):
        target = _link(str(link), checkpoint, hub_id, files)
        if target:
            head["license_link"] = target
    elif "license" not in head and texts:
        head |= {"license": "other", "license_name": "that-of-the-checkpoint", "license_link": texts[0]}
    return Licence(head, _sentence(own, files, texts, hub_id), files)


def front_matter(checkpoint: Path) -> dict[str, Any]:
    """The YAML front matter of the checkpoint's own card; empty if there is none."""
    try:
        text = (checkpoint / _README).read_text(encoding="utf-8-sig")
        found = yaml.safe_load(text[4 : text.index("\n---", 3)]) if text.startswith("---\n") else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_text(value: object) -> bool:
    """Whether `value` is a text or a list of texts. YAML can nest lists so that a kilobyte is gigabytes as text."""
    return all(isinstance(item, str | int | float) for item in (value if isinstance(value, list) else [value]))


def _documents(checkpoint: Path) -> list[Path]:
    """The checkpoint's card and the texts of its licence, by name."""
    patterns = [pattern.lower() for pattern in LICENCES]
    return [
        path
        for path in sorted(checkpoint.iterdir())
        if path.is_file() and any(fnmatch.fnmatchcase(path.name.lower(), pattern) for pattern in patterns)
        if path.name.lower() != "readme.md" or path.name == _README
    ]


def _link(link: str, checkpoint: Path, hub_id: str | None, files: dict[str, Path]) -> str | None:
    """Where the new card's license_link leads: an address, or a file of the bundle, which is added to `files`.

    README.md is the checkpoint's card there, and the new card here. A file that cannot be passed on is linked on the
    hub; None if it is nowhere.
    """
    if "://" in link:
        return link
    name = link.removeprefix("./")
    if name == _README:
        return CARD if CARD in files else None
    if Path(name).name == name and (checkpoint / name).is_file():  # never a file of another folder
        files.setdefault(name, checkpoint / name)
        return name
    return f"https://huggingface.co/{hub_id}/blob/main/{name}" if hub_id else None


def _sentence(own: dict[str, Any], files: dict[str, Path], texts: list[str], hub_id: str | None) -> str:
    named = own.get("license_name") or own.get("license")
    said = (
        f"That of the checkpoint: {', '.join(map(str, named)) if isinstance(named, list) else named}." if named else ""
    )
    where = [f"Its text: {', '.join(f'[{name}]({name})' for name in texts)}."] if texts else []
    if CARD in files:
        where.append(f"The checkpoint's own card: [{CARD}]({CARD}).")
    if hub_id:
        where.append(f"The checkpoint: https://huggingface.co/{hub_id}.")
    if not named and not texts:
        source = f"at https://huggingface.co/{hub_id}" if hub_id else "beside the checkpoint"
        said = (
            f"That of the checkpoint, {source}: look there before you pass these files on, and name it at the head of "
            "this card."
        )
    return " ".join([said or "That of the checkpoint.", *where])
