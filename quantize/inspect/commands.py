"""The commands `cuantiza recipes`, `sensitivity` and `histogram`, which show recipes and tensors.

None of them publishes anything.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuantiza.core.cli import Parser, add_corpus, add_folder, add_model, source_of
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import model_name
from cuantiza.core.inputs.corpus import Split, load_calibration
from cuantiza.core.inputs.defaults import ARTIFACTS
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
    from cuantiza.quantize.layers import QuantizesLayers


def recipes(arguments: Sequence[str] | None = None) -> int:
    """Run `cuantiza recipes`. Raises UserError if `--json` does not name a recipe."""
    parser = Parser(
        "recipes",
        "Lists the recipes, with what each costs where that was measured.",
        "cuantiza recipes --json int8-static > mine.json",
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--json", metavar="NAME", help="print this recipe instead, as a .json file for --recipes to start from"
    )
    one.add_argument("--names", action="store_true", help="print the names alone, one a line")
    parser.add_argument(
        "--portable",
        action="store_true",
        help="with --names: only the recipes in standard operators that have a form for ONNX Runtime alone, NAME-ort",
    )
    args = parser.parse_args(arguments)
    if args.portable and not args.names:
        raise UserError("--portable: chooses among names; give it with --names")
    if args.json is not None:
        print(json.dumps(to_json(get_recipe(args.json)[1]), indent=1, ensure_ascii=False))
    elif args.names:
        print(*(PORTABLE if args.portable else RECIPES), sep="\n")
    else:
        show(recipe_table(read_costs()))
    return 0


def sensitivity(arguments: Sequence[str] | None = None) -> int:
    """Run `cuantiza sensitivity`. Raises UserError if the recipe does not quantize linear layers one by one."""
    parser = Parser(
        "sensitivity",
        "Ranks the linear layers by the KL divergence that each causes, quantized alone.",
        "cuantiza sensitivity --recipe int8-static --plot sensitivity.svg",
    )
    _add_inputs(parser, "recipe of int8 or of weights", "write a chart too: .svg, .png or .pdf")
    args = parser.parse_args(arguments)
    name, recipe = get_recipe(args.recipe)
    if plan_of(recipe) is None:
        raise UserError(
            f"--recipe {args.recipe}: quantizes no linear layer alone; take one that does, such as int8-static"
        )
    found = _work(args, measure_sensitivity, recipe)
    title = f"{model_name(args.model)}, {name}: each linear layer quantized alone"
    show(tables.sensitivity_table(found, title))
    if args.plot is not None:
        plots.plot_sensitivity(found, title, args.plot)
        report(f"quantize  {args.plot}: written")
    return 0


def histogram(arguments: Sequence[str] | None = None) -> int:
    """Run `cuantiza histogram`.

    Raises UserError if the recipe has no fixed ranges, or if `--tensor` does not name a linear layer.
    """
    parser = Parser(
        "histogram",
        "Shows the input of a linear layer and the range that each method gives it.",
        "cuantiza histogram --tensor h.1.mlp.c_proj --plot range.svg",
    )
    parser.add_argument("--tensor", required=True, help="name of a linear layer, such as h.1.mlp.c_proj")
    _add_inputs(parser, "recipe with fixed ranges", "write a figure too: .svg, .png or .pdf")
    args = parser.parse_args(arguments)
    name, recipe = get_recipe(args.recipe)
    plan = plan_of(recipe)
    if plan is None or plan.ranges not in RANGES:
        raise UserError(
            f"--recipe {args.recipe}: has no fixed ranges, so no histogram; take one that has them, such as int8-static"
        )
    found, details = _work(args, observe, recipe, args.tensor)
    if found.low == found.high:
        raise UserError(f"--tensor {args.tensor}: all its elements are 0 on this corpus; there is no range to choose")
    ranges = tables.ranges_of(found)
    title = f"{model_name(args.model)}, {name}: input of {args.tensor}"
    if details["bits"] == 16:
        title += " (which gets 16 bits; these are the ranges for 8)"
    show(tables.histogram_table(found, ranges[plan.ranges], f"{title}, as smoothing left it"))
    show(tables.ranges_table(ranges, plan.ranges, details))
    if args.plot is not None:
        plots.plot_histogram(found, ranges, plan.ranges, details, title, args.plot)
        report(f"quantize  {args.plot}: written")
    return 0


def _add_inputs(parser: Parser, recipe: str, plot: str) -> None:
    parser.add_argument("--recipe", default="int8-static", help=f"{recipe} (default int8-static)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=plot)
    add_model(parser)
    add_folder(parser, "--output", ARTIFACTS, "folder of the artifacts")
    add_corpus(parser)


def measure_sensitivity(recipe: QuantizesLayers, parent: Path, work: Path, split: Split) -> Sensitivity:
    """Measure what quantizing each linear layer of the fp32 artifact `parent` alone costs, calibrated on `split`.

    This runs in a process of its own. Raises UserError if the graph has no linear layer.
    """
    from cuantiza.core.onnx import file as onnx_file
    from cuantiza.quantize.decide.calibrate import calibration_windows
    from cuantiza.quantize.inspect.sensitivity import EVERY, Gauge, Sensitivity, rank
    from cuantiza.quantize.layers import decide

    windows = calibration_windows(parent, split, recipe.calibration)
    model = onnx_file.load(parent / artifact.MODEL)
    decisions, rewrite = decide(model, windows, recipe.plan().alone(), work), recipe.rewrite()
    if not decisions:
        raise UserError(
            f"{parent / artifact.MODEL}: has no linear layer (a matmul with a constant weight); there is nothing to rank"
        )
    with folders.staging(work / "gauge") as folder:
        gauge = Gauge(parent / artifact.MODEL, windows[::EVERY], folder)
        effects = rank(model, decisions, rewrite, gauge)
        ends = [gauge.effect(model, some, rewrite) for some in ({}, decisions)]
    return Sensitivity(effects, ends[0], ends[1], len(windows[::EVERY]), windows.shape[1])


def observe(
    recipe: QuantizesLayers, parent: Path, work: Path, split: Split, tensor: str
) -> tuple[Histogram | None, dict]:
    """Return (histogram, details) of the input of the linear layer `tensor` of the fp32 artifact `parent`.

    Calibration uses `split`; `details` is what a manifest says of the layer. This runs in a process of its own. Raises
    UserError if there is no such layer.
    """
    from cuantiza.core.onnx import file as onnx_file
    from cuantiza.quantize.decide.calibrate import calibration_windows
    from cuantiza.quantize.layers import decide
    from cuantiza.quantize.rewrite.find import find_projections

    model = onnx_file.load(parent / artifact.MODEL)
    names = [projection.name for projection in find_projections(model.graph)]
    if tensor not in names:
        near = difflib.get_close_matches(tensor, names, 4, 0.5) or names[:4]
        raise UserError(f"--tensor {tensor}: is none of {len(names)} linear layers, such as {', '.join(near)}")
    windows = calibration_windows(parent, split, recipe.calibration)
    decision = decide(model, windows, recipe.plan(), work, tensor)[tensor]
    return decision.histogram, decision.details


def _work(args: argparse.Namespace, function: Callable, recipe: Recipe, *more: Any) -> Any:
    """Call `function(recipe, fp32 folder, temporary folder, calibration split, *more)` in a process of its own."""
    if args.plot is not None:
        plots.check_path(args.plot)
    with opened(args.output / model_name(args.model) / "fp32") as parent:
        # This import is here because bad input is refused without it.
        from cuantiza.core.machine.process import isolated

        split = load_calibration(source_of(args))
        artifact.verify(parent)
        with folders.staging(parent.path) as work:
            return isolated(function, recipe, parent.path, work, split, *more)
