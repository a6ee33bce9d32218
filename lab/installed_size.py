"""Prints what each extra of cuantiza takes on disk, in MB, dependencies included: `python -m lab.installed_size`.

Sizes are those of the files of the installed distributions, found in .venv and, for Ray, in .venv-ray.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import Distribution, distributions

from packaging.requirements import Requirement

from lab import ROOT

EXTRAS = ("export", "corpora", "plots", "sweep")
ENVIRONMENTS = (".venv", ".venv-ray")


def closure(requirements: Sequence[str], found: dict[str, Distribution]) -> dict[str, Distribution]:
    """The distributions that `requirements` install on this machine, by name, chosen from `found`.

    Raises KeyError with its name if one of them is missing.
    """
    needed: dict[str, Distribution] = {}
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        wanted = waiting.pop()
        name = canonical(wanted.name)
        if name == "cuantiza" or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        # Only one extra of a dependency is asked for: "ray" has none, and ours are spelled out by `requirements`.
        if name not in needed:
            needed[name] = found[name]
            waiting += [Requirement(line) for line in found[name].requires or []]
    return needed


def canonical(name: str) -> str:
    """The name of a distribution as PEP 503 compares it."""
    return name.lower().replace("_", "-").replace(".", "-")


def installed(paths: Sequence[str] | None = None) -> dict[str, Distribution]:
    """The distributions on `paths` (this interpreter's), by canonical name; the first of a name counts."""
    found: dict[str, Distribution] = {}
    for item in distributions() if paths is None else distributions(path=list(paths)):
        found.setdefault(canonical(item.metadata["Name"]), item)
    return found


def size(item: Distribution) -> int:
    """Bytes of all files of a distribution."""
    return sum(path.stat().st_size for file in item.files or [] if (path := item.locate_file(file)).is_file())


def main() -> int:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = installed([str(ROOT / name / "lib" / version / "site-packages") for name in ENVIRONMENTS])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    plain, extras = project["dependencies"], project["optional-dependencies"]
    for name in ("", *EXTRAS):
        lines = [*plain, *extras.get(name, []), *(extras["export"] if name == "sweep" else [])]
        total = sum(map(size, closure(lines, found).values()))
        print(f"cuantiza{f'[{name}]' if name else '':10} {total / 1e6:6.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
