"""budgets.toml: how much worse an artifact may be."""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from cuantiza.core.errors import UserError

_LARGEST = sys.float_info.max  # TOML's whole numbers may be larger
_UNITS = {"quality": "nats", "size": "percent", "latency": "percent"}


@dataclass(frozen=True)
class Budget:
    """How much worse head may be: `quality` in nats of ln perplexity, the others as shares of base (0.1: 10 % more)."""

    quality: float
    size: float
    latency: float


@dataclass(frozen=True)
class Budgets:
    """The budgets: those of `recipes` with one of their own, and the `default` for all others.

    `source` is the file that they were read from.
    """

    default: Budget
    recipes: dict[str, Budget]
    source: Path | None = None

    def of(self, recipe: str) -> Budget:
        return self.recipes.get(recipe, self.default)


FILE = Path("budgets.toml")
DEFAULT = Budgets(Budget(quality=0.005, size=0.01, latency=0.1), {})


def read_budgets(path: Path | None = None) -> Budgets:
    """Read the budgets from the TOML file `path`. The default is budgets.toml if it exists, else DEFAULT.

    Raises UserError if the file is missing, or if a budget is missing, unknown or not a number.
    """
    if path is None and not FILE.exists():
        return DEFAULT
    path = path or FILE
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist; name the file of the budgets by --budgets") from None
    except (ValueError, RecursionError) as error:  # errors of TOML and of UTF-8 are ValueErrors
        raise UserError(f"{path}: is not TOML ({error}); see docs/compare.md") from None
    own = fields.pop("recipes", {})
    if not isinstance(own, dict) or not all(isinstance(item, dict) for item in own.values()):
        raise UserError(f"{path}: [recipes.NAME] holds a recipe's budgets; see docs/compare.md")
    if missing := sorted(_UNITS.keys() - fields.keys()):
        raise UserError(f"{path}: names no {missing[0]}; add `{missing[0]} = ` and a number of {_UNITS[missing[0]]}")
    default = Budget(**_shares(path, "", fields))
    recipes = {name: replace(default, **_shares(path, f"recipes.{name}.", item)) for name, item in own.items()}
    return Budgets(default, recipes, path)


def _shares(path: Path, prefix: str, fields: dict) -> dict[str, float]:
    """Convert `fields` to the units of Budget. Raises UserError if one is unknown or not a number from 0 on."""
    for key, value in fields.items():
        if key not in _UNITS:
            raise UserError(f"{path}: {prefix}{key} is not a budget; there are {', '.join(_UNITS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LARGEST:
            raise UserError(f"{path}: {prefix}{key} is {str(value)[:40]!r}; give a number of {_UNITS[key]} from 0 on")
    return {key: value / 100 if _UNITS[key] == "percent" else float(value) for key, value in fields.items()}
