"""Recipes as data: to JSON and back, recipes in users' files, manifests as recipes, and what is refused."""

import dataclasses
import json
import shutil
import sys

import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.store.artifact import open_artifact
from cuantiza.quantize.__main__ import main
from cuantiza.quantize.recipes.registry import (
    RECIPES,
    DynamicInt8,
    Half,
    MixedStaticInt8,
    StaticInt8,
    WeightOnly,
    from_json,
    get_recipe,
    to_json,
)
from cuantiza.quantize.settings import Calibration

from helpers import assert_nothing_published, assert_user_error, stage

OWN = (
    StaticInt8("nearest", (), "entropy", 3, Calibration(9, 100, 4)),
    DynamicInt8(smoothing=(0.5, 1)),
    WeightOnly(4, 32, True, table_bits=4, table_block=16, rounding="nearest", target="ort"),
    MixedStaticInt8(0.5, StaticInt8("nearest")),
    Half("bf16"),
)


def changed(recipe, path=()):
    """Yield copies of `recipe`, each with one of its numbers, choices or lists changed."""
    others = {"nearest": "gptq", "gptq": "nearest", "mse": "entropy", "portable": "ort", "ort": "portable"}
    others |= {"fp16": "bf16", "bf16": "fp16", "descent": "gptq", "follow": "descent", "0.16x": "5MB"}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            yield from (dataclasses.replace(recipe, **{field.name: inner}) for inner in changed(value))
        elif field.name == "max_kl":
            yield dataclasses.replace(recipe, max_bytes=None, max_kl=0.01)
        elif isinstance(value, bool):
            yield dataclasses.replace(recipe, **{field.name: not value})
        elif field.name in ("bits", "table_bits"):
            yield dataclasses.replace(recipe, **{field.name: 12 - value})
        elif field.name == "scale_bits":
            if recipe.block is not None:
                yield dataclasses.replace(recipe, scale_bits=40 - value)
        elif field.name in ("block", "table_block"):
            yield dataclasses.replace(recipe, **{field.name: 128 if value is None else 2 * value})
        elif isinstance(value, str):
            yield dataclasses.replace(recipe, **{field.name: others[value]})
        elif isinstance(value, tuple):
            yield dataclasses.replace(recipe, **{field.name: (*value, 0.25)})
        else:
            yield dataclasses.replace(recipe, **{field.name: 96 if value is None else value + 1})


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_and_every_change_of_it_comes_back(name, tmp_path):
    recipe = RECIPES[name]
    assert get_recipe(name) == (name, recipe)
    variants = [recipe, *changed(recipe)]
    assert len(set(variants)) == len(variants)
    for variant in variants:
        fields = json.loads(json.dumps(to_json(variant)))
        assert fields["type"] == type(recipe).__name__ and from_json(fields) == variant
    assert len({json.dumps(to_json(variant)) for variant in variants}) == len(variants)
    (tmp_path / "mine.json").write_text(json.dumps(to_json(variants[-1])))
    assert get_recipe(str(tmp_path / "mine.json")) == ("mine", variants[-1])


@pytest.mark.parametrize("recipe", OWN, ids=lambda recipe: type(recipe).__name__)
def test_recipes_of_ones_own_come_back(recipe):
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe


