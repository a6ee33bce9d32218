"""Makes models that are hard to quantize from a GPT-2 checkpoint folder, without training.

python -m lab.checkpoints.hard twin models/es-mini OUT [--seed 0]    the same function, with outlier channels
python -m lab.checkpoints.hard sink models/es-mini OUT [--seed 0]    a massive activation at position 0

OUT becomes a checkpoint folder in float32. The command prints as JSON which channels and neurons it changed. The same
model and seed give the same bytes. In this file, D is the width of the residual stream.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.gpt2_config import GPT2Config, parse_config
from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.inputs.tokenizer_files import names_in, tokenizer_files
from cuantiza.core.inputs.weights.checkpoint import read_checkpoint
from cuantiza.core.store.folders import replace, staging
from cuantiza.export.graphs.gpt2 import build

Weights = dict[str, np.ndarray]

OUTLIERS, VALUES = 0.016, 0.023  # shares of the D channels after a LayerNorm, and of attention's values, to enlarge
# On es-mini the loudest channels' maxima are 0.77 to 1.7 times the median channel's, so a factor of 26 makes each of
# them at least 20 times the median channel's.
OUTLIER_FACTOR, VALUE_FACTOR = (26.0, 80.0), (3.0, 8.0)
FIRE = 60.0  # output of the sink's neuron at position 0, after the activation function
MASSIVE = 400.0  # value that this neuron writes, as a multiple of the median |residual|
QUIETER = 4.0  # the massive channel's values at other positions are divided by this
SAMPLE = 256  # tokens that represent the whole vocabulary


@dataclass(frozen=True)
class Twin:
    """The changes in a twin: outlier `channels` after every LayerNorm, and outliers in each layer's `values`."""

    channels: tuple[int, ...]
    values: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sink:
    """The changes in a sink: in `layer`'s MLP, `neuron` reads the residual channel `marker` and writes `massive`."""

    layer: int
    neuron: int
    marker: int
    massive: int


def twin(weights: Weights, config: GPT2Config, seed: int) -> tuple[Weights, Twin]:
    """Return weights that compute the same function, but whose activations have outlier channels.

    1.6 % of the channels become 26 to 80 times as large after ln_1 and ln_2 (and after ln_f if the head is not tied).
    They are the same channels in all layers, as in real models. 2.3 % of attention's value channels become 3 to 8 times
    as large. The weights that read these channels are divided by the same factors, so the function does not change.
    This is SmoothQuant's rescaling (arXiv 2211.10438, eq. 3) run backwards.
    """
    rng = np.random.default_rng(seed)
    width, new = config.n_embd, {name: array.copy() for name, array in weights.items()}
    # A channel that is weak after one of the LayerNorms would not stand out there, so each channel is ranked by its
    # weakest place.
    loudness = np.stack([_rms(after) for *_, after in _lone_tokens(weights, config)])
    ranked = np.argsort(-(loudness / np.median(loudness, axis=1, keepdims=True)).min(axis=0))
    count = max(2, round(OUTLIERS * width))
    channels, values = np.sort(rng.choice(ranked[: 2 * count], count, replace=False)), []

    def enlarge(outputs: list[np.ndarray], rows: np.ndarray, which: np.ndarray, bounds: tuple[float, float]) -> None:
        factor = np.exp(rng.uniform(*np.log(bounds), len(which)))  # float64, so the scaled weights become float64 too
        for array in outputs:
            array[..., which] *= factor
        rows[which] /= factor[:, None]

    for block in (f"h.{layer}" for layer in range(config.n_layer)):
        for norm, reader in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            outputs = [new[f"{block}.{norm}.{part}"] for part in ("weight", "bias")]
            enlarge(outputs, new[f"{block}.{reader}.weight"], channels, OUTLIER_FACTOR)
        values.append(np.sort(rng.choice(width, max(2, round(VALUES * width)), replace=False)))
        outputs = [new[f"{block}.attn.c_attn.{part}"][..., 2 * width :] for part in ("weight", "bias")]
        enlarge(outputs, new[f"{block}.attn.c_proj.weight"], values[-1], VALUE_FACTOR)
    if "lm_head.weight" in new:
        enlarge([new["ln_f.weight"], new["ln_f.bias"]], new["lm_head.weight"].T, channels, OUTLIER_FACTOR)
    return new, Twin(tuple(channels.tolist()), tuple(tuple(chosen.tolist()) for chosen in values))


