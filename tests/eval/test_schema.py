"""eval/report/schema.py: every report that exists can be read, and docs/report.md says what the fields are."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from pydantic import ValidationError

from cuantiza.core.errors import UserError
from cuantiza.eval.report.columns import COLUMNS, cells, titles
from cuantiza.eval.report.read import read_report
from cuantiza.eval.report.schema import Part, Report
from lab import report_page

from helpers import ROOT, report_fields, report_row

TORCH = {"modules_with_weights": 40, "modules_quantized": 1}


def written(**changes) -> str:
    """The text of a report of one artifact and one of PyTorch's models."""
    return json.dumps(report_fields([report_row("fp32"), report_row("torch-dynamic", **TORCH)], **changes))


def test_a_report_without_kinds_is_read_by_its_counts_of_modules():
    report = Report.from_json(written())
    assert [row.kind for row in report.artifacts] == ["onnx", "torch"]
    again = json.loads(report.to_json())["artifacts"]
    assert [row["kind"] for row in again] == ["onnx", "torch"]
    assert "modules_with_weights" not in again[0] and again[1]["modules_quantized"] == 1


def test_what_is_written_is_read_again_to_the_last_bit():
    report = Report.from_json(written())
    row = report.baseline.model_copy(
        update={"perplexity": 0.1 + 0.2, "word_perplexity": math.inf, "kl_divergence": 1e-300}
    )
    report = report.model_copy(update={"artifacts": (row, *report.artifacts[1:])}).sealed({"report.md": "0" * 64})
    again = Report.from_json(report.to_json())
    assert again == report and again.digest() == report.sha256 == again.sha256
    damaged = Report.from_json(report.to_json().replace(str(0.1 + 0.2), "0.3"))
    assert damaged.digest() != damaged.sha256


def test_a_further_field_is_ignored_and_a_missing_one_is_named(tmp_path):
    fields = json.loads(written()) | {"weather": "rain"}
    assert Report.from_json(json.dumps(fields)) == Report.from_json(written())
    del fields["artifacts"][1]["prefill"][0]["p50_ms"]
    with pytest.raises(ValidationError):
        Report.from_json(json.dumps(fields))
    (tmp_path / "report.json").write_text(json.dumps(fields))
    for path in (tmp_path, tmp_path / "report.json"):
        with pytest.raises(
            UserError, match=r"report\.json: artifacts\[1\]\.prefill\[0\]\.p50_ms is missing; make the report"
        ):
            read_report(path)


def test_the_usual_shape_is_the_longest_where_512_and_128_are_not_there():
    timing = report_row("")["prefill"][0]
    short = report_row("fp32", prefill=[timing | {"tokens": 16}, timing | {"tokens": 32}])
    report = Report.model_validate(report_fields([short]))
    assert report.baseline.usual("prefill").at == 32 and report.baseline.usual("decode").at == 128


def test_the_page_has_the_fields_of_the_schema():
    text = (ROOT / "docs/report.md").read_text(encoding="utf-8")
    assert report_page.filled(text) == text, "run `python -m lab.report_page`"
    with pytest.raises(UserError, match="<!-- fields -->"):
        report_page.filled("# The report")


def parts(model: type[Part] = Part):
    for part in model.__subclasses__():
        yield part
        yield from parts(part)


def test_every_field_of_a_report_has_a_meaning():
    found = [part for part in parts() if part.__module__ == Report.__module__ and part.__name__ != "Timing"]
    assert len(found) >= 8
    for part in found:
        assert all(field.description for field in part.model_fields.values()), part


@pytest.mark.parametrize("language", ["en", "es"])
def test_every_column_has_a_title_and_a_cell(language):
    report = Report.from_json(written())
    first, other = report.artifacts
    found = titles(list(COLUMNS), first, language)
    assert len(set(found)) == len(found) and not [title for title in found if "{" in title]
    assert all(cells(list(COLUMNS), first, first, language)[:4])
    shown = dict(zip(COLUMNS, cells(list(COLUMNS), other, first, language), strict=True))
    assert shown["ratio"] == ("1.000" if language == "en" else "1,000") and shown["llama_cpp"] == "—"
    assert titles(["prefill", "decode", "ratio"], first, "en") == ["prefill 512, ms", "decode @128, ms", "× fp32"]
    assert titles(["prefill", "decode"], first, "es") == ["lectura de 512, ms", "token tras 128, ms"]
    assert titles(["prefill", "decode", "ratio"], None, "es") == ["lectura, ms", "token, ms", "× fp32"]


def test_what_measures_does_not_depend_on_the_pages():
    """A report's digest of code covers what `measure` imports: a changed page must not measure anything again."""
    program = (
        "import sys, cuantiza.eval.measure.report; "
        "print(*sorted(name for name in sys.modules if name.startswith(('cuantiza.eval.report', 'cuantiza.core.pages'))))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cuantiza.eval.report", "cuantiza.eval.report.schema"]
