"""The chapters: the formats' arithmetic is exact, and pages and figures follow from their JSON in both languages."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source
from cuantiza.core.store.artifact import Artifact
from cuantiza.quantize.decide.activation import PerRow, PerTensor
from cuantiza.quantize.weights.rounding import Grid, round_to_nearest
from lab.chapters import __main__ as chapters
from lab.chapters import measure as chapter_measure
from lab.chapters.figures import FIGURES, draw
from lab.chapters.measure import ACTIVATION, OUTLIERS, WEIGHT, Tensors
from lab.chapters.numbers import (
    FORMATS,
    as_float,
    as_integer,
    assemble,
    float_bits,
    grid,
    histogram,
    relative_rms,
    trailing_zeros,
)
from lab.chapters.text import PAGES, Numbers, differs, page

from helpers import ROOT, assert_user_error, stage

DOCS = ROOT / "docs"
DATA = json.loads((DOCS / chapters.JSON).read_text(encoding="utf-8"))
TEXTS = {language: (DOCS / name).read_text(encoding="utf-8") for language, name in PAGES.items()}


# --- formats ---


@pytest.mark.parametrize("form", FORMATS.values(), ids=str)
def test_the_bits_of_a_float_reassemble_to_it(form):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(500) * 2.0 ** rng.integers(-30, 15, 500)
    for value in [0.0, 1.0, -2.0, 65504.0, form.smallest_normal, form.smallest_normal / 2, *values]:
        groups = float_bits(value, form)
        assert [len(group) for group in groups] == [1, form.exponent, form.mantissa]
        assert assemble(groups, form) == float(np.float32(value).astype(form.dtype))


def test_bits_that_anyone_can_look_up():
    assert float_bits(-0.15625, FORMATS["fp32"]) == ("1", "01111100", "01" + "0" * 21)
    assert float_bits(1.0, FORMATS["fp16"]) == ("0", "01111", "0" * 10)
    assert float_bits(3.140625, FORMATS["bf16"]) == ("0", "10000000", "1001001")
    assert assemble(("0", "00000", "0000000001"), FORMATS["fp16"]) == 2.0**-24
    assert as_float(0.1, FORMATS["bf16"]).error == 0.10009765625 - 0.1


@pytest.mark.parametrize("form", FORMATS.values(), ids=str)
def test_limits_and_steps_are_the_formats_own(form):
    limits = ml_dtypes.finfo(form.dtype)
    assert form.largest == float(limits.max) and form.smallest_normal == float(limits.smallest_normal)
    for value in (1.0, 1.5, 0.75, 3e-3, 100.0, form.smallest_normal / 4):
        here = np.array(value).astype(form.dtype)
        raw = here.view(f"u{form.bits // 8}")
        following = (raw + np.ones_like(raw)).view(form.dtype)
        assert form.step(float(here)) == float(following) - float(here)


@pytest.mark.parametrize(
    "scale, zero, low, high", [(0.01, 0, -127, 127), (0.03, 7, 0, 15), (0.02, 10, 0, 255), (0.5, 0, -8, 7)]
)
def test_an_integer_comes_back_within_half_a_scale_and_zero_exactly(scale, zero, low, high):
    levels = grid(scale, zero, low, high)
    for value in np.linspace(levels[0], levels[-1], 301):
        shown = as_integer("q", value, scale, zero, low, high)
        assert abs(shown.error) <= scale / 2 * (1 + 1e-9)
        assert np.isclose(shown.restored, levels).any()
        (text,) = shown.groups
        signed = int(text, 2) - (2 ** len(text) if low < 0 and text[0] == "1" else 0)
        assert signed == shown.integer and shown.restored == (signed - zero) * scale
    assert as_integer("q", 0.0, scale, zero, low, high).restored == 0
    assert as_integer("q", 1e6, scale, zero, low, high).integer == high  # clipped, however wrong
    assert as_integer("q", -1e6, scale, zero, low, high).integer == low


def test_a_grid_of_b_bits_has_two_to_the_b_levels():
    for bits in (4, 8):
        levels = grid(0.25, 3, 0, 2**bits - 1)
        assert len(levels) == 2**bits and np.allclose(np.diff(levels), 0.25) and 0.0 in levels
    assert len(grid(0.1, 0, *Grid(8).limits)) == 255


def test_errors_histograms_and_tails():
    exact = np.array([[3.0, 0.5], [4.0, 0.0]], np.float32)
    assert relative_rms(exact * 1.5, exact) == 0.5
    assert relative_rms(exact + np.array([[0, 0.5], [0, 0]]), exact, axis=0).tolist() == [0.0, 1.0]
    assert histogram(np.array([-1, 0, 0.4, 1, 9]), -1, 1, 2).counts == (1, 3)
    assert trailing_zeros(np.array([1.0, 0.5, 0.1, 1 + 2.0**-10]), 13) == 0.75


def test_numbers_as_each_language_writes_them():
    es, en = Numbers("es"), Numbers("en")
    assert (es.fixed(12622), en.fixed(12622)) == ("12\u202f622", "12,622")
    assert (es.fixed(1024), en.fixed(1024.5, 1)) == ("1024", "1,024.5")
    assert (es.fixed(-0.5, 1), en.fixed(-0.04, 1)) == ("−0,5", "0.0")
    assert (es.digits(0.000123), en.digits(0.00999)) == ("1,23 × 10⁻⁴", "0.00999")
    assert (en.digits(3.4028e38), en.digits(0.0009999), en.digits(65504)) == ("3.40 × 10³⁸", "0.00100", "65,504")
    assert (es.exact(1.90625), en.exact(1.9025332927703857)) == ("1,90625", "1.902533293")
    assert (es.percent(0.0571), en.signed(0.0076, 4)) == ("5,7\N{NO-BREAK SPACE}%", "+0.0076")
    assert differs({"delta_ln_ppl": -0.003, "delta_ln_ppl_stderr": 0.001})
    assert not differs({"delta_ln_ppl": 0.001, "delta_ln_ppl_stderr": 0.001})


# --- measurements on the embedded model ---


@pytest.fixture(scope="module")
def tensors(es_mini_fp32: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return Tensors(es_mini_fp32, Source("corpus/es"), tmp_path_factory.mktemp("tensors"))


def test_the_numbers_on_weights_are_this_models(tensors):
    matrix = tensors.matrix(WEIGHT)
    section = chapters.rounded(asdict(chapter_measure.weight_section(matrix)))
    assert json.loads(json.dumps(section)) == DATA["weight"]
    bits = chapters.rounded(asdict(chapter_measure.weight_bits(matrix)))
    assert json.loads(json.dumps(bits)) == DATA["weight_bits"]


def test_what_the_pages_say_of_weights_holds(tensors):
    section = chapter_measure.weight_section(tensors.matrix(WEIGHT))
    assert section.steps_tensor < section.steps_channel == 255
    assert section.error["channel"] < section.error["tensor"] < section.error["int4"] < section.error["int4_channel"]
    assert sum(section.values.counts) == np.prod(section.shape)
    assert sum(section.channel_values.counts) == section.shape[0]
    for item in chapter_measure.weight_bits(tensors.matrix(WEIGHT)).shown:
        assert item.scale is None or abs(item.error) <= item.scale / 2 * (1 + 1e-6)


def test_what_the_pages_say_of_activations_holds(tensors):
    x, matrix = tensors.test[ACTIVATION], tensors.matrix(ACTIVATION)
    assert x.shape == (chapter_measure.WINDOWS * chapter_measure.WINDOW, matrix.shape[0])
    static, row = PerTensor(-0.17, 4.0), PerRow(32)
    section = chapter_measure.activation_section(x, matrix, static, row)
    assert section.clipped == np.mean(x > section.static_high) > 0
    assert section.error["row"] < section.error["tensor"]
    assert sum(section.values.counts) == x.size and sum(section.row_steps.counts) == len(x)
    # Each token's scale is the one that the recipe's own code uses.
    steps = chapter_measure.row_scales(x, 32)
    assert np.allclose(
        row.restore(x)[:64] / steps[:64, None], np.rint(row.restore(x)[:64] / steps[:64, None]), atol=1e-3
    )
    # The figure restores each value exactly as the recipe does.
    bits = chapter_measure.activation_bits(x, static, row)
    line, column = bits.index
    restored = {item.format: item.restored for item in bits.shown}
    assert np.isclose(restored["u8-tensor"], static.restore(x)[line, column], atol=1e-5)
    assert np.isclose(restored["u8-row"], row.restore(x)[line, column], atol=1e-5)


def test_smoothing_undoes_what_outliers_do(tensors, es_mini_fp32):
    section = chapter_measure.outlier_section(tensors, es_mini_fp32.path)
    tame, twin = section.error["tame"], section.error["twin"]
    assert section.tensor == OUTLIERS and section.ratio["twin"] > 20 > section.ratio["tame"]
    assert twin["tensor"] > 10 * tame["tensor"] and twin["row"] > 10 * tame["row"]
    assert np.isclose(twin["smoothed"], tame["smoothed"], rtol=0.01)


def test_integers_nearest_to_their_weights_are_not_moved(tensors):
    matrix, x = tensors.matrix(ACTIVATION), tensors.test[ACTIVATION]
    nearest = round_to_nearest(matrix, Grid(8))
    section = chapter_measure.rounding_section(x, matrix, nearest)
    assert section.moved == 0 and section.weight_error["nearest"] == section.weight_error["gptq"] > 0
    moved = nearest.q.copy()
    moved[0] = np.where(moved[0] > 0, moved[0] - 1, moved[0] + 1)
    other = chapter_measure.IntWeight(moved, nearest.scale, nearest.zero_point, nearest.grid)
    assert chapter_measure.rounding_section(x, matrix, other).moved == 1 / len(matrix)


def test_the_exercise_quantizes_the_head_alone(es_mini):
    from lab.chapters.exercise import modules_by_kind

    kinds = {kind.kind: kind for kind in modules_by_kind(es_mini)}
    assert {name: kind.quantized for name, kind in kinds.items()} == {
        "Conv1D": 0,
        "LayerNorm": 0,
        "Embedding": 0,
        "Linear": 1,
    }
    assert sum(kind.modules for kind in kinds.values()) == 40
    assert [asdict(kind) for kind in kinds.values()] == DATA["exercise"]


# --- pages and figures ---


def numbers(text: str) -> Counter[str]:
    """Every number of a page in either language's format, without names such as `h.0.mlp.c_fc` and without links."""
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|<!--.*?-->", " ", text, flags=re.DOTALL)
    text = re.sub(r"(?<=\d)\u202f(?=\d)", "", text)
    found = re.findall(r"[−+]?\d[\d.,]*\d|[−+]?\d", text)
    return Counter(found)


