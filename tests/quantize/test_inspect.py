"""`cuantiza recipes`, `sensitivity` and `histogram`, and --max-delta-ln-ppl, on the embedded model."""

import dataclasses
import json
import math
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.store.artifact import open_artifact
from cuantiza.quantize.decide.observations import Histogram
from cuantiza.quantize.decide.ranges import RANGES
from cuantiza.quantize.inspect import commands, costs, plots, tables
from cuantiza.quantize.recipes.registry import PORTABLE, RECIPES, StaticInt8, get_recipe, to_json
from cuantiza.quantize.stage import with_budget

from helpers import ROOT, assert_user_error, stage

PROJECTIONS = [f"h.{n}.{part}" for n in range(6) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
PROJECTIONS.append("lm_head")
# With eight short windows and no GPTQ, a recipe takes seconds instead of a minute.
QUICK = {"rounding": "nearest", "calibration": {"windows": 8, "tokens": 128}}
ACCURACY = ROOT / "docs/data/accuracy.json"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def output(es_mini_fp32, tmp_path_factory):
    """An output folder that holds only the fp32 artifact of es-mini, at the beginning and at the end."""
    folder = tmp_path_factory.mktemp("output")
    (folder / "es-mini").mkdir()
    (folder / "es-mini/.cuantiza.lock").touch()
    shutil.copytree(es_mini_fp32.path, folder / "es-mini/fp32")
    yield folder
    assert sorted(path.name for path in (folder / "es-mini").iterdir()) == [".cuantiza.lock", "fp32"]
    assert open_artifact(folder / "es-mini/fp32").digest == es_mini_fp32.digest


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A user's file with a static recipe that calibrates in seconds."""
    path = tmp_path_factory.mktemp("recipes") / "quick.json"
    path.write_text(json.dumps({"type": "StaticInt8", "smoothing": [0.5], **QUICK}))
    return path


def rows(result):
    """Return the cells of every line of the tables on standard output."""
    assert result.status == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def svg_texts(path):
    """Return the texts in an SVG file. ElementTree refuses a file that is not complete."""
    builder = ElementTree.TreeBuilder(insert_comments=True)
    root = ElementTree.parse(path, ElementTree.XMLParser(target=builder)).getroot()
    assert root.tag == f"{SVG}svg"
    return [item.text.strip() for item in root.iter() if item.tag is ElementTree.Comment]


def test_every_recipe_has_its_line():
    lines = rows(stage("cuantiza", "recipes"))
    assert [line[0] for line in lines] == list(RECIPES)
    assert [line[1] for line in lines] == [recipe.describe() for recipe in RECIPES.values()]
    assert len({line[1] for line in lines}) == len(RECIPES)


def test_costs_stand_beside_the_recipes_where_they_were_measured(tmp_path):
    assert costs.read_costs(tmp_path / "missing.json") == []
    rise = {"es-mini": 0.00204, "twin": 0.01}
    models = [
        {
            "model": model,
            "artifacts": [{"name": "int8-static", "ratio": 0.263, "delta_ln_ppl": nats, "top1_agreement": 0.946}],
        }
        for model, nats in rise.items()
    ]
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"schema": "cuantiza/costs/1", "models": models}))
    table = costs.recipe_table(costs.read_costs(path))
    columns = {column.header: list(column.cells)[list(RECIPES).index("int8-static")] for column in table.columns[2:]}
    assert columns == {
        "graph\n× fp32": "0.263",
        "es-mini\nΔ ln ppl, top": "0.0020, 94.6 %",
        "twin\nΔ ln ppl, top": "0.0100, 94.6 %",
    }
    assert set(list(table.columns[2].cells)[3:]) == {""}  # not measured
    for heading in (*columns, "Nothing"):  # the footer explains every heading, and the empty cells
        words = heading.removeprefix("twin\n").removeprefix("es-mini\n").replace("\n", " ").split(", ")
        assert all(f"{word}: " in table.caption for word in words)
    for broken in ("{", "[]", '{"schema": "cuantiza/costs/2"}', json.dumps({"schema": "cuantiza/costs/1"})):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"costs\.json: is broken .* lab\.accuracy"):
            costs.read_costs(path)


def test_the_costs_are_those_of_the_accuracy_page():
    """Every recipe that the page measured, on every model with the project's own text."""
    accuracy = json.loads(ACCURACY.read_text(encoding="utf-8"))
    assert json.loads(costs.COSTS.read_text(encoding="utf-8")) == costs.costs_of(accuracy), "run `make accuracy`"
    models = costs.read_costs()
    assert [model["model"] for model in models][:2] == ["es-mini", "es-mini-twin"]
    for model in models:
        names = {row["name"] for row in model["artifacts"]}
        assert {*PORTABLE, "ort-dynamic"} <= names <= RECIPES.keys()