def sink(weights: Weights, config: GPT2Config, seed: int) -> tuple[Weights, Sink]:
    """Return weights that cause a massive activation at position 0 and nowhere else (arXiv 2402.17762).

    The embedding of position 0 marks one channel. Nothing else writes into that channel before the MLP of layer 1 (of
    layer 0 if the model has one layer). One neuron of that MLP reads only this channel, outputs 60 at position 0 and 0
    elsewhere, and writes 400 times the median |residual| into another channel, where the value stays to the end.

    Next to so large a value, LayerNorm leaves little of the other channels at position 0, but attention relies on that
    position. So the weights that read the large channel are set to produce the average output that position 0 had
    before: a constant bias of attention, as massive activations are in trained models. The perplexity of es-mini rises
    by 3 to 4 %; without this repair it doubles. Raises UserError if the activation function cannot output 60.
    """
    if config.activation_function == "tanh":
        raise UserError("activation_function 'tanh' stays below 1, so no neuron can give 60; take another model")
    rng = np.random.default_rng(seed)
    layer, new = min(1, config.n_layer - 1), {name: array.copy() for name, array in weights.items()}
    reading = 2 * layer + 1  # index of the LayerNorm before the neuron; each layer has two
    states = [before for _, before, _ in _lone_tokens(weights, config)]
    marker, massive = rng.choice(_quiet(weights, config, states), 2, replace=False).tolist()
    # These weights write into the residual stream; the last axis of each is the channel.
    writers = [name for name in new if name in ("wte.weight", "wpe.weight") or ".c_proj." in name]
    after_reading = (f"h.{layer}.mlp", *(f"h.{later}." for later in range(layer + 1, config.n_layer)))
    for name in writers:
        new[name][..., massive] /= QUIETER
        if not name.startswith(after_reading):
            new[name][..., marker] = 0

    old = list(_lone_tokens(weights, config, position=0))
    # The marker is half as large as the norm of all other channels, so it is about 0.45 √D after the LayerNorm for any
    # token.
    new["wpe.weight"][0, marker] = 0.5 * np.sqrt(config.n_embd) * old[reading][1].std()
    neuron = int(
        np.linalg.norm(weights[f"h.{layer}.mlp.c_proj.weight"], axis=1).argmin()
    )  # the weakest one, so its loss matters least
    # The generator reads `new` step by step, so each change made here already affects all later LayerNorms.
    for number, (reader, _, after) in enumerate(_lone_tokens(new, config, position=0)):
        rows, mean, large = new[f"{reader}.weight"], after.mean(axis=0), marker if number <= reading else massive
        rows[large] += (old[number][2].mean(axis=0) @ weights[f"{reader}.weight"] - mean @ rows) / mean[large]
        if number == reading:
            # The neuron's input is −30 at other positions, where the LayerNorm outputs only its bias, and 60 at 0.
            gain = 1.5 * FIRE / (mean[marker] - new[f"h.{layer}.ln_2.bias"][marker])
            rows[:, neuron] = 0
            rows[marker, neuron] = gain
            new[f"{reader}.bias"][neuron] = FIRE - gain * mean[marker]
            written = new[f"h.{layer}.mlp.c_proj.weight"][neuron]
            written[:] = 0
            written[massive] = MASSIVE * np.median(np.abs(states[reading:])) / FIRE
    return new, Sink(layer, neuron, marker, massive)


