"""Generation in the terminal: sampling equals transformers', characters are whole, and a seed repeats its text."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import (
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.tokenizer import load_tokenizer
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.run.sampling import Sampling, draw, generate, scores, text_of

from helpers import ROOT, assert_user_error, stage

PROMPT = "Me gusta mucho el futbol"


@pytest.fixture(scope="module")
def runtime(es_mini_fp32):
    return Runtime(es_mini_fp32.model, 2)


@pytest.fixture(scope="module")
def tokenizer(es_mini_fp32):
    return load_tokenizer(es_mini_fp32.path)


@pytest.mark.parametrize("ngram", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 50, 1.0), (1.3, 0, 0.9), (0.8, 40, 0.6)]
)
def test_scores_are_transformers(runtime, tokenizer, temperature, top_k, top_p, ngram):
    ids = [0, *tokenizer.encode("El niño y el perro y el niño y el perro y el").ids]
    logits = runtime.forward(np.asarray([ids]))[0, -1]
    expected = torch.from_numpy(logits.astype(np.float64))[None]
    chain = [NoRepeatNGramLogitsProcessor(ngram)] if ngram else []
    chain += [TemperatureLogitsWarper(temperature)]
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for processor in chain:
        expected = processor(torch.tensor([ids]), expected)
    ours = scores(logits, ids, Sampling(temperature, top_k, top_p, ngram))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(expected[0].numpy()))
    np.testing.assert_allclose(ours, expected[0].numpy())
    if ngram in (1, 2):
        assert not np.isfinite(ours[ids]).all()


def test_tokens_are_drawn_as_often_as_the_model_says(runtime):
    logits = runtime.forward(np.asarray([[0, 300, 301]]))[0, -1]
    sampling, generator = Sampling(top_k=5), np.random.default_rng(0)
    left = scores(logits, [], sampling)
    expected = np.exp(left - left.max()) / np.exp(left - left.max()).sum()
    drawn = np.bincount([draw(logits, [], sampling, generator) for _ in range(4000)], minlength=len(logits)) / 4000
    # Five standard errors of a share of 4,000.
    assert np.all(np.abs(drawn - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000) + 1e-12)


def test_greedy_takes_the_likeliest_and_a_seed_repeats_itself(runtime):
    ids = [0, 300, 301, 302]
    greedy = list(generate(runtime, ids, 12, Sampling(temperature=0)))
    step, expected = list(ids), []
    for _ in range(12):
        expected.append(int(runtime.forward(np.asarray([step]))[0, -1].argmax()))
        step.append(expected[-1])
    assert greedy == expected
    one, again, other = (list(generate(runtime, ids, 12, Sampling(), seed)) for seed in (7, 7, 8))
    assert one == again != other
    assert (
        list(generate(runtime, ids, 12, Sampling(temperature=0), stop={greedy[3]})) == greedy[: greedy.index(greedy[3])]
    )


def test_no_pair_comes_twice_where_none_may(runtime):
    ids = [0, 300]
    made = ids + list(generate(runtime, ids, 120, Sampling(temperature=0, no_repeat_ngram=2)))
    pairs = list(pairwise(made))
    assert len(pairs) == len(set(pairs)) == 121


def test_pieces_are_whole_characters(tokenizer):
    text = "¿Qué? ñandú 🦎🦎 日本 — é"
    ids = tokenizer.encode(text).ids
    pieces = list(text_of(tokenizer, ids))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) < len(ids)  # some characters took more than one token
    assert "".join(text_of(tokenizer, ids[:-1])) != text  # an incomplete character at the end is printed, not held back


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", 1e-310),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("no_repeat_ngram", -1),
    ],
)
def test_sampling_out_of_range(field, value):
    with pytest.raises(UserError, match="--" + field.replace("_", "-")):
        Sampling(**{field: value})


def test_the_command(es_mini_fp32):
    arguments = ("cuantiza.generate", "--artifact", es_mini_fp32.path, "--tokens", 12)
    greedy = stage(*arguments, "--greedy")
    assert greedy.status == 0 and greedy.stdout.startswith(PROMPT) and len(greedy.stdout) > len(PROMPT) + 12
    assert greedy.stderr.startswith("12 tokens after ") and "tokens/s, greedy" in greedy.stderr
    piped = stage(*arguments, "--greedy", "--prompt", "-", input=PROMPT + "\n")
    assert piped.stdout == greedy.stdout
    ascii_only = stage(*arguments, "--greedy", "--prompt", "El niño — sí", env={"PYTHONIOENCODING": "ascii"})
    assert ascii_only.status == 0 and ascii_only.stdout.startswith("El ni?o ? s?"), ascii_only.stderr
    assert stage(*arguments, "--seed", 3).stdout == stage(*arguments, "--seed", 3).stdout != greedy.stdout


def test_it_ends_at_the_models_last_position(es_mini_fp32):
    prompt = "hola " * 2000
    too_long = stage("cuantiza.generate", "--artifact", es_mini_fp32.path, "--prompt", "-", input=prompt)
    assert_user_error(too_long, "--prompt: has ", "1023")
    near = "a b c d " * 127  # so close to the last position that the model does not end the text earlier
    result = stage("cuantiza.generate", "--artifact", es_mini_fp32.path, "--prompt", near, "--tokens", 1000, "--greedy")
    behind = int(result.stderr.split(" tokens after ")[1].split(",")[0])
    assert (
        result.status == 0 and result.stderr.startswith(f"{1024 - behind} tokens") and "last position" in result.stderr
    )


def test_no_artifact(tmp_path):
    assert_user_error(stage("cuantiza.generate", "--artifact", tmp_path), "manifest.json", "make export quantize")
    assert_user_error(stage("cuantiza.generate", "--tokens", 0), "--tokens 0")
    assert_user_error(stage("cuantiza.generate", "--threads", 100_000), "--threads 100000", "each processor")


def test_ctrl_c_ends_it(es_mini_fp32):
    command = [sys.executable, "-m", "cuantiza.generate", "--artifact", es_mini_fp32.path, "--tokens", "900"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as process:
        assert os.read(process.stdout.fileno(), 1)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and b"Traceback" not in errors


def test_pieces_keep_the_spaces_that_a_decoder_drops_at_the_beginning():
    """Llama's and Mistral's tokens mark a word's start, and that mark decodes to nothing at the start of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    other = Tokenizer(models.WordLevel({"▁hola": 0, "▁que": 1, "▁tal": 2, "?": 3}, unk_token="?"))
    other.pre_tokenizer, other.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert "".join(text_of(other, [1, 2], before=[0])) == " que tal"


def test_odd_logits_and_prompts(es_mini_fp32):
    generator = np.random.default_rng(0)
    assert {draw(np.array([1, 5, 2, 0.5]), [], Sampling(temperature=1e-3), generator) for _ in range(9)} == {1}
    with pytest.raises(UserError, match="not numbers"):
        draw(np.array([1, np.nan]), [], Sampling(), generator)
    with pytest.raises(UserError, match="not numbers"):
        draw(np.array([1, np.inf, 2]), [], Sampling(), generator)
    command = [sys.executable, "-m", "cuantiza.generate", "--artifact", es_mini_fp32.path, "--prompt", "-"]
    done = subprocess.run(command, cwd=ROOT, input=b"hola \xff", capture_output=True)
    assert done.returncode == 2 and b"UTF-8" in done.stderr and b"Traceback" not in done.stderr