def test_what_is_left_out_is_the_default():
    assert from_json({"type": "StaticInt8"}) == StaticInt8()
    partly = {"type": "MixedStaticInt8", "static": {"rounding": "nearest", "calibration": {"windows": 9}}}
    assert from_json(partly) == MixedStaticInt8(static=StaticInt8("nearest", calibration=Calibration(9)))
    weight_only = {"type": "WeightOnly", "bits": 8, "block": 32, "symmetric": True, "table_block": 32, "scale_bits": 8}
    assert from_json(weight_only) == RECIPES["int8-weight"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(*options)` runs the quantize command in this process, on es-mini and an output folder without artifacts."""

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["quantize", "--output", str(tmp_path / "artifacts"), *map(str, options)])
        return main()

    return call


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("{", ["Expecting"]),
        ("[]", ['"type" must be one of DynamicInt8, StaticInt8, MixedStaticInt8, WeightOnly, MixedWeightOnly']),
        ("3", []),
        ('"recipe"', []),
        ("[" * 100_000, []),
        ("\xff", ["codec"]),
        ("{}", ['"type" must be one of']),
        ('{"type": "Int7"}', ['"type" must be one of']),
        ('{"type": ["StaticInt8"]}', []),
        ('{"type": "StaticInt8", "range": "mse", "alpha": 1}', ["recipe has no alpha, range"]),
        ('{"type": "StaticInt8", "calibration": {"windos": 9}}', ["calibration has no windos"]),
        ('{"type": "StaticInt8", "calibration": 9}', ["calibration is not an object"]),
        ('{"type": "StaticInt8", "calibration": {"windows": 4}}', ["windows 4 and a minimum of 8", "at most as many"]),
        ('{"type": "StaticInt8", "ranges": "best"}', ["ranges is 'best'", "min-max, percentile, entropy, mse"]),
        ('{"type": "StaticInt8", "smoothing": 0.5}', ["smoothing is not a list"]),
        ('{"type": "StaticInt8", "smoothing": ["0.5"]}', ["smoothing is '0.5', not float"]),
        ('{"type": "StaticInt8", "smoothing": [NaN]}', ["smoothing has nan", "from 0 to 1"]),
        ('{"type": "DynamicInt8", "smoothing": [-8]}', ["smoothing has -8", "from 0 to 1"]),
        ('{"type": "WeightOnly", "bits": 4, "block": 64, "symmetric": true, "smoothing": [2]}', ["smoothing has 2"]),
        ('{"type": "StaticInt8", "float_channels": true}', ["float_channels is True, not int"]),
        ('{"type": "StaticInt8", "float_channels": 1.5}', ["float_channels is 1.5, not int"]),
        ('{"type": "StaticInt8", "float_channels": -1}', ["float_channels is -1", "from 0"]),
        ('{"type": "StaticInt8", "calibration": {"tokens": 0}}', ["tokens=0", "from 1"]),
        ('{"type": "OrtStatic", "calibration": {"windows": 0, "minimum": 0}}', ["windows=0", "from 1"]),
        ('{"type": "MixedStaticInt8", "max_delta_ln_ppl": Infinity}', ["max_delta_ln_ppl is inf"]),
        ('{"type": "MixedStaticInt8", "static": {"type": "StaticInt8"}}', ["static has no type"]),
        ('{"type": "WeightOnly", "bits": 4}', ["'block' and 'symmetric'"]),
        ('{"type": "WeightOnly", "bits": 3, "block": 64, "symmetric": false}', ["bits is 3; choose from 4, 8"]),
        ('{"type": "WeightOnly", "bits": 4.0, "block": 64, "symmetric": false}', ["bits is 4.0; choose from 4, 8"]),
        ('{"type": "WeightOnly", "bits": 4, "block": -3, "symmetric": false}', ["block is -3", "from 1"]),
        ('{"type": "WeightOnly", "bits": 4, "block": "64", "symmetric": false}', ["block is '64', not int"]),
        *(
            (
                f'{{"type": "WeightOnly", "bits": 8, "block": {block}, "symmetric": true, "target": "ort"}}',
                [f"block is {block}", "power of two from 16"],
            )
            for block in (8, 24)
        ),
        ('{"type": "WeightOnly", "bits": 4, "block": 64, "symmetric": 1}', ["symmetric is 1, not bool"]),
        ('{"type": "WeightOnly", "bits": 4, "block": null, "symmetric": true, "scale_bits": 8}', ["scale_bits is 8"]),
        ('{"type": "StaticInt8", "rounding": "descent"}', ["rounding is 'descent'; choose from gptq, nearest"]),
        ('{"type": "MixedWeightOnly"}', ["max_bytes and max_kl: give one of the two"]),
        ('{"type": "MixedWeightOnly", "max_bytes": "5MB", "max_kl": 1}', ["max_bytes and max_kl: give one of the two"]),
        ('{"type": "MixedWeightOnly", "max_bytes": "5 percent"}', ["max_bytes is 5 percent", "5MB", "0.16x"]),
        ('{"type": "MixedWeightOnly", "max_bytes": "0.16"}', ["max_bytes is 0.16;", "0.16x"]),
        (
            '{"type": "MixedWeightOnly", "max_kl": 1, "calibration": {"windows": 2, "minimum": 2}}',
            ["windows 2", "3 or more"],
        ),
        ('{"type": "MixedWeightOnly", "max_kl": 0}', ["max_kl is 0", "above 0"]),
        ('{"type": "MixedWeightOnly", "max_kl": 1, "calibration": {"minimum": 2}}', ["minimum 2", "3 or more"]),
        ('{"type": "Half", "dtype": "fp8"}', ["dtype is 'fp8'; choose from fp16, bf16"]),
        ('{"recipe": {"type": "StaticInt8"}}', ["'name'"]),
        ('{"recipe": {"type": "StaticInt8"}, "name": "../fp32"}', ["'../fp32' is not a name"]),
        ('{"recipe": {"type": "StaticInt8"}, "name": "fp32"}', ["'fp32' is not a name"]),
        ('{"recipe": {"type": "StaticInt8"}, "name": ""}', ["'' is not a name"]),
    ],
)
def test_files_that_are_no_recipe(text, fragments, run, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as error:
        run("--recipes", path)
    line = str(error.value)
    assert line.startswith(f"RECIPES={path}: is not a recipe (") and "\n" not in line and len(line) < 500
    assert line.endswith("start from `cuantiza recipes --json int8-static`")
    assert all(fragment in line for fragment in fragments), line
    assert not (tmp_path / "artifacts").exists()


def test_a_missing_file_and_an_unknown_name(tmp_path):
    for path, fragment in ((tmp_path / "none.json", "No such file"), (tmp_path, "int8-static")):
        assert_user_error(stage("quantize", "--output", tmp_path, "--recipes", path), f"RECIPES={path}", fragment)
    assert_user_error(stage("quantize", "--output", tmp_path, "--recipes", "int7"), "RECIPES=int7", "int8-dynamic")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"folder\.json: is not a recipe \(.*[Dd]irectory"):
        get_recipe(str(tmp_path / "folder.json"))
    assert_nothing_published(tmp_path)


def test_a_recipe_may_not_take_the_place_of_the_original_or_of_another(run, tmp_path):
    (tmp_path / "fp32.json").write_text('{"type": "StaticInt8"}')
    with pytest.raises(UserError, match="'fp32' is not a name for its artifact"):
        run("--recipes", tmp_path / "fp32.json")
    (tmp_path / "int8-static.json").write_text('{"type": "StaticInt8", "float_channels": 0}')
    with pytest.raises(UserError, match="another recipe is named int8-static too"):
        run("--recipes", "int8-static", tmp_path / "int8-static.json")


def test_a_manifest_is_a_recipe_that_gives_the_same_bytes(exported, tiny_folder, tmp_path):
    """In another output folder, the manifests as recipes give the same bytes and the same names."""
    output, paths = exported(tiny_folder).path.parent.parent, {}
    for recipe in (StaticInt8(), OWN[2], RECIPES["ort-static"]):
        name = f"my-{type(recipe).__name__}"
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(to_json(recipe) | {"calibration": {"windows": 8, "tokens": 64}}))

    def quantize(output, recipes):
        result = stage("quantize", "--model", tiny_folder, "--output", output, "--recipes", *recipes)
        assert result.status == 0, result.stderr
        return {name: open_artifact(output / "tiny" / name) for name in paths}

    first = quantize(output, paths.values())
    other = tmp_path / "other"
    (other / "tiny").mkdir(parents=True)
    (other / "tiny/.cuantiza.lock").touch()
    shutil.copytree(output / "tiny/fp32", other / "tiny/fp32")
    again = quantize(other, [artifact.path / "manifest.json" for artifact in first.values()])
    for name, artifact in again.items():
        assert artifact.model.read_bytes() == first[name].model.read_bytes(), name
        assert artifact.manifest == first[name].manifest
        assert (artifact.manifest.name, artifact.manifest.recipe["type"]) == (name, name.removeprefix("my-"))
    assert len({artifact.digest for artifact in again.values()}) == len(again)


def test_the_exports_own_manifest_is_no_recipe(es_mini_fp32, run):
    with pytest.raises(UserError, match=r"fp32/manifest\.json: is not a recipe"):
        run("--recipes", es_mini_fp32.path / "manifest.json")