def test_names_alone():
    assert stage("cuantiza", "recipes", "--names").stdout.split() == list(RECIPES)
    portable = stage("cuantiza", "recipes", "--names", "--portable").stdout.split()
    assert portable == list(PORTABLE) and {f"{name}-ort" for name in portable} < RECIPES.keys()
    assert_user_error(stage("cuantiza", "recipes", "--portable"), "--portable", "--names")


def test_a_printed_recipe_is_a_recipe(tmp_path, capsys):
    for name, recipe in RECIPES.items():
        commands.recipes(["--json", name])
        (tmp_path / "mine.json").write_text(capsys.readouterr().out)
        assert get_recipe(str(tmp_path / "mine.json")) == ("mine", recipe)
    assert json.loads(stage("cuantiza", "recipes", "--json", "fp16").stdout) == to_json(RECIPES["fp16"])
    assert_user_error(stage("cuantiza", "recipes", "--json", "int7"), "int7", "int8-dynamic")


def test_projections_are_ranked_by_what_each_costs(output, quick, tmp_path):
    path = tmp_path / "chart.svg"
    result = stage("cuantiza", "sensitivity", "--output", output, "--recipe", quick, "--plot", path)
    *ranked, nothing, together = rows(result)
    assert sorted(line[0] for line in ranked) == sorted(PROJECTIONS)
    divergence = [float(line[1]) for line in ranked]
    assert divergence == sorted(divergence, reverse=True) and divergence[-1] > 0
    lengths = [len(line[2]) for line in ranked]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == 24
    for line in (*ranked, nothing, together):
        rise, stderr = map(float, line[3].split(" ± "))
        assert abs(rise) < 0.05 and 0 <= stderr < 0.05
    # Every line includes the quantized embeddings. Errors of single layers are nearly independent, so they add up.
    assert (nothing[0], together[0]) == ("no linear layer", "all together")
    shared = float(nothing[1])
    assert shared < divergence[-1] and divergence[0] < float(together[1])
    assert float(together[1]) == pytest.approx(sum(value - shared for value in divergence) + shared, rel=0.5)
    assert "4 calibration windows of 128 tokens" in result.stdout

    texts = svg_texts(path)
    assert set(PROJECTIONS) < set(texts) and "es-mini, quick: each linear layer quantized alone" in texts
    assert any("nats per token" in text for text in texts)
    assert [item.name for item in tmp_path.iterdir()] == ["chart.svg"]


def test_ranges_of_a_histogram(output, quick, tmp_path):
    path = tmp_path / "figure.svg"
    options = ("--output", output, "--recipe", quick, "--tensor", "h.1.mlp.c_proj", "--plot", path)
    lines = rows(stage("cuantiza", "histogram", *options))
    bars, methods = lines[:-4], lines[-4:]
    assert len(bars) == 32
    counts = [int(line[2].replace(",", "")) for line in bars]
    assert sum(counts) == 8 * 128 * 1024  # the input has windows x tokens x width of the MLP elements
    order = np.argsort(counts, kind="stable")
    assert (np.diff([len(bars[index][4]) for index in order]) >= 0).all()  # the more elements, the longer the bar

    assert [line[0].removeprefix("→ ") for line in methods] == list(RANGES)
    assert [line[0] for line in methods if line[0].startswith("→ ")] == ["→ mse"]
    found = {line[0].removeprefix("→ "): [float(cell.removesuffix(" %")) for cell in line[1:]] for line in methods}
    full = found["min-max"]
    assert full[:2] == pytest.approx([float(bars[0][0]), float(bars[-1][1])], rel=1e-3)
    assert full[4:] == [0, 0] and full[0] < 0 < full[1]
    for low, high, step, zero_point, clipped, _ in found.values():
        assert full[0] <= low <= 0 <= high <= full[1]
        assert step == pytest.approx((high - low) / 255, rel=1e-3) and zero_point == round(-low / step)
        assert 0 <= clipped < 5
    assert full[0] <= found["percentile"][0] < found["percentile"][1] < full[1]
    assert 0 < found["percentile"][4] <= 0.01  # percent

    texts = svg_texts(path)
    assert "es-mini, quick: input of h.1.mlp.c_proj (which gets 16 bits; these are the ranges for 8)" in texts
    assert all(any(text.startswith(f"{method}: ") for text in texts) for method in RANGES)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def known():
    """A histogram of 100,000 elements from -1 to 1, one at -8 and one at 8."""
    x = np.concatenate([np.linspace(-1, 1, 100_000), [-8.0, 8.0]])[:, None]
    return Histogram.of(x, -8.0, 8.0, np.ones_like(x))


