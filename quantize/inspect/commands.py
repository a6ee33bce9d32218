"""What `python -m quantize` tells of recipes and tensors: `recipes`, `sensitivity`, `histogram`. Publishes nothing."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuantiza.core.cli import add_corpus, source_of
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import model_name
from cuantiza.core.inputs.corpus import Split, load_splits
from cuantiza.core.machine.progress import report
from cuantiza.core.machine.terminal import new_table, show
from cuantiza.core.store import artifact, folders
from cuantiza.core.store.artifact import Artifact
from cuantiza.quantize.decide.activation import PerTensor
from cuantiza.quantize.decide.observations import RANGES, Histogram
from cuantiza.quantize.inspect import plots
from cuantiza.quantize.inspect.plots import Range, Sensitivity
from cuantiza.quantize.recipes import (
    RECIPES,
    DynamicInt8,
    Float,
    Half,
    MixedStaticInt8,
    OrtDynamic,
    OrtStatic,
    Recipe,
    StaticInt8,
    WeightOnly,
    get_recipe,
    to_json,
)

if TYPE_CHECKING:
    from rich.table import Table

ACCURACY = Path(__file__).resolve().parents[2] / "docs" / "accuracy.json"
_ACCURACY_SCHEMA = "cuantiza/accuracy/1"


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model, its artifacts and the corpus."""
    parser.add_argument("--model", default="models/es-mini", help="the model that was exported: folder or hub id")
    parser.add_argument("--output", type=Path, default=Path("artifacts"), help="folder of the artifacts")
    add_corpus(parser)


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands to `parser`; `args.function(args)` runs the one that was given."""
    commands = parser.add_subparsers(
        dest="command",
        metavar="COMMAND",
        title="commands",
        prog=parser.prog,
        description="Each has options of its own, behind its name; COMMAND --help explains them.",
    )

    def add(function: Callable[[argparse.Namespace], int], name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(function=function)
        return command

    command = add(print_recipes, "recipes", "list the recipes, with what each costs where that was measured")
    command.add_argument(
        "--json", metavar="NAME", help="print this recipe instead, as a .json file for --recipes to start from"
    )
    command = add(print_sensitivity, "sensitivity", "rank the projections by the KL that each causes, quantized alone")
    command.add_argument("--recipe", default="int8-static", help="recipe of int8 or weights (default int8-static)")
    command.add_argument("--plot", type=Path, metavar="FILE", help="write a chart too: .svg, .png or .pdf")
    add_inputs(command)
    command = add(print_histogram, "histogram", "show a projection's input and the range that each method gives it")
    command.add_argument("--recipe", default="int8-static", help="recipe with fixed ranges (default int8-static)")
    command.add_argument("--tensor", required=True, help="name of a projection, such as h.1.mlp.c_proj")
    command.add_argument("--plot", type=Path, metavar="FILE", help="write a figure too: .svg, .png or .pdf")
    add_inputs(command)


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Artifact]:
    """The verified fp32 artifact of `--model` in `--output`, whose folder is held meanwhile.

    Raises UserError where it is not there or damaged.
    """
    folder = args.output / model_name(args.model)
    if not (folder / "fp32").is_dir():
        raise UserError(f"{folder / 'fp32'}: is not there; run `make export` first")
    with folders.locked(folder):
        yield artifact.open_artifact(folder / "fp32")


def print_recipes(args: argparse.Namespace) -> int:
    """The table of all recipes, or one recipe as JSON. Raises UserError where `--json` names none."""
    if args.json is not None:
        print(json.dumps(to_json(get_recipe(args.json)[1]), indent=1, ensure_ascii=False))
    else:
        show(recipe_table(read_accuracy(ACCURACY)))
    return 0


def read_accuracy(path: Path) -> list[dict]:
    """The models of an accuracy file, each with what its artifacts lost; none where there is no file.

    Raises UserError where it is broken or of another schema.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["schema"] != _ACCURACY_SCHEMA:
            raise ValueError(f"schema {fields['schema']!r} is not {_ACCURACY_SCHEMA!r}")
        for model in fields["models"]:
            model["model"], [(row["name"], *(row[key] for key in _COSTS)) for row in model["artifacts"]]
        # A model stands there once for each text; the first text is the project's own.
        return [model for model in fields["models"] if model.get("corpus") == fields["models"][0].get("corpus")]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is broken ({error}); make it anew with `python -m lab.accuracy`") from None


