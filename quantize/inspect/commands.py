"""The commands of `python -m quantize` that show recipes and tensors: `recipes`, `sensitivity`, `histogram`.

None of them publishes anything.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import model_name
from cuantiza.core.inputs.corpus import Split, load_splits, source_of
from cuantiza.core.machine.progress import report
from cuantiza.core.machine.terminal import show
from cuantiza.core.store import artifact, folders
from cuantiza.quantize.decide.observations import Histogram
from cuantiza.quantize.decide.ranges import RANGES
from cuantiza.quantize.inspect import plots, tables
from cuantiza.quantize.inspect.costs import read_costs, recipe_table
from cuantiza.quantize.recipes.registry import PORTABLE, RECIPES, Recipe, get_recipe, plan_of, to_json
from cuantiza.quantize.stage import opened

if TYPE_CHECKING:
    from cuantiza.quantize.inspect.sensitivity import Sensitivity


def add_commands(parser: argparse.ArgumentParser, inputs: argparse.ArgumentParser) -> None:
    """Add the commands to `parser`; `args.function(args)` runs the one that was given.

    `inputs` has the options that name a model, its artifacts and the corpus: --model, --output, --corpus and so on.
    """
    commands = parser.add_subparsers(
        dest="command",
        metavar="COMMAND",
        title="commands",
        prog=parser.prog,
        description="Each has options of its own, behind its name; COMMAND --help explains them.",
    )

    def add(
        function: Callable[[argparse.Namespace], int], name: str, text: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        sentence = f"{text[0].upper()}{text[1:]}."
        command = commands.add_parser(name, help=text, description=sentence, parents=parents)
        command.set_defaults(function=function)
        return command

    command = add(print_recipes, "recipes", "list the recipes, with what each costs where that was measured")
    one = command.add_mutually_exclusive_group()
    one.add_argument(
        "--json", metavar="NAME", help="print this recipe instead, as a .json file for --recipes to start from"
    )
    one.add_argument("--names", action="store_true", help="print the names alone, one a line")
    command.add_argument(
        "--portable",
        action="store_true",
        help="with --names: only the recipes in standard operators that have a form for ONNX Runtime alone, NAME-ort",
    )
    command = add(
        print_sensitivity, "sensitivity", "rank the projections by the KL that each causes, quantized alone", inputs
    )
    command.add_argument("--recipe", default="int8-static", help="recipe of int8 or weights (default int8-static)")
    command.add_argument("--plot", type=Path, metavar="FILE", help="write a chart too: .svg, .png or .pdf")
    command = add(
        print_histogram, "histogram", "show a projection's input and the range that each method gives it", inputs
    )
    command.add_argument("--recipe", default="int8-static", help="recipe with fixed ranges (default int8-static)")
    command.add_argument("--tensor", required=True, help="name of a projection, such as h.1.mlp.c_proj")
    command.add_argument("--plot", type=Path, metavar="FILE", help="write a figure too: .svg, .png or .pdf")


def print_recipes(args: argparse.Namespace) -> int:
    """Print the table of all recipes, their names, or one recipe as JSON. Raises UserError where `--json` names none."""
    if args.portable and not args.names:
        raise UserError("--portable: chooses among names; give it with --names")
    if args.json is not None:
        print(json.dumps(to_json(get_recipe(args.json)[1]), indent=1, ensure_ascii=False))
    elif args.names:
        print(*(PORTABLE if args.portable else RECIPES), sep="\n")
    else:
        show(recipe_table(read_costs()))
    return 0


def print_sensitivity(args: argparse.Namespace) -> int:
    """Print the ranking of all projections, and plot it. Raises UserError where the recipe quantizes none alone."""
    name, recipe = get_recipe(args.recipe)
    if plan_of(recipe) is None:
        raise UserError(
            f"--recipe {args.recipe}: quantizes no projection alone; take one that does, such as int8-static"
        )
    found = _work(args, measure_sensitivity, recipe)
    title = f"{model_name(args.model)}, {name}: each projection quantized alone"
    show(tables.sensitivity_table(found, title))
    if args.plot is not None:
        plots.plot_sensitivity(found, title, args.plot)
        report(f"quantize  {args.plot}: written")
    return 0


def measure_sensitivity(recipe: Recipe, parent: Path, work: Path, split: Split) -> Sensitivity:
    """The cost of every projection of the fp32 artifact `parent`, calibrated on `split`. Runs in a process of its own."""
    from cuantiza.core.onnx import file as onnx_file
    from cuantiza.quantize.decide.calibrate import calibration_windows
    from cuantiza.quantize.inspect.sensitivity import EVERY, Gauge, Sensitivity, rank
    from cuantiza.quantize.layers import decide

    windows = calibration_windows(parent, split, recipe.calibration)
    model = onnx_file.load(parent / artifact.MODEL)
    sites, rewrite = decide(model, windows, recipe.plan(), work), recipe.rewrite()
    if not sites:
        raise UserError(f"{parent / artifact.MODEL}: has no product with a constant weight; there is nothing to rank")
    with folders.staging(work / "gauge") as folder:
        gauge = Gauge(parent / artifact.MODEL, windows[::EVERY], folder)
        effects = rank(model, sites, rewrite, gauge)
        ends = [gauge.effect(model, some, rewrite) for some in ({}, sites)]
    return Sensitivity(effects, *ends, len(windows[::EVERY]), windows.shape[1])


def print_histogram(args: argparse.Namespace) -> int:
    """Print the histogram of a projection's input with all ranges, and plot it.

    Raises UserError where the recipe has no fixed ranges, or `--tensor` is no projection.
    """
    name, recipe = get_recipe(args.recipe)
    plan = plan_of(recipe)
    if plan is None or plan.ranges not in RANGES:
        raise UserError(
            f"--recipe {args.recipe}: has no fixed ranges, so no histogram; take one that has them, such as int8-static"
        )
    histogram, account = _work(args, observe, recipe, args.tensor)
    if histogram.low == histogram.high:
        raise UserError(f"--tensor {args.tensor}: all its elements are 0 on this corpus; there is no range to choose")
    ranges = tables.ranges_of(histogram)
    title = f"{model_name(args.model)}, {name}: input of {args.tensor}"
    show(tables.histogram_table(histogram, ranges[plan.ranges], f"{title}, as smoothing left it"))
    show(tables.ranges_table(ranges, plan.ranges, account))
    if args.plot is not None:
        plots.plot_histogram(histogram, ranges, plan.ranges, account, title, args.plot)
        report(f"quantize  {args.plot}: written")
    return 0


def observe(recipe: Recipe, parent: Path, work: Path, split: Split, tensor: str) -> tuple[Histogram, dict]:
    """(histogram, account) of the input of projection `tensor` of the fp32 artifact `parent`, calibrated on `split`.

    Runs in a process of its own. Raises UserError where there is no such projection.
    """
    from cuantiza.core.onnx import file as onnx_file
    from cuantiza.quantize.decide.calibrate import calibration_windows
    from cuantiza.quantize.layers import decide
    from cuantiza.quantize.rewrite.find import find_projections

    model = onnx_file.load(parent / artifact.MODEL)
    names = [projection.name for projection in find_projections(model.graph)]
    if tensor not in names:
        near = difflib.get_close_matches(tensor, names, 4, 0.5) or names[:4]
        raise UserError(f"--tensor {tensor}: is none of {len(names)} projections, such as {', '.join(near)}")
    windows = calibration_windows(parent, split, recipe.calibration)
    site = decide(model, windows, recipe.plan(), work, tensor)[tensor]
    return site.histogram, site.account


def _work(args: argparse.Namespace, function: Callable, recipe: Recipe, *more: Any) -> Any:
    """`function(recipe, fp32 folder, temporary folder, calibration split, *more)`, in a process of its own."""
    if args.plot is not None:
        plots.check_path(args.plot)
    with opened(args.output / model_name(args.model) / "fp32") as parent:
        # Imported here: bad input is refused without it.
        from cuantiza.core.machine.process import isolated

        split = load_splits(source_of(args))[0]
        with folders.staging(parent.path) as work:
            return isolated(function, recipe, parent.path, work, split, *more)
