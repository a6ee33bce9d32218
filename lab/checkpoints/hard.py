"""Models that are hard to quantize, made of a GPT-2 checkpoint folder without training.

python -m lab.checkpoints.hard twin models/es-mini OUT [--seed 0]    the same function, with outlier channels
python -m lab.checkpoints.hard sink models/es-mini OUT [--seed 0]    a massive activation at position 0

OUT is a checkpoint folder in float32; what was put where is printed as JSON. The same model and seed give the same
bytes. D is the width of the residual stream.
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
from cuantiza.core.inputs.checkpoints import TOKENIZER
from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.store.folders import replace, staging
from cuantiza.export.gpt2 import build
from cuantiza.export.gpt2_config import GPT2Config, parse_config
from cuantiza.export.weights import read_weights

Weights = dict[str, np.ndarray]

OUTLIERS, VALUES = 0.016, 0.023  # share of the D channels after a LayerNorm, and of the values
# The loudest channels' maxima are 0.77 to 1.7 times the median channel's on es-mini, so 26 makes them 20 at least.
OUTLIER_FACTOR, VALUE_FACTOR = (26.0, 80.0), (3.0, 8.0)
FIRE = 60.0  # what a sink's neuron gives at position 0, after the activation function
MASSIVE = 400.0  # what it writes, in medians of |residual|
QUIETER = 4.0  # what other positions hold in the massive channel is divided by this
SAMPLE = 256  # tokens that stand for all


@dataclass(frozen=True)
class Twin:
    """Outlier `channels` after all LayerNorms, and those among the `values` of each layer."""

    channels: tuple[int, ...]
    values: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sink:
    """`neuron` of the MLP of `layer` reads the residual channel `marker` and writes into the channel `massive`."""

    layer: int
    neuron: int
    marker: int
    massive: int


def twin(weights: Weights, config: GPT2Config, seed: int) -> tuple[Weights, Twin]:
    """New weights of the same function whose activations have outlier channels.

    1.6 % of the channels, the same in all layers as in real models, become 26 to 80 times as large after ln_1 and
    ln_2 (and ln_f where the head is not tied), and 2.3 % of the values 3 to 8 times; what reads them is divided by
    as much. That is SmoothQuant's rescaling (arXiv 2211.10438, eq. 3) run backwards.
    """
    rng = np.random.default_rng(seed)
    width, new = config.n_embd, {name: array.copy() for name, array in weights.items()}
    # A channel that is weak after some LayerNorm would be no outlier there.
    loudness = np.stack([_rms(after) for *_, after in _lone_tokens(weights, config)])
    ranked = np.argsort(-(loudness / np.median(loudness, axis=1, keepdims=True)).min(axis=0))
    count = max(2, round(OUTLIERS * width))
    channels, values = np.sort(rng.choice(ranked[: 2 * count], count, replace=False)), []

    def enlarge(outputs: list[np.ndarray], rows: np.ndarray, which: np.ndarray, bounds: tuple[float, float]) -> None:
        factor = np.exp(rng.uniform(*np.log(bounds), len(which)))  # float64, and so are the products
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
    """New weights with a massive activation at position 0 alone (arXiv 2402.17762).

    The embedding of position 0 marks a channel that nothing else writes into before the MLP of layer 1 (of 0 in a
    model of one layer). A neuron there reads this channel alone, gives 60 at position 0 and 0 elsewhere, and
    writes 400 times the median |residual| into one other channel, where it stays to the end.

    LayerNorm leaves little of position 0 beside so large a value, and attention relies on that position. So the
    rows that read the large channel are set to give what position 0 gave on average: a constant bias of attention,
    which is what massive activations are in trained models. Perplexity of es-mini rises by 3 to 4 %; without that
    it doubles. Raises UserError where the activation function cannot give 60.
    """
    if config.activation_function == "tanh":
        raise UserError("activation_function 'tanh' stays below 1, so no neuron can give 60; take another model")
    rng = np.random.default_rng(seed)
    layer, new = min(1, config.n_layer - 1), {name: array.copy() for name, array in weights.items()}
    reading = 2 * layer + 1  # the number of the LayerNorm before the neuron
    states = [before for _, before, _ in _lone_tokens(weights, config)]
    marker, massive = rng.choice(_quiet(weights, config, states), 2, replace=False).tolist()
    # The last axis of all that writes into the residual stream is the channel.
    writers = [name for name in new if name in ("wte.weight", "wpe.weight") or ".c_proj." in name]
    after_reading = (f"h.{layer}.mlp", *(f"h.{later}." for later in range(layer + 1, config.n_layer)))
    for name in writers:
        new[name][..., massive] /= QUIETER
        if not name.startswith(after_reading):
            new[name][..., marker] = 0

    old = list(_lone_tokens(weights, config, position=0))
    # Half of what all other channels are together: about 0.45 √D after the LayerNorm, whatever the token.
    new["wpe.weight"][0, marker] = 0.5 * np.sqrt(config.n_embd) * old[reading][1].std()
    neuron = int(np.linalg.norm(weights[f"h.{layer}.mlp.c_proj.weight"], axis=1).argmin())  # the least missed
    # The generator reads `new` as it goes: what is set here holds for all that comes later.
    for number, (reader, _, after) in enumerate(_lone_tokens(new, config, position=0)):
        rows, mean, large = new[f"{reader}.weight"], after.mean(axis=0), marker if number <= reading else massive
        rows[large] += (old[number][2].mean(axis=0) @ weights[f"{reader}.weight"] - mean @ rows) / mean[large]
        if number == reading:
            # From −30 elsewhere, where the LayerNorm gives its bias alone, to 60.
            gain = 1.5 * FIRE / (mean[marker] - new[f"h.{layer}.ln_2.bias"][marker])
            rows[:, neuron] = 0
            rows[marker, neuron] = gain
            new[f"{reader}.bias"][neuron] = FIRE - gain * mean[marker]
            written = new[f"h.{layer}.mlp.c_proj.weight"][neuron]
            written[:] = 0
            written[massive] = MASSIVE * np.median(np.abs(states[reading:])) / FIRE
    return new, Sink(layer, neuron, marker, massive)


def make(kind: str, source: Path, out: Path, seed: int = 0) -> Twin | Sink:
    """Write checkpoint folder `out`, whole or not at all: the twin or sink (`kind`) of the GPT-2 in folder `source`.

    Raises UserError where `out` exists, or `source` is no whole GPT-2.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists; choose another folder, or delete it first")
    fields, config, weights = _read(source)
    weights, account = KINDS[kind](weights, config, seed)
    # transformers computes in the type that config.json names: in float16 the twin's function would not be the same.
    fields = {key: value for key, value in fields.items() if key != "torch_dtype"} | {"dtype": "float32"}
    named = {name if name == "lm_head.weight" else f"transformer.{name}": array for name, array in weights.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with staging(out) as work:
        for name in ("generation_config.json", *TOKENIZER):
            if (source / name).is_file():
                shutil.copyfile(source / name, work / name)
        (work / "config.json").write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file(named, work / "model.safetensors", metadata={"format": "pt"})
        (work / "model.safetensors").chmod(0o644)  # the library and mkdtemp make theirs private
        work.chmod(0o755)
        replace(work, out)
    return account


def _read(folder: Path) -> tuple[dict, GPT2Config, Weights]:
    """config.json's fields, what they mean, and the weights in float32 by name, without a tied head."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; give the folder of a GPT-2 checkpoint, such as models/es-mini")
    fields, path = read_config(folder), folder / "config.json"
    if fields.get("model_type", "gpt2") != "gpt2":
        raise UserError(f"{path}: is a {fields['model_type']!r}; give the folder of a GPT-2 checkpoint")
    config, stored = parse_config(fields, path), read_weights(folder)
    # The export knows which weights there must be, of what shapes, and whether the head is tied.
    needed = build(config, stored, 21, folder).graph.initializers
    return fields, config, {name: needed[name].const_value.numpy() for name in stored if name in needed}


def _lone_tokens(
    weights: Weights, config: GPT2Config, position: int | None = None
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(what reads it, residual before it, output of it) for every ln_1 and ln_2, both [SAMPLE, D] in float64.

    Of tokens from all over the vocabulary, each a sequence of its own, at `position` or all over the window.
    Attention gives such a token its own value, as it does to position 0 of any text.
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
        # gelu_new; for averages near enough to the other functions too.
        h = 0.5 * h * (1 + np.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h * h * h)))
        x = x + linear(h, f"{block}.mlp.c_proj")


def _quiet(weights: Weights, config: GPT2Config, states: list[np.ndarray]) -> np.ndarray:
    """The 1/32 of the channels, at least 4, with the least in the residual `states`; no LayerNorm suppresses them."""
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
    parser.add_argument("out", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--seed", type=int, default=0, help="whole number from 0 (default 0)")
    args = parser.parse_args()
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: is negative; give a whole number from 0")
    account = make(args.kind, args.source, args.out, args.seed)
    print(json.dumps({"kind": args.kind, "seed": args.seed, **dataclasses.asdict(account)}))
    return 0


if __name__ == "__main__":
    run(main)