# What of an accuracy file is shown, and how.
_COSTS: dict[str, Callable[[float], str]] = {
    "ratio": lambda value: f"{value:.3f}",
    "delta_ln_ppl": lambda value: f"{round(value, 4) + 0.0:.4f}",  # no -0.0000
    "top1_agreement": lambda value: f"{100 * value:.1f} %",
}


def recipe_table(models: list[dict]) -> Table:
    """A line for every recipe; what it costs on each of `models` (as `read_accuracy` gives them)."""
    table = new_table("python -m quantize --recipes RECIPE ...", "recipe")
    table.add_column("what it is")
    columns = [(model, "\n× fp32", ("ratio",)) for model in models[:1]]
    columns += [(model, f"{model['model']}\nΔ ln ppl, top", ("delta_ln_ppl", "top1_agreement")) for model in models]
    for _, title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    if models:
        table.caption = "Top: share of positions whose likeliest token is fp32's. The sizes are the first model's."
    for name, recipe in RECIPES.items():
        cells = []
        for model, _, keys in columns:
            row = next((row for row in model["artifacts"] if row["name"] == name), {})
            cells.append(", ".join(_COSTS[key](row[key]) for key in keys if row.get(key) is not None))
        table.add_row(name, describe(recipe), *cells)
    return table


def describe(recipe: Recipe) -> str:
    """One line of what `recipe` does, with its own values."""
    line = _describe(recipe)
    return f"{line}; for ONNX Runtime alone" if getattr(recipe, "target", "portable") == "ort" else line


def _describe(recipe: Recipe) -> str:
    match recipe:
        case DynamicInt8():
            return "weights s8 per channel; activations u8, a scale per row as it comes"
        case StaticInt8():
            return f"weights s8 per channel; activations u8, a fixed {recipe.ranges} range per tensor"
        case MixedStaticInt8():
            return f"as int8-static, with projections left in float until Δ ln ppl is at most {recipe.max_delta_ln_ppl}"
        case WeightOnly():
            parameters = "a scale" if recipe.symmetric else "scale and zero point"
            place = "channel" if recipe.block is None else f"{recipe.block} inputs"
            portable = "computed in fp32" if recipe.block is None else "DequantizeLinear, which ONNX Runtime fuses"
            how = "MatMulNBits, int8 activations" if recipe.target == "ort" else portable
            return f"weights in {recipe.bits} bits, {parameters} per {place}; {how}"
        case Half():
            return f"weights in {recipe.dtype}, computed in fp32"
        case Float():
            return "the fp32 weights as they are"
        case OrtDynamic():
            return "ONNX Runtime's own quantize_dynamic"
        case OrtStatic():
            return "ONNX Runtime's own quantize_static: QDQ, min-max"


def print_sensitivity(args: argparse.Namespace) -> int:
    """The ranking of all projections, and its chart. Raises UserError where the recipe quantizes none alone."""
    name, recipe = get_recipe(args.recipe)
    if not isinstance(recipe, DynamicInt8 | StaticInt8 | MixedStaticInt8 | WeightOnly):
        raise UserError(
            f"--recipe {args.recipe}: quantizes no projection alone; take one that does, such as int8-static"
        )
    found = _work(args, measure_sensitivity, recipe)
    title = f"{model_name(args.model)}, {name}: each projection quantized alone"
    show(plots.sensitivity_table(found, title))
    if args.plot is not None:
        plots.plot_sensitivity(found, title, args.plot)
        report(f"quantize  {args.plot}: written")
    return 0


