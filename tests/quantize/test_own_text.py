"""Text that the model writes itself: what it draws, that it is always the same, and what the manifest says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cuantiza.core.inputs.corpus import Split
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.run.sampling import Sampling, generate
from cuantiza.core.store.artifact import Artifact
from cuantiza.core.store.digests import digest
from cuantiza.export.stage import export
from cuantiza.quantize import own_text
from cuantiza.quantize.decide.calibrate import calibration_windows
from cuantiza.quantize.own_text import GROUP, own_windows
from cuantiza.quantize.settings import Calibration
from cuantiza.quantize.stage import quantize

from helpers import CORPUS

LENGTH = 24


@pytest.fixture(scope="module")
def fp32(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The fp32 artifact of a tiny checkpoint, whose start and end token is 0."""
    return export(tiny_folder, tmp_path_factory.mktemp("artifacts"))


def test_each_window_is_what_the_model_generates_after_the_start_token(fp32: Artifact) -> None:
    """As `generate` draws it with the same numbers at temperature 1; sequences of a batch do not depend on each other."""
    windows = own_windows(fp32.path, 3, GROUP + 1, LENGTH)
    assert windows.shape == (GROUP + 1, LENGTH) and windows.dtype == np.int64
    runtime = Runtime(fp32.model, 1)
    for number, window in enumerate(windows):
        alone = generate(runtime, [0], LENGTH - 1, Sampling(), seed=[3, number])  # type: ignore[arg-type]
        assert window.tolist() == [0, *alone]
    assert len({tuple(window) for window in windows}) == len(windows)


def test_the_same_on_any_number_of_processors_and_whatever_follows(
    fp32: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for processors, count in ((1, 9), (4, 9), (2, 6)):
        monkeypatch.setattr(own_text, "default_threads", lambda processors=processors: processors)
        found.append(own_windows(fp32.path, 0, count, LENGTH))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0][:6], found[2])
    assert (own_windows(fp32.path, 1, 6, LENGTH) != found[2]).any()


def test_where_a_text_ends_the_next_one_starts(fp32: Artifact, tmp_path: Path) -> None:
    """No window has an end token; the start token stands in its place, and the model goes on from there."""
    whole = own_windows(fp32.path, 0, GROUP, LENGTH)
    ends = [int(token) for token in whole[:, LENGTH // 2]]
    folder = Path(shutil.copytree(fp32.path, tmp_path / "fp32"))
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(fields | {"eos_token_id": ends}))
    windows = own_windows(folder, 0, GROUP, LENGTH)
    assert not set(ends) & set(windows.ravel().tolist())
    for before, after in zip(whole, windows, strict=True):
        first = next(at for at, token in enumerate(before.tolist()) if token in ends)
        assert after[:first].tolist() == before[:first].tolist() and after[first] == 0


def test_calibration_takes_as_much_as_the_recipe_asks_for(fp32: Artifact) -> None:
    split = Split("calibration", (), 0)
    windows = calibration_windows(fp32.path, split, Calibration(windows=5, tokens=4096, minimum=1))
    assert windows.shape == (5, 128)  # all positions of this model
    np.testing.assert_array_equal(windows, own_windows(fp32.path, 0, 5, 128))


def test_the_manifest_says_what_was_written_and_other_text_rebuilds(
    fp32: Artifact, capsys: pytest.CaptureFixture
) -> None:
    made = quantize(fp32, "int8-dynamic", corpus="self")
    recorded = made.manifest.details["calibration"]
    windows = own_windows(fp32.path, 0, recorded["windows"], recorded["tokens_per_window"])
    assert recorded["seed"] == 0 and recorded["tokens_sha256"] == digest(windows.tolist())
    assert made.manifest.calibration == Split("calibration", (), 0).sha256
    capsys.readouterr()
    assert quantize(fp32, "int8-dynamic", corpus="self").digest == made.digest
    assert "up to date" in capsys.readouterr().err
    other = quantize(fp32, "int8-dynamic", corpus=CORPUS)
    assert "changed: calibration" in capsys.readouterr().err
    assert other.digest != made.digest and "seed" not in other.manifest.details["calibration"]
    assert quantize(fp32, "int8-dynamic", corpus="self").digest == made.digest
