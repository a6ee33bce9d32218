"""`python -m quantize`: fp32 artifact x recipes -> artifacts/<model>/<recipe>."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.checkpoints import model_name
from cuantiza.core.inputs.corpus import add_arguments, source_of
from cuantiza.quantize.inspect.commands import add_commands
from cuantiza.quantize.recipes.registry import DEFAULT, RECIPES, Recipe, get_recipe
from cuantiza.quantize.stage import quantize, with_budget


def main() -> int:
    inputs = argparse.ArgumentParser(add_help=False)
    inputs.add_argument("--model", default="models/es-mini", help="the model that was exported: folder or hub id")
    inputs.add_argument("--output", type=Path, default=Path("artifacts"), help="folder of the artifacts")
    add_arguments(inputs)
    parser = argparse.ArgumentParser(
        prog="python -m quantize",
        usage="python -m quantize [options]\n       python -m quantize COMMAND [options of the command]",
        description=__doc__,
        parents=[inputs],
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=DEFAULT,
        metavar="RECIPE",
        help=f"{', '.join(RECIPES)}, or .json files of your own (default {' '.join(DEFAULT)})",
    )
    parser.add_argument(
        "--max-delta-ln-ppl",
        type=float,
        metavar="NATS",
        help="how far int8-static-mixed may raise ln perplexity, in nats per token (default: what the recipe says)",
    )
    add_commands(parser, inputs)
    args = parser.parse_args()
    if args.command is not None:
        # argparse would ignore options that stand before the command's name.
        if sys.argv[1] != args.command:
            raise UserError(f"{sys.argv[1]}: stands in front of {args.command}; put its options behind it")
        return args.function(args)
    recipes: dict[str, Recipe] = {}
    for given in args.recipes:
        name, recipe = get_recipe(given)
        if recipes.setdefault(name, recipe) != recipe:
            raise UserError(f"RECIPES={given}: another recipe is named {name} too; give the file another name")
    if args.max_delta_ln_ppl is not None:
        recipes = with_budget(recipes, args.max_delta_ln_ppl)
    for name, recipe in recipes.items():
        quantize(args.output / model_name(args.model) / "fp32", recipe, source=source_of(args), name=name)
    return 0


if __name__ == "__main__":
    run(main)
