"""Quantizes the fp32 artifact by every recipe that is named: artifacts/<model>/<recipe>."""

from __future__ import annotations

from collections.abc import Sequence

from cuantiza.core.cli import Parser, add_corpus, add_folder, add_model, source_of
from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.checkpoints import model_name
from cuantiza.core.inputs.defaults import ARTIFACTS
from cuantiza.core.inputs.defaults import RECIPES as DEFAULT
from cuantiza.quantize.recipes.registry import RECIPES, Recipe, get_recipe
from cuantiza.quantize.stage import Wanted, opened, quantize_all, with_bits_budget, with_budget


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("quantize", __doc__, "cuantiza quantize --recipes int8-dynamic int4-weight")
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=DEFAULT,
        metavar="RECIPE",
        help=f"{', '.join(RECIPES)}, or .json files of your own (default {' '.join(DEFAULT)}); "
        "`cuantiza recipes` explains them",
    )
    parser.add_argument(
        "--max-delta-ln-ppl",
        type=float,
        metavar="NATS",
        help="how far int8-static-mixed may raise ln perplexity, in nats per token (default: what the recipe says)",
    )
    parser.add_argument(
        "--max-bytes",
        metavar="SIZE",
        help="how large the ONNX file of int-mixed may be: 5MB, 4900kB, or 0.16x for a share of fp32's (default: what the "
        "recipe says)",
    )
    parser.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="in place of --max-bytes: the KL divergence from fp32 that int-mixed may cause, in nats per token",
    )
    add_model(parser)
    add_folder(parser, "--output", ARTIFACTS, "folder of the artifacts")
    add_corpus(parser)
    args = parser.parse_args(arguments)
    recipes: dict[str, Recipe] = {}
    for given in args.recipes:
        if given == "fp32":  # `export` made it, and whoever lists all artifacts lists it too
            continue
        name, recipe = get_recipe(given)
        if recipes.setdefault(name, recipe) != recipe:
            raise UserError(f"RECIPES={given}: another recipe is named {name} too; give the file another name")
    if args.max_delta_ln_ppl is not None:
        recipes = with_budget(recipes, args.max_delta_ln_ppl)
    if args.max_bytes is not None or args.max_kl is not None:
        recipes = with_bits_budget(recipes, args.max_bytes, args.max_kl)
    with opened(args.output / model_name(args.model) / "fp32") as parent:
        wanted = [Wanted(parent.path.parent / name, name, recipe) for name, recipe in recipes.items()]
        quantize_all(parent, wanted, source_of(args))
    return 0


if __name__ == "__main__":
    run(main)
