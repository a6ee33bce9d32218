"""The generator of hard models keeps its promises about twin and sink, measured on es-mini with real text."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from cuantiza.core.errors import run
from cuantiza.core.inputs.corpus import Source, full_windows, load_splits, stream
from cuantiza.core.inputs.tokenizer import encode, load_tokenizer
from cuantiza.core.inputs.tokenizer_files import PATTERNS
from cuantiza.core.store.artifact import Artifact
from lab.checkpoints import hard as hard_model
from lab.checkpoints.hard import Sink, Twin, make

from helpers import CORPUS, ES_MINI, ROOT, Result, assert_user_error, edit_config, edit_weights

READERS = {"ln_1": "attn.c_attn", "ln_2": "mlp.c_fc"}


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """8 windows of 512 tokens of the test split."""
    _, test = load_splits(Source(str(CORPUS)))
    tokens = stream(encode(load_tokenizer(ES_MINI), test.documents, enough=4200), 0)
    return torch.from_numpy(full_windows(tokens, 512)[:8])


def load(folder: Path) -> GPT2LMHeadModel:
    """Load the model as a user does, without a dtype."""
    return GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def plain() -> GPT2LMHeadModel:
    return load(ES_MINI).float()


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Twin]:
    folder = tmp_path_factory.mktemp("hard") / "twin"
    return folder, make("twin", ES_MINI, folder)


@pytest.fixture(scope="module")
def sink(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sink]:
    folder = tmp_path_factory.mktemp("hard") / "sink"
    return folder, make("sink", ES_MINI, folder)


def inputs(model: GPT2LMHeadModel, ids: torch.Tensor, *kinds: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits, the input of each linear layer of `kinds` (attn.c_attn, ...) by name)."""
    seen, hooks = {}, []
    for layer, block in enumerate(model.transformer.h):
        for kind in kinds:
            name = f"h.{layer}.{kind}"
            hook = lambda _module, given, name=name: seen.__setitem__(name, given[0])  # noqa: E731
            hooks.append(block.get_submodule(kind).register_forward_pre_hook(hook))
    with torch.no_grad():
        logits = model(ids).logits
    for handle in hooks:
        handle.remove()
    return logits, seen


