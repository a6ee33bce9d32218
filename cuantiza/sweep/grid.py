"""The grid of models, recipes and corpora that the command line names. It is checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import Model, base_folder, files_to_read, resolve_model
from cuantiza.core.inputs.corpus import Source, Split, load_calibration, load_test
from cuantiza.core.inputs.defaults import SELF
from cuantiza.core.inputs.model_types import check_model_type
from cuantiza.core.inputs.weights.adapters import read_fields
from cuantiza.quantize.recipes.registry import Recipe, calibration_of, get_recipe

BASELINE = "fp32"
T = TypeVar("T")


@dataclass(frozen=True)
class Corpus:
    """A text: its source and its two splits."""

    source: Source
    calibration: Split
    test: Split


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: the names of its model, recipe and corpus."""

    model: str
    recipe: str
    corpus: str

    def __str__(self) -> str:
        return f"{self.model} × {self.recipe} × {self.corpus}"


@dataclass(frozen=True)
class Grid:
    """Models, recipes and corpora by name. `recipes` does not contain fp32, which is the baseline of every cell."""

    models: dict[str, Model]
    recipes: dict[str, Recipe]
    corpora: dict[str, Corpus]

    @property
    def cells(self) -> list[Cell]:
        """All cells. Those of one model and corpus are together, fp32 first."""
        names = (BASELINE, *self.recipes)
        return [Cell(model, recipe, corpus) for model in self.models for corpus in self.corpora for recipe in names]

    def calibrates(self, recipe: str) -> bool:
        """Whether an artifact of `recipe` depends on the corpus."""
        return recipe != BASELINE and calibration_of(self.recipes[recipe]) is not None


def read_grid(models: list[str], recipes: list[str], corpora: list[Source]) -> Grid:
    """Read the grid of MODELS=, RECIPES= and CORPORA=. Models and texts from the hub are downloaded.

    Raises UserError if one of them cannot be read, a model has no graph of ours, or two have the same name.
    """
    return Grid(
        _by_name("MODELS", models, [_model(given) for given in models]),
        _by_name("RECIPES", recipes, [get_recipe(given) for given in recipes if given != BASELINE]),
        _by_name("CORPORA", [given.spec for given in corpora], [_corpus(given) for given in corpora]),
    )


def _by_name(option: str, given: list[str], found: list[tuple[str, T]]) -> dict[str, T]:
    """Index `found` by name, without repetitions. Raises UserError if `given` is empty or one name has two meanings."""
    if not given:
        raise UserError(f"{option}=: is empty; give one or more names, with spaces between them")
    named: dict[str, T] = {}
    for name, value in found:
        if named.setdefault(name, value) != value:
            raise UserError(f"{option}={' '.join(given)}: two of them are called {name}; rename one")
    return named


def _model(given: str) -> tuple[str, Model]:
    from cuantiza.export.graphs.architectures import architecture  # slow to import, and --help does not need it

    model = resolve_model(given)
    # The path must be absolute, because a process of a cluster has another working directory.
    model = replace(model, folder=model.folder.absolute())
    base, fields = base_folder(model.folder), read_fields(model.folder)
    path = base / "config.json"
    check_model_type(fields, path, "graph")
    architecture(fields).parse(fields, path)
    if not files_to_read(base):
        raise UserError(f"{model.folder}: has neither safetensors nor a pytorch_model.bin; put the weights into it")
    return model.name, model


def _corpus(given: Source) -> tuple[str, Corpus]:
    path = Path(given.spec)
    is_path = given.spec != SELF and path.exists()
    source = replace(given, spec=str(path.absolute())) if is_path else given
    name = given.spec.replace("/", "--")
    if is_path:
        name = path.resolve().name if path.is_dir() else path.resolve().stem  # a folder v1.0 has no suffix
    return name, Corpus(source, load_calibration(source), load_test(source))