def measure_sensitivity(recipe: Recipe, parent: Path, work: Path, split: Split) -> Sensitivity:
    """Of every projection of the fp32 artifact `parent`, calibrated on `split`. Runs in a process of its own."""
    from cuantiza.core.onnx import file as onnx_file
    from cuantiza.quantize.apply import decide, rewrite_of
    from cuantiza.quantize.decide.calibrate import calibration_windows
    from cuantiza.quantize.inspect.sensitivity import EVERY, Gauge, rank

    windows = calibration_windows(parent, split, recipe.calibration)
    model = onnx_file.load(parent / artifact.MODEL)
    sites, rewrite = decide(model, windows, recipe, work), rewrite_of(recipe)
    if not sites:
        raise UserError(f"{parent / artifact.MODEL}: has no product with a constant weight; there is nothing to rank")
    with folders.staging(work / "gauge") as folder:
        gauge = Gauge(parent / artifact.MODEL, windows[::EVERY], folder)
        effects = rank(model, sites, rewrite, gauge)
        ends = [gauge.effect(model, some, rewrite) for some in ({}, sites)]
    return Sensitivity(effects, *ends, len(windows[::EVERY]), windows.shape[1])


def print_histogram(args: argparse.Namespace) -> int:
    """The histogram of a projection's input with all ranges, and its figure.

    Raises UserError where the recipe has no fixed ranges, or `--tensor` is no projection.
    """
    name, recipe = get_recipe(args.recipe)
    if not isinstance(recipe, StaticInt8 | MixedStaticInt8):
        raise UserError(
            f"--recipe {args.recipe}: has no fixed ranges, so no histogram; take one that has them, such as int8-static"
        )
    histogram, account = _work(args, observe, recipe, args.tensor)
    if histogram.low == histogram.high:
        raise UserError(f"--tensor {args.tensor}: all its elements are 0 on this corpus; there is no range to choose")
    chosen = recipe.ranges if isinstance(recipe, StaticInt8) else recipe.static.ranges
    ranges = ranges_of(histogram)
    title = f"{model_name(args.model)}, {name}: input of {args.tensor}"
    show(plots.histogram_table(histogram, ranges[chosen], f"{title}, as smoothing left it"))
    show(plots.ranges_table(ranges, chosen, account))
    if args.plot is not None:
        plots.plot_histogram(histogram, ranges, chosen, account, title, args.plot)
        report(f"quantize  {args.plot}: written")
    return 0


def ranges_of(histogram: Histogram) -> dict[str, Range]:
    """What every method would choose for `histogram`, by the method's name."""
    x, found = histogram.centers, {}
    for method, choose in RANGES.items():
        low, high = choose(histogram)
        step, zero_point = PerTensor(low, high).parameters
        outside = (x < low) | (x > high)
        shares = [float(array[outside].sum() / array.sum()) for array in (histogram.counts, histogram.weights)]
        found[method] = Range(low, high, float(step), int(zero_point), *shares)
    return found


def observe(recipe: Recipe, parent: Path, work: Path, split: Split, tensor: str) -> tuple[Histogram, dict]:
    """(histogram, account) of the input of projection `tensor` of the fp32 artifact `parent`, calibrated on `split`.

    Runs in a process of its own. Raises UserError where there is no such projection.
    """
    from cuantiza.core.onnx import file as onnx_file
    from cuantiza.quantize.apply import decide
    from cuantiza.quantize.decide.calibrate import calibration_windows
    from cuantiza.quantize.rewrite.find import find_projections

    model = onnx_file.load(parent / artifact.MODEL)
    names = [projection.name for projection in find_projections(model.graph)]
    if tensor not in names:
        near = difflib.get_close_matches(tensor, names, 4, 0.5) or names[:4]
        raise UserError(f"--tensor {tensor}: is none of {len(names)} projections, such as {', '.join(near)}")
    windows = calibration_windows(parent, split, recipe.calibration)
    site = decide(model, windows, recipe, work, tensor)[tensor]
    return site.histogram, site.account


def _work(args: argparse.Namespace, function: Callable, recipe: Recipe, *more: Any) -> Any:
    """`function(recipe, fp32 folder, temporary folder, calibration split, *more)`, in a process of its own."""
    if args.plot is not None:
        plots.check_path(args.plot)
    with opened(args) as parent:
        # Imported here: nothing of it is needed to refuse bad input.
        from cuantiza.core.machine.process import isolated

        split = load_splits(source_of(args))[0]
        with folders.staging(parent.path) as work:
            return isolated(function, recipe, parent.path, work, split, *more)
