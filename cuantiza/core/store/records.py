"""Records: what one run found out and the next need not find out again, as small JSON files in the user's cache.

A record saves time and nothing else. Where it cannot be written or read, or is damaged, all is done as if there were
none. It is renamed into place, so that two processes never see half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from cuantiza.core.store.user_cache import user_cache

_MOST = 1000  # more records than this, and the older half of them is removed


def read_record(kind: str, key: str) -> Any:
    """What `write_record` was given last for `kind` and `key`; None if there is nothing, or it is damaged."""
    try:
        fields = json.loads(_path(kind, key).read_bytes())
        whole = fields["key"] == key and fields["sha256"] == _sum(fields["value"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return fields["value"] if whole else None


def write_record(kind: str, key: str, value: Any) -> None:
    """Keep `value`, of JSON's types, for later runs of this user."""
    with suppress(OSError, RuntimeError):
        path = _path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"key": key, "value": value, "sha256": _sum(value)}, file)
            Path(part).replace(path)
        except BaseException:
            Path(part).unlink()
            raise
        _prune(path.parent)


def _path(kind: str, key: str) -> Path:
    return (
        user_cache()
        / "records"
        / f"{kind}-{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:32]}.json"
    )


def _sum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _prune(folder: Path) -> None:
    names = os.listdir(folder)  # noqa: PTH208 - other processes write here and remove from here
    if len(names) > _MOST:
        aged = sorted((file.stat().st_mtime_ns, file) for name in names if (file := folder / name).is_file())
        for _, file in aged[: len(aged) // 2]:
            file.unlink(missing_ok=True)