@pytest.mark.parametrize("suffix, start", [(".svg", b"<?xml"), (".png", b"\x89PNG\r\n"), (".pdf", b"%PDF-")])
def test_a_figure_is_of_the_kind_that_its_name_says(known, tmp_path, suffix, start):
    details = {"float_channels": [3, 5]}
    first, second = (tmp_path / f"{name}{suffix}" for name in ("first", "second"))
    for path in (first, second, second):  # an existing file is replaced
        plots.plot_histogram(known, tables.ranges_of(known), "mse", details, "known", path)
    assert first.read_bytes().startswith(start) and first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_shares_that_a_range_clips(known):
    found = tables.ranges_of(known)
    assert list(found) == list(RANGES)
    assert (found["min-max"].low, found["min-max"].high, found["min-max"].clipped) == (-8, 8, 0)
    assert found["min-max"].step == pytest.approx(16 / 255) and found["min-max"].zero_point in (127, 128)
    assert found["percentile"].clipped in (2 / 100_002, 3 / 100_002)  # a range ends between two bins
    assert found["percentile"].high == pytest.approx(1, abs=2 * 16 / 2048)
    for method, chosen in found.items():
        low, high = RANGES[method](known)
        assert (chosen.low, chosen.high) == (low, high)


@pytest.mark.parametrize(
    "command, fragments",
    [
        (("sensitivity", "--recipe", "fp16"), ("fp16", "int8-static")),
        (("sensitivity", "--recipe", "ort-static"), ("ort-static", "alone")),
        (("sensitivity", "--recipe", "int7"), ("int7", "choose from")),
        (("sensitivity", "--plot", "chart.gif"), ("chart.gif", ".svg, .png, .pdf")),
        (("sensitivity", "--plot", "chart"), ("--plot chart", ".svg, .png, .pdf")),
        (("histogram", "--tensor", "lm_head", "--recipe", "int8-dynamic"), ("int8-dynamic", "no fixed ranges")),
        (("histogram", "--tensor", "lm_head", "--recipe", "ort-static"), ("ort-static", "no fixed ranges")),
        (("histogram", "--tensor", "h.1.mlp.cproj"), ("h.1.mlp.cproj", "25 linear layers", "h.1.mlp.c_proj")),
        (("histogram", "--tensor", "lm_head", "--plot", "nowhere/figure.svg"), ("nowhere", "not a folder")),
        (("histogram", "--tensor", "lm_head", "--model", "other"), ("fp32", "make export")),
    ],
)
def test_what_cannot_be_shown(output, command, fragments):
    result = stage("cuantiza", *command, "--output", output)
    assert_user_error(result, *fragments)
    assert not result.stdout


def test_a_budget_replaces_that_of_every_mixed_recipe(output, tmp_path):
    recipe = {"type": "MixedStaticInt8", "static": {"smoothing": [], "float_channels": 0, **QUICK}}
    (tmp_path / "mixed.json").write_text(json.dumps(recipe))
    made = shutil.copytree(output, tmp_path / "made")
    options = ("--output", made, "--recipes", tmp_path / "mixed.json", "--max-delta-ln-ppl", "10")
    result = stage("quantize", *options)
    assert result.status == 0, result.stderr
    manifest = open_artifact(made / "es-mini/mixed").manifest
    assert manifest.recipe["max_delta_ln_ppl"] == manifest.details["mixed"]["max_delta_ln_ppl"] == 10
    assert manifest.details["mixed"]["kept_in_float"] == {}  # no layer needs to stay in float for 10 nats
    assert "mixed: up to date" in stage("quantize", *options).stderr


def test_budgets_that_mean_something():
    changed = with_budget(dict(RECIPES), 0.5)
    assert changed["int8-static-mixed"] == dataclasses.replace(RECIPES["int8-static-mixed"], max_delta_ln_ppl=0.5)
    assert {name for name in RECIPES if changed[name] != RECIPES[name]} == {
        "int8-static-mixed",
        "int8-static-mixed-ort",
    }
    assert list(changed) == list(RECIPES)
    for nats in (-0.1, math.nan, math.inf):
        with pytest.raises(UserError, match="--max-delta-ln-ppl"):
            with_budget(dict(RECIPES), nats)
    with pytest.raises(UserError, match="none of mine has a budget"):
        with_budget({"mine": StaticInt8()}, 0.5)


def test_a_budget_without_a_recipe_for_it(output):
    assert_user_error(stage("quantize", "--output", output, "--max-delta-ln-ppl", "0.1"), "int8-static-mixed")
    options = ("--recipes", "int8-static-mixed", "--max-delta-ln-ppl", "nan")
    assert_user_error(stage("quantize", "--output", output, *options), "nan", "from 0")
