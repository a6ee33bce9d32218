"""Where the user's cache is: what lies there saves time, and may be deleted at any moment."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache() -> Path:
    """Our folder in the user's cache folder, which need not exist yet.

    It is `cuantiza` in XDG_CACHE_HOME, if that is an absolute path (the XDG base directory specification ignores others);
    else in the folder that the system has for caches. Raises RuntimeError where the user has no home.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if Path(given).is_absolute():
        return Path(given, "cuantiza")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "cuantiza"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "cuantiza"
    return Path.home() / ".cache" / "cuantiza"