def make(kind: str, source: Path, out: Path, seed: int = 0) -> Twin | Sink:
    """Write the twin or sink (`kind`) of the GPT-2 in the folder `source` as the checkpoint folder `out`.

    `out` is written completely or not at all. Raises UserError if `out` exists or `source` is not a complete GPT-2.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists; choose another folder, or delete it first")
    fields, config, weights = _read(source)
    weights, changes = KINDS[kind](weights, config, seed)
    # transformers computes in the type that config.json names. In float16 the twin would not compute the same function.
    fields = {key: value for key, value in fields.items() if key != "torch_dtype"} | {"dtype": "float32"}
    named = {name if name == "lm_head.weight" else f"transformer.{name}": array for name, array in weights.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with staging(out) as work:
        for name in ("generation_config.json", *tokenizer_files(names_in(source))):
            if (source / name).is_file():
                shutil.copyfile(source / name, work / name)
        (work / "config.json").write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file(named, work / "model.safetensors", metadata={"format": "pt"})
        (work / "model.safetensors").chmod(0o644)  # safetensors and mkdtemp create private ones
        work.chmod(0o755)
        replace(work, out)
    return changes


def _read(folder: Path) -> tuple[dict, GPT2Config, Weights]:
    """Read (config.json's fields, the parsed config, float32 weights by name, without a tied head)."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; give the folder of a GPT-2 checkpoint, such as models/es-mini")
    fields, path = read_config(folder), folder / "config.json"
    if fields.get("model_type", "gpt2") != "gpt2":
        raise UserError(f"{path}: is a {fields['model_type']!r}; give the folder of a GPT-2 checkpoint")
    config, stored = parse_config(fields, path), read_checkpoint(folder).weights
    # The export checks that all weights are there with the right shapes, and knows whether the head is tied.
    needed = build(config, stored, 21, folder).graph.initializers
    return fields, config, {name: needed[name].const_value.numpy() for name in stored if name in needed}


def _lone_tokens(
    weights: Weights, config: GPT2Config, position: int | None = None
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (linear layer that reads it, residual before it, its output) for every ln_1 and ln_2.

    Residual and output are float64 [SAMPLE, D]. The tokens come from all over the vocabulary. Each is a sequence of its
    own, at `position` or (None) at positions all over the window. Attention of such a token can only see the token
    itself, as position 0 of any text does.
    """

    def normalized(norm: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + config.layer_norm_epsilon)
        return centred / deviation * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]

    def linear(h: np.ndarray, name: str) -> np.ndarray:
        return h @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    tokens, positions = (np.linspace(0, n - 1, SAMPLE).astype(int) for n in (config.vocab_size, config.n_positions))
    x = weights["wte.weight"][tokens].astype(np.float64)
    x += weights["wpe.weight"][positions if position is None else position]
    for block in (f"h.{layer}" for layer in range(config.n_layer)):
        h = normalized(f"{block}.ln_1")
        yield f"{block}.attn.c_attn", x, h
        x = x + linear(linear(h, f"{block}.attn.c_attn")[:, 2 * config.n_embd :], f"{block}.attn.c_proj")
        h = normalized(f"{block}.ln_2")
        yield f"{block}.mlp.c_fc", x, h
        h = linear(h, f"{block}.mlp.c_fc")
        # gelu_new. The other activation functions are close enough to it for the averages that are needed here.
        h = 0.5 * h * (1 + np.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h * h * h)))
        x = x + linear(h, f"{block}.mlp.c_proj")


def _quiet(weights: Weights, config: GPT2Config, states: list[np.ndarray]) -> np.ndarray:
    """The 1/32 of the channels (at least 4) that are weakest in the residual `states`.

    Channels that a LayerNorm suppresses (weight below half the median) come last.
    """
    norms = [np.abs(weights[f"h.{layer}.ln_{i}.weight"]) for layer in range(config.n_layer) for i in (1, 2)]
    suppressed = np.any([norm < 0.5 * np.median(norm) for norm in norms], axis=0)
    loudness = _rms(np.concatenate([state / state.std(axis=-1, keepdims=True) for state in states]))
    return np.argsort(np.where(suppressed, np.inf, loudness))[: max(4, config.n_embd // 32)]


def _rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x**2).mean(axis=0))


KINDS = {"twin": twin, "sink": sink}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.checkpoints.hard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS, help="twin: outlier channels; sink: a massive activation")
    parser.add_argument("source", type=Path, help="folder of a GPT-2 checkpoint")
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--seed", type=int, default=0, help="whole number from 0 (default 0)")
    args = parser.parse_args()
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: is negative; give a whole number from 0")
    changes = make(args.kind, args.source, args.out, args.seed)
    print(json.dumps({"kind": args.kind, "seed": args.seed, **dataclasses.asdict(changes)}))
    return 0


if __name__ == "__main__":
    run(main)