def plain(language: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for number, count in numbers(TEXTS[language]).items():
        number = number.replace(",", "") if language == "en" else number.replace(",", ".")
        found[number] += count
    return found


def test_both_languages_have_the_same_numbers_figures_and_commands():
    assert plain("es") == plain("en")
    assert sum(plain("es").values()) > 200
    figures = {
        language: re.findall(rf"\.\./figures/([a-z-]+)\.{language}\.svg", text) for language, text in TEXTS.items()
    }
    assert figures["es"] == figures["en"] and set(figures["es"]) == set(FIGURES)
    assert commands(TEXTS["es"]) == commands(TEXTS["en"])
    headings = [[line.split()[0] for line in text.splitlines() if line.startswith("#")] for text in TEXTS.values()]
    assert headings[0] == headings[1]


def test_the_losses_are_those_of_the_page_on_accuracy():
    assert DATA["accuracy"] == chapters.rounded(chapters.pick_accuracy(DOCS / "data/accuracy.json"))


def test_the_times_of_gpt2_small_are_those_of_the_page_on_big_models():
    assert DATA["gpt2"] == chapters.rounded(chapters.pick_big(DOCS / "data/big-models.json"))
    for language, text in TEXTS.items():
        assert "big-models.md" in text and f"{DATA['gpt2']['seconds']['int8-dynamic']:.0f} s" in text, language
    with pytest.raises(UserError, match="big_models"):
        chapters.pick_big(DOCS / "data/accuracy.json")


@pytest.mark.parametrize("language", PAGES)
def test_a_page_is_made_of_its_json_alone(language):
    assert page(language, DATA) == TEXTS[language], "edit the template and run `python -m lab.chapters`"


@pytest.mark.parametrize("language", PAGES)
def test_everything_that_a_page_links_to_is_there(language):
    text, folder = TEXTS[language], (DOCS / PAGES[language]).parent
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    # GitHub derives an anchor from a heading: lower case, hyphens for spaces, and no punctuation.
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (folder / link).is_file(), link


def test_the_same_numbers_draw_the_same_bytes(tmp_path):
    draw(DATA, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == len(PAGES) * len(FIGURES)
    for file in files:
        drawn = file.read_text(encoding="utf-8")
        assert drawn == (DOCS / "figures" / file.name).read_text(encoding="utf-8"), file.name
        assert "<text" in drawn and "<dc:date>" not in drawn


def commands(text: str) -> list[str]:
    """Every `make ...` and `python ...` that the page shows, in blocks or in a line."""
    shown = re.findall(r"^(?: {7})?((?:make|\S*python) .+)$", text, flags=re.MULTILINE)
    return shown + re.findall(r"`((?:make|\S*python) [^`]+)`", text)


def test_every_command_that_the_pages_show_exists():
    makefile = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "lab/lab.mk"))
    shown = list(dict.fromkeys(commands(TEXTS["es"])))
    assert sum(line.startswith("make") for line in shown) >= 4 and any("python -m" in line for line in shown)
    for line in shown:
        words = re.findall(r'[^\s"]+="[^"]*"|\S+', line)
        if words[0] == "make":
            for word in words[1:]:
                name = word.partition("=")[0]
                pattern = rf"^{name}\s*\?=|\$\({name}\)" if "=" in word else rf"^(?:[a-z]+ )*{name}(?: [a-z]+)*:"
                assert re.search(pattern, makefile, flags=re.MULTILINE), f"{line}: make knows no {name}"
        else:
            assert words[1] == "-m", line
            module, *rest = words[2:]
            command = [word for word in rest[:1] if not word.startswith("-")]
            help_text = stage(module, *command, "--help")
            assert help_text.status == 0, f"{line}: {help_text.stderr}"
            for option in (word for word in rest if word.startswith("--")):
                assert option in help_text.stdout, f"{line}: {option} is not there"


