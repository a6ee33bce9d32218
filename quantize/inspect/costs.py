"""The costs of each recipe, as measured for the accuracy page: costs.json, which lab/accuracy writes, and its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuantiza.core.errors import UserError
from cuantiza.core.machine.terminal import new_table
from cuantiza.core.store import folders
from cuantiza.quantize.recipes.registry import RECIPES

if TYPE_CHECKING:
    from rich.table import Table

COSTS = Path(__file__).parent / "costs.json"
SCHEMA = "cuantiza/costs/1"
# The figures of an artifact that are shown, and their format. ratio: bytes of the graph over those of fp32's graph.
# delta_ln_ppl: rise of ln perplexity, nats per token. top1_agreement: share of positions with fp32's likeliest token.
FIGURES: dict[str, Callable[[float], str]] = {
    "ratio": lambda value: f"{value:.3f}",
    "delta_ln_ppl": lambda value: f"{round(value, 4) + 0.0:.4f}",  # no -0.0000
    "top1_agreement": lambda value: f"{100 * value:.1f} %",
}

_WORDS = "s8, u8: signed and unsigned integers of 8 bits. mse: the range with the least expected squared error."


def costs_of(accuracy: dict) -> dict:
    """Return the content of costs.json: the FIGURES of every recipe in `accuracy`, the JSON of the accuracy page.

    `accuracy` has a model once for each text. Only the first text is kept, which is the project's own, and only models
    that are scored on all texts that the first model is scored on, which leaves out those of another language.
    """
    first = accuracy["models"][0]
    texts: dict[str, list[str]] = {}
    for item in accuracy["models"]:
        texts.setdefault(item["model"], []).append(item["corpus"])
    alike = [name for name, corpora in texts.items() if corpora == texts[first["model"]]]
    models = [item for item in accuracy["models"] if item["corpus"] == first["corpus"] and item["model"] in alike]
    kept = [
        {
            "model": model["model"],
            "artifacts": [
                {"name": row["name"]} | {figure: row[figure] for figure in FIGURES}
                for row in model["artifacts"]
                if row["name"] in RECIPES
            ],
        }
        for model in models
    ]
    return {"schema": SCHEMA, "models": kept}


def write_costs(accuracy: Path) -> None:
    """Write costs.json from `accuracy`, the JSON file of the accuracy page."""
    text = json.dumps(costs_of(json.loads(accuracy.read_text(encoding="utf-8"))), indent=1, ensure_ascii=False) + "\n"
    folders.publish_texts(COSTS.parent, {COSTS.name: text})


def read_costs(path: Path = COSTS) -> list[dict]:
    """Read the models of a costs.json, each with the costs of its artifacts; empty if there is no file.

    Raises UserError if the file is broken or has another schema.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["schema"] != SCHEMA:
            raise ValueError(f"schema {fields['schema']!r} is not {SCHEMA!r}")
        for model in fields["models"]:
            model["model"], [(row["name"], *(row[figure] for figure in FIGURES)) for row in model["artifacts"]]
        return fields["models"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is broken ({error}); write it again with `python -m lab.accuracy`") from None


def recipe_table(models: list[dict]) -> Table:
    """Build the table with a line for every recipe and its costs on each of `models`, which `read_costs` returned."""
    table = new_table("cuantiza quantize --recipes RECIPE ...", "recipe")
    table.add_column("what it is")
    columns: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
        (model, "graph\n× fp32", ("ratio",)) for model in models[:1]
    ]
    columns += [(model, f"{model['model']}\nΔ ln ppl, top", ("delta_ln_ppl", "top1_agreement")) for model in models]
    for _, title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    table.caption = _WORDS
    if models:
        table.caption = (
            f"graph × fp32: bytes of {models[0]['model']}'s ONNX file over those of its fp32 file.\n"
            "Δ ln ppl: rise of ln perplexity over fp32's, in nats per token; 0 is no loss.\n"
            "top: share of positions whose likeliest token is fp32's.\n"
            "Each model has a column of its own; docs/accuracy.md says which they are, and has more figures.\n"
            f"Nothing: not measured. A form -ort has the weights and integers of the form without it.\n{_WORDS}"
        )
    for name, recipe in RECIPES.items():
        cells = []
        for model, _, figures in columns:
            row: dict[str, Any] = next((row for row in model["artifacts"] if row["name"] == name), {})
            cells.append(", ".join(FIGURES[figure](row[figure]) for figure in figures if row.get(figure) is not None))
        table.add_row(name, recipe.describe(), *cells)
    return table