def loss(model: GPT2LMHeadModel, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats per token."""
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def relative(changed: torch.Tensor, original: torch.Tensor) -> float:
    return float((changed - original).abs().max() / original.abs().max())


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- twin ---


def test_twin_is_the_same_function(twin: tuple[Path, Twin], plain: GPT2LMHeadModel, windows: torch.Tensor) -> None:
    model = load(twin[0])
    with torch.no_grad():
        assert relative(model(windows[:2]).logits, plain(windows[:2]).logits) < 1e-4
    assert model.dtype == torch.float32 and not torch.equal(
        model.transformer.h[0].ln_1.weight, plain.transformer.h[0].ln_1.weight
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_twin_has_outlier_channels_before_every_projection(
    tmp_path: Path, plain: GPT2LMHeadModel, windows: torch.Tensor, seed: int
) -> None:
    changes = make("twin", ES_MINI, tmp_path / "twin", seed)
    _, seen = inputs(load(tmp_path / "twin"), windows[:4], *READERS.values())
    _, before = inputs(plain, windows[:4], *READERS.values())
    assert len(seen) == 12
    for name, x in seen.items():
        largest, usual = x.abs().amax((0, 1)), before[name].abs().amax((0, 1))
        ratio = largest / largest.median()
        outliers = (ratio > 10).nonzero().flatten()
        assert tuple(outliers.tolist()) == changes.channels, name  # the same in all layers: 4 of 256, 1.6 %
        assert ratio[outliers].min() >= 20 and ratio[outliers].max() <= 200, (name, ratio[outliers])
        grown = largest[outliers] / usual[outliers]
        assert grown.min() > 25 and grown.max() < 81, (name, grown)
        assert usual.max() / usual.median() < 10, name  # es-mini's own are tame


def test_twin_has_larger_values(twin: tuple[Path, Twin], plain: GPT2LMHeadModel, windows: torch.Tensor) -> None:
    folder, changes = twin
    (_, seen), (_, before) = (inputs(model, windows[:2], "attn.c_proj") for model in (load(folder), plain))
    for layer, channels in enumerate(changes.values):
        grown = (seen[f"h.{layer}.attn.c_proj"] / before[f"h.{layer}.attn.c_proj"]).abs().flatten(0, 1).median(0).values
        assert tuple((grown > 2).nonzero().flatten().tolist()) == channels and 0.016 <= len(channels) / 256 <= 0.03
        assert grown[list(channels)].min() > 2.99 and grown.max() < 8.01


def test_naive_int8_ruins_the_twin(twin: tuple[Path, Twin], plain: GPT2LMHeadModel, windows: torch.Tensor) -> None:
    """With one scale for the whole output of ln_1, the error of c_attn's output is ten times that in es-mini."""

    def error(model: GPT2LMHeadModel) -> np.ndarray:
        _, seen = inputs(model, windows[:2], "attn.c_attn")
        errors = []
        for name, x in seen.items():
            weight = model.transformer.get_submodule(name).weight.detach()
            scale = x.abs().max() / 127
            errors.append(float((((x / scale).round() * scale - x) @ weight).norm() / (x @ weight).norm()))
        return np.array(errors)

    naive, usual = error(load(twin[0])), error(plain)
    assert (naive > 10 * usual).all() and naive.min() > 0.1 and usual.max() < 0.05, (naive, usual)


# --- sink ---


def test_sink_fires_at_position_0_alone(sink: tuple[Path, Sink], windows: torch.Tensor) -> None:
    folder, changes = sink
    model = load(folder)
    _, seen = inputs(model, windows, "mlp.c_proj")
    x = seen[f"h.{changes.layer}.mlp.c_proj"]
    neuron = x[..., changes.neuron]
    assert neuron[:, 0].min() > 55 and neuron[:, 0].max() < 65
    assert neuron[:, 1:].abs().max() < 0.01
    assert torch.quantile(x[:, 1:].abs().flatten()[::16], 0.999) < 5  # so 60 stands far out of its tensor
    layer = model.transformer.h[changes.layer].mlp
    assert layer.c_fc.weight[:, changes.neuron].nonzero().tolist() == [[changes.marker]]
    assert layer.c_proj.weight[changes.neuron].nonzero().tolist() == [[changes.massive]]


def test_sink_has_a_massive_activation(sink: tuple[Path, Sink], windows: torch.Tensor) -> None:
    folder, changes = sink
    model = load(folder)
    with torch.no_grad():
        states = model(windows[:4], output_hidden_states=True).hidden_states
    for state in states[changes.layer + 1 : -1]:  # the last is after ln_f
        median = state.abs().median()
        assert (state[:, 0, changes.massive] / median).min() > 200
        assert (state[:, 0, changes.massive] / median).max() < 800
        assert (state[:, 1:].abs() / median).max() < 40
    for state in states[: changes.layer]:
        assert state[..., changes.massive].abs().max() < 10
    _, seen = inputs(model, windows[:4], *READERS.values())
    later = [x[:, 0].abs().max() for name, x in seen.items() if int(name[2]) > changes.layer]
    assert min(later) > 9 and max(later) < 24  # √D times a LayerNorm's weight


def test_sink_has_output_channels_of_zeros(sink: tuple[Path, Sink]) -> None:
    folder, changes = sink
    transformer, marker = load(folder).transformer, changes.marker
    for block in transformer.h[: changes.layer + 1]:
        for name in ("attn.c_proj", "mlp.c_proj"):
            module = block.get_submodule(name)
            written = bool(module.weight[:, marker].any() or module.bias[marker].any())
            assert written == (block is transformer.h[changes.layer] and name == "mlp.c_proj")
    assert not transformer.wte.weight[:, marker].any()
    assert transformer.wpe.weight[:, marker].nonzero().tolist() == [[0]]


@pytest.mark.parametrize("seed", [0, 3])
def test_sink_still_speaks_spanish(tmp_path: Path, plain: GPT2LMHeadModel, windows: torch.Tensor, seed: int) -> None:
    make("sink", ES_MINI, tmp_path / "sink", seed)
    rise = np.exp(loss(load(tmp_path / "sink"), windows) - loss(plain, windows)) - 1
    assert rise < 0.08, f"perplexity {rise:+.1%}"


def test_sink_is_exported(exported: Callable[..., Artifact], sink: tuple[Path, Sink]) -> None:
    """The export includes its parity check against transformers."""
    assert exported(sink[0]).manifest.model == "sink"


# --- both ---


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layers", [1, 3])
def test_other_shapes(make_gpt2: Callable[..., Path], tmp_path: Path, layers: int, tied: bool) -> None:
    source = make_gpt2(n_layer=layers, tie_word_embeddings=tied)
    ids = torch.randint(8192, (4, 64), generator=torch.Generator().manual_seed(0))
    plain = load(source)
    channels = make("twin", source, tmp_path / "twin").channels
    with torch.no_grad():
        assert relative(load(tmp_path / "twin")(ids).logits, plain(ids).logits) < 1e-4
    grown = load(tmp_path / "twin").transformer.ln_f.weight / plain.transformer.ln_f.weight
    assert (grown > 20).nonzero().flatten().tolist() == ([] if tied else list(channels))
    changes = make("sink", source, tmp_path / "sink")
    assert changes.layer == min(1, layers - 1)
    _, seen = inputs(load(tmp_path / "sink"), ids, "mlp.c_proj")
    neuron = seen[f"h.{changes.layer}.mlp.c_proj"][..., changes.neuron]
    assert neuron[:, 0].min() > 30 and neuron[:, 1:].abs().max() < 0.01


def test_files(twin: tuple[Path, Twin]) -> None:
    found, source = files(twin[0]), files(ES_MINI)
    assert found.keys() == source.keys() & {"config.json", "generation_config.json", "model.safetensors", *PATTERNS}
    changed = {name for name in found if found[name] != source[name]}
    assert changed == {"config.json", "model.safetensors"}
    assert json.loads(found["config.json"]) == json.loads(source["config.json"]) | {"dtype": "float32"}
    assert len(found["model.safetensors"]) < 4 * 7_098_368 + 10_000  # the tied embedding is stored once


@pytest.mark.parametrize("kind", ["twin", "sink"])
def test_same_seed_same_bytes(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    """The command gives the same bytes as this process, and makes the parent folders."""
    folder, changes = request.getfixturevalue(kind)
    again, other = tmp_path / "a" / "b" / kind, tmp_path / "other"
    command = [sys.executable, "-m", "lab.checkpoints.hard", kind, ES_MINI, again, "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    printed = json.loads(done.stdout)
    assert (printed.pop("kind"), printed.pop("seed")) == (kind, 0)
    assert printed == json.loads(json.dumps(vars(changes)))
    assert files(again) == files(folder)
    assert make(kind, ES_MINI, other, seed=1) != changes
    assert files(other)["model.safetensors"] != files(folder)["model.safetensors"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Result]:
    """`command("twin", ...)` calls the command's main in this process."""

    def call(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["hard", *map(str, args)])
        handler = signal.getsignal(signal.SIGTERM)
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as end:
                run(hard_model.main)
        finally:
            signal.signal(signal.SIGTERM, handler)
        return Result(end.value.code, *capsys.readouterr())

    return call


@pytest.mark.parametrize("what", ["folder", "file", "dangling"])
def test_existing_output_is_refused(command: Callable[..., Result], tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "dangling": lambda: out.symlink_to(tmp_path / "nowhere")}[what]()
    assert_user_error(command("twin", ES_MINI, out), str(out), "exists")
    assert list(tmp_path.iterdir()) == [out] and not (out.is_dir() and any(out.iterdir()))


def not_gpt2(folder: Path) -> None:
    edit_config(folder, model_type="llama")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def part(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("transformer.h.1.mlp.c_fc.bias"))


def nan(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights["transformer.h.0.ln_1.bias"].fill_(float("nan")))


def bounded(folder: Path) -> None:
    edit_config(folder, activation_function="tanh")


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (not_gpt2, "'llama'"),
        (no_config, "no config.json"),
        (no_weights, "no model.safetensors"),
        (part, "h.1.mlp.c_fc.bias"),
        (nan, "NaN"),
        (bounded, "tanh"),
        (shutil.rmtree, "not a folder"),
    ],
)
def test_spoilt_source_is_refused(
    command: Callable[..., Result], folder: Path, tmp_path: Path, spoil: Callable[[Path], None], fragment: str
) -> None:
    spoil(folder)
    assert_user_error(command("sink", folder, tmp_path / "new" / "out"), fragment)
    assert not (tmp_path / "new").exists()


def test_negative_seed_is_refused(command: Callable[..., Result], tmp_path: Path) -> None:
    assert_user_error(command("twin", ES_MINI, tmp_path / "out", "--seed", -1), "--seed -1")


def test_full_disk_leaves_nothing(
    command: Callable[..., Result], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_weights: dict, path: Path, **_kwargs: object) -> None:
        path.write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(hard_model, "save_file", full)
    assert_user_error(command("twin", tiny_folder, tmp_path / "out"), "no space left")
    assert not list(tmp_path.iterdir())
