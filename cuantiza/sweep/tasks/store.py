"""Cells that were measured: a file each, which is written whole, named by its inputs and verified when it is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cuantiza.core.store import digests, folders

SCHEMA = "cuantiza/cell/1"


class Store:
    """The files in `folder`. Equal inputs mean that nothing has to be measured again."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def read(self, inputs: dict) -> dict | None:
        """What was measured of `inputs`; None where nothing was, or its file is damaged."""
        try:
            found = json.loads(self._path(inputs).read_text(encoding="utf-8"))
            whole = found.pop("sha256") == digests.digest(found)
            return found["fields"] if whole and found["schema"] == SCHEMA and found["inputs"] == inputs else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def write(self, inputs: dict, fields: dict) -> dict:
        """Keep `fields`; returns them as `read` will."""
        found = json.loads(json.dumps({"schema": SCHEMA, "inputs": inputs, "fields": fields}))
        path = self._path(inputs)
        # Staged beside the folder of the cells, where the next run sweeps what a killed one left.
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
