"""Stores measured cells, one file each. A file is written atomically, named by its inputs, and verified when read."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cuantiza.core.store import digests, folders

SCHEMA = "cuantiza/cell/1"


class Store:
    """The files of cells in `folder`. A cell with equal inputs does not have to be measured again."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def read(self, inputs: dict) -> dict | None:
        """The fields that were measured for `inputs`; None if there are none, or their file is damaged."""
        try:
            found = json.loads(self._path(inputs).read_text(encoding="utf-8"))
            whole = found.pop("sha256") == digests.digest(found)
            return found["fields"] if whole and found["schema"] == SCHEMA and found["inputs"] == inputs else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def write(self, inputs: dict, fields: dict) -> dict:
        """Store `fields` for `inputs`, and return them exactly as `read` will."""
        found = json.loads(json.dumps({"schema": SCHEMA, "inputs": inputs, "fields": fields}))
        path = self._path(inputs)
        # The temporary file is beside the cells' folder, where the next run removes leftovers of a killed run.
        with folders.staging(self._folder) as work:
            file = work / path.name
            with file.open("w", encoding="utf-8") as stream:
                stream.write(json.dumps(found | {"sha256": digests.digest(found)}, indent=1, ensure_ascii=False) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            file.replace(path)
        return found["fields"]

    def _path(self, inputs: dict) -> Path:
        return self._folder / f"{inputs['kind']}-{digests.digest(inputs)[:20]}.json"