# --- bad input ---


def test_a_report_that_is_not_the_chapters_is_refused(tmp_path: Path):
    report = tmp_path / "report.json"
    output = tmp_path / "docs"

    def refused(*fragments: str) -> None:
        result = stage("lab.chapters", "--report", report, "--artifacts", tmp_path, "--output", output)
        assert_user_error(result, *fragments)
        assert not output.exists()

    refused(str(report), "does not exist", "make chapters")
    report.write_text("[]")
    refused("is not a report")
    rows = [{"name": name} for name in chapters.ROWS]
    report.write_text(json.dumps({"model": "es-mini", "artifacts": rows[:-1]}))
    refused("has no row torch-dynamic")
    report.write_text(json.dumps({"model": "gpt2", "artifacts": rows, "inputs": {"artifacts": []}}))
    refused("is of gpt2")
    report.write_text(json.dumps({"model": "es-mini", "artifacts": rows, "inputs": {"artifacts": []}}))
    refused("no manifest.json")


def test_a_report_of_other_artifacts_is_refused(es_mini_fp32, tmp_path):
    for name in ("fp32", "int8-dynamic", "int8-static"):
        shutil.copytree(es_mini_fp32.path, tmp_path / "es-mini" / name)
    report = tmp_path / "report.json"
    inputs = {"artifacts": [["fp32", es_mini_fp32.digest], ["int8-dynamic", "another"]]}
    rows = [{"name": name} for name in chapters.ROWS]
    report.write_text(json.dumps({"model": "es-mini", "artifacts": rows, "inputs": inputs}))
    result = stage(
        "lab.chapters", "--report", report, "--artifacts", tmp_path / "es-mini", "--output", tmp_path / "docs"
    )
    assert_user_error(result, "was measured on another int8-dynamic")
