"""Where the user's cache is: what lies there saves time, and may be deleted at any moment.

A run never fails because of it: where it is switched off, cannot be written or is somebody else's, only the speed is lost.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

VARIABLE = "CUANTIZA_CACHE"
OFF = "off"


def user_cache() -> Path:
    """Our folder in the user's cache folder, made if it is missing.

    It is `cuantiza` in the folder that the variable CUANTIZA_CACHE names; else in XDG_CACHE_HOME, if that is an absolute
    path (the XDG base directory specification ignores others); else in the folder that the system has for caches.

    It must be a folder of this user's own that no other user may change, since what lies in it is run. A link is not
    followed: in a folder that others may write, it could lead anywhere. Raises RuntimeError where there is no such
    folder, or CUANTIZA_CACHE=off; OSError where it cannot be made.
    """
    place = _place()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise RuntimeError(f"{place} is no folder")
    if os.name == "posix":  # elsewhere it is in the user's profile, which has an access list
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:  # others may have put something there
            raise RuntimeError(f"{place} is not this user's alone")
        if found.st_mode & 0o077:
            place.chmod(0o700)
    return place


def _place() -> Path:
    given = os.environ.get(VARIABLE, "").strip()
    if given.lower() == OFF:
        raise RuntimeError(f"{VARIABLE}={given}")
    if given:
        return Path(given, "cuantiza").absolute()
    given = os.environ.get("XDG_CACHE_HOME", "")
    if Path(given).is_absolute():
        return Path(given, "cuantiza")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "cuantiza"
    return Path.home() / ".cache" / "cuantiza"
