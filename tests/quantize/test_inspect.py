"""`python -m quantize recipes | sensitivity | histogram`, and --max-delta-ln-ppl, on the embedded model."""

import dataclasses
import json
import math
import shutil
from argparse import Namespace
from xml.etree import ElementTree

import numpy as np
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.store.artifact import open_artifact
from cuantiza.quantize.__main__ import with_budget
from cuantiza.quantize.decide.observations import RANGES, Histogram
from cuantiza.quantize.inspect import commands, plots
from cuantiza.quantize.recipes import RECIPES, StaticInt8, get_recipe, to_json

from helpers import assert_user_error, stage

PROJECTIONS = [f"h.{n}.{part}" for n in range(6) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
PROJECTIONS.append("lm_head")
# Eight short windows and no GPTQ: seconds instead of a minute.
QUICK = {"rounding": "nearest", "calibration": {"windows": 8, "tokens": 128}}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def output(es_mini_fp32, tmp_path_factory):
    """An output folder with nothing but the fp32 artifact of es-mini, which it still is at the end."""
    folder = tmp_path_factory.mktemp("output")
    (folder / "es-mini").mkdir()
    (folder / "es-mini/.cuantiza.lock").touch()
    shutil.copytree(es_mini_fp32.path, folder / "es-mini/fp32")
    yield folder
    assert sorted(path.name for path in (folder / "es-mini").iterdir()) == [".cuantiza.lock", "fp32"]
    assert open_artifact(folder / "es-mini/fp32").digest == es_mini_fp32.digest


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A static recipe that calibrates in seconds, as a user writes it."""
    path = tmp_path_factory.mktemp("recipes") / "quick.json"
    path.write_text(json.dumps({"type": "StaticInt8", "smoothing": [0.5], **QUICK}))
    return path


def rows(result):
    """The cells of every line of the tables on standard output."""
    assert result.status == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def svg_texts(path):
    """What is written in an SVG file; ElementTree refuses one that is not whole."""
    builder = ElementTree.TreeBuilder(insert_comments=True)
    root = ElementTree.parse(path, ElementTree.XMLParser(target=builder)).getroot()
    assert root.tag == f"{SVG}svg"
    return [item.text.strip() for item in root.iter() if item.tag is ElementTree.Comment]


def test_every_recipe_has_its_line():
    lines = rows(stage("quantize", "recipes"))
    assert [line[0] for line in lines] == list(RECIPES)
    assert [line[1] for line in lines] == [commands.describe(recipe) for recipe in RECIPES.values()]
    assert len({line[1] for line in lines}) == len(RECIPES)


def test_costs_stand_beside_the_recipes_where_they_were_measured(tmp_path):
    assert commands.read_accuracy(tmp_path / "missing.json") == []
    rise = {"es-mini": 0.00204, "twin": 0.01}
    models = [
        {
            "model": model,
            "artifacts": [{"name": "int8-static", "ratio": 0.263, "delta_ln_ppl": nats, "top1_agreement": 0.946}],
        }
        for model, nats in rise.items()
    ]
    path = tmp_path / "accuracy.json"
    path.write_text(json.dumps({"schema": "cuantiza/accuracy/1", "models": models}))
    table = commands.recipe_table(commands.read_accuracy(path))
    columns = {column.header: list(column.cells)[list(RECIPES).index("int8-static")] for column in table.columns[2:]}
    assert columns == {
        "\n× fp32": "0.263",
        "es-mini\nΔ ln ppl, top": "0.0020, 94.6 %",
        "twin\nΔ ln ppl, top": "0.0100, 94.6 %",
    }
    assert set(list(table.columns[2].cells)[3:]) == {""}  # not measured
    for broken in ("{", "[]", '{"schema": "cuantiza/accuracy/2"}', json.dumps({"schema": "cuantiza/accuracy/1"})):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"accuracy\.json: is broken .*`python -m lab\.accuracy"):
            commands.read_accuracy(path)


def test_a_printed_recipe_is_a_recipe(tmp_path, capsys):
    for name, recipe in RECIPES.items():
        commands.print_recipes(Namespace(json=name))
        (tmp_path / "mine.json").write_text(capsys.readouterr().out)
        assert get_recipe(str(tmp_path / "mine.json")) == ("mine", recipe)
    assert json.loads(stage("quantize", "recipes", "--json", "fp16").stdout) == to_json(RECIPES["fp16"])
    assert_user_error(stage("quantize", "recipes", "--json", "int7"), "int7", "int8-dynamic")


def test_projections_are_ranked_by_what_each_costs(output, quick, tmp_path):
    path = tmp_path / "chart.svg"
    result = stage("quantize", "sensitivity", "--output", output, "--recipe", quick, "--plot", path)
    *ranked, nothing, together = rows(result)
    assert sorted(line[0] for line in ranked) == sorted(PROJECTIONS)
    divergence = [float(line[1]) for line in ranked]
    assert divergence == sorted(divergence, reverse=True) and divergence[-1] > 0
    lengths = [len(line[2]) for line in ranked]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == 24
    for line in (*ranked, nothing, together):
        rise, stderr = map(float, line[3].split(" ± "))
        assert abs(rise) < 0.05 and 0 <= stderr < 0.05
    # Every line holds the look-ups; errors of single projections are nearly independent, so that they add up.
    assert (nothing[0], together[0]) == ("no projection", "all together")
    shared = float(nothing[1])
    assert shared < divergence[-1] and divergence[0] < float(together[1])
    assert float(together[1]) == pytest.approx(sum(value - shared for value in divergence) + shared, rel=0.5)
    assert "4 calibration windows of 128 tokens" in result.stdout

    texts = svg_texts(path)
    assert set(PROJECTIONS) < set(texts) and "es-mini, quick: each projection quantized alone" in texts
    assert any("nats per token" in text for text in texts)
    assert [item.name for item in tmp_path.iterdir()] == ["chart.svg"]


def test_ranges_of_a_histogram(output, quick, tmp_path):
    path = tmp_path / "figure.svg"
    options = ("--output", output, "--recipe", quick, "--tensor", "h.1.mlp.c_proj", "--plot", path)
    lines = rows(stage("quantize", "histogram", *options))
    bars, methods = lines[:-4], lines[-4:]
    assert len(bars) == 32
    counts = [int(line[2].replace(",", "")) for line in bars]
    assert sum(counts) == 8 * 128 * 1024  # elements of the input: windows, tokens, width of the MLP
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
    assert "es-mini, quick: input of h.1.mlp.c_proj" in texts
    assert all(any(text.startswith(f"{method}: ") for text in texts) for method in RANGES)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def known():
    """A histogram of 100,000 elements from -1 to 1, and one each at -8 and 8."""
    x = np.concatenate([np.linspace(-1, 1, 100_000), [-8.0, 8.0]])[:, None]
    return Histogram.of(x, -8.0, 8.0, np.ones_like(x))


@pytest.mark.parametrize("suffix, start", [(".svg", b"<?xml"), (".png", b"\x89PNG\r\n"), (".pdf", b"%PDF-")])
def test_a_figure_is_of_the_kind_that_its_name_says(known, tmp_path, suffix, start):
    account = {"float_channels": [3, 5]}
    first, second = (tmp_path / f"{name}{suffix}" for name in ("first", "second"))
    for path in (first, second, second):  # one that is there is replaced
        plots.plot_histogram(known, commands.ranges_of(known), "mse", account, "known", path)
    assert first.read_bytes().startswith(start) and first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_shares_that_a_range_clips(known):
    found = commands.ranges_of(known)
    assert list(found) == list(RANGES)
    assert (found["min-max"].low, found["min-max"].high, found["min-max"].clipped) == (-8, 8, 0)
    assert found["min-max"].step == pytest.approx(16 / 255) and found["min-max"].zero_point in (127, 128)
    assert found["percentile"].clipped in (2 / 100_002, 3 / 100_002)  # by whole bins
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
        (("histogram", "--tensor", "h.1.mlp.cproj"), ("h.1.mlp.cproj", "25 projections", "h.1.mlp.c_proj")),
        (("histogram", "--tensor", "lm_head", "--plot", "nowhere/figure.svg"), ("nowhere", "no folder")),
        (("histogram", "--tensor", "lm_head", "--model", "other"), ("fp32", "make export")),
    ],
)
def test_what_cannot_be_shown(output, command, fragments):
    result = stage("quantize", *command, "--output", output)
    assert_user_error(result, *fragments)
    assert not result.stdout


def test_options_in_front_of_a_command_are_not_lost(output):
    result = stage("quantize", "--output", output, "sensitivity")
    assert_user_error(result, "--output", "behind")


def test_help_names_the_commands():
    text = stage("quantize", "--help").stdout
    assert all(name in text for name in ("recipes", "sensitivity", "histogram", "--max-delta-ln-ppl"))


def test_a_budget_replaces_that_of_every_mixed_recipe(output, tmp_path):
    recipe = {"type": "MixedStaticInt8", "static": {"smoothing": [], "float_channels": 0, **QUICK}}
    (tmp_path / "mixed.json").write_text(json.dumps(recipe))
    made = shutil.copytree(output, tmp_path / "made")
    options = ("--output", made, "--recipes", tmp_path / "mixed.json", "--max-delta-ln-ppl", "10")
    result = stage("quantize", *options)
    assert result.status == 0, result.stderr
    manifest = open_artifact(made / "es-mini/mixed").manifest
    assert manifest.recipe["max_delta_ln_ppl"] == manifest.details["mixed"]["max_delta_ln_ppl"] == 10
    assert manifest.details["mixed"]["kept_in_float"] == {}  # 10 nats are never spent
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
