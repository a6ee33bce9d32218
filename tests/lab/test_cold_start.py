"""lab/cold_start.py: what a sample holds, and that page and JSON agree."""

from __future__ import annotations

import json
import os
import sys

import pytest

from cuantiza.core.store.artifact import Artifact
from cuantiza.core.store.user_cache import VARIABLE
from lab import ROOT
from lab.cold_start import JSON, PAGE, from_shell, in_library, page


def test_page_and_json_agree() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(json.loads(JSON.read_text(encoding="utf-8")))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_sample(es_mini_fp32: Artifact, tmp_path) -> None:
    environment = os.environ | {VARIABLE: str(tmp_path)}
    sample = in_library(es_mini_fp32.path, ROOT, environment)
    assert (tmp_path / "cuantiza" / "packed").is_dir()
    assert 0 < sample["load_s"] < sample["library_s"] and sample["library_cpu_s"] > 0
    assert 20e6 < sample["uss_bytes"] < sample["pss_bytes"] < sample["rss_bytes"] <= sample["peak_bytes"]
    told = from_shell(es_mini_fp32.path, ROOT, environment)
    assert told["shell_s"] > 0 and told["shell_cpu_s"] > 0
