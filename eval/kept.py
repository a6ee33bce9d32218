"""Quality figures that outlive the run that measured them: a file beside the report, from which the next run takes them.

Quality is measured before latency and takes minutes. A run that is stopped afterwards, or that measures the same
artifacts again with one more, need not repeat it: the same files on the same text give the same figures. Latency is
measured anew every time, because all its rows have to be measured together.
"""

from __future__ import annotations

import json
from pathlib import Path

from cuantiza.core.store import digests, folders
from cuantiza.eval.report.schema import Inputs

FILE = ".quality.json"
# What `Inputs` says of latency alone, and of which subjects there are.
_OTHER_INPUTS = {"artifacts", "onnx", "torch", "rounds", "positions"}


class Kept:
    """The quality figures in `folder` that hold for `inputs`; none are read or written where `folder` is None.

    `identities` maps the name of each subject to a digest of all that its figures depend on, beside `inputs`.
    """

    def __init__(self, folder: Path | None, inputs: Inputs, identities: dict[str, str]) -> None:
        common = [inputs.artifacts[0], inputs.model_dump(mode="json", exclude=_OTHER_INPUTS)]
        self._folder = folder
        self._keys = {name: digests.digest([common, name, identity]) for name, identity in identities.items()}

    def read(self) -> dict[str, dict]:
        """The fields of the rows that are there, by the subject's name. A damaged file holds none."""
        if self._folder is None:
            return {}
        try:
            content = json.loads((self._folder / FILE).read_text(encoding="utf-8"))
            rows: dict[str, dict] = content["rows"]
            if content["sha256"] != digests.digest(rows):
                return {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return {name: rows[key] for name, key in self._keys.items() if key in rows}

    def write(self, rows: dict[str, dict]) -> None:
        """Put the fields of `rows`, by the subject's name, in the place of what the file holds; all or nothing."""
        if self._folder is not None:
            by_key = {self._keys[name]: fields for name, fields in rows.items()}
            content = json.dumps({"sha256": digests.digest(by_key), "rows": by_key})
            folders.publish_texts(self._folder, {FILE: content + "\n"})
