"""onnxruntime-genai, ONNX Runtime's own generation loop and tokenizer.

Artifacts of the target ort have a genai_config.json. For other artifacts it is written here, next to links to their
files.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as genai

from cuantiza.core.inputs.model_config import max_positions, read_config
from cuantiza.core.onnx.genai_config import GENAI_CONFIG, genai_config
from lab.matrix.python.job import pieces, run

genai.disable_telemetry_events()


def main(job: dict) -> dict:
    folder = Path(job["folder"])
    if (folder / GENAI_CONFIG).is_file():
        return _run(folder, job)
    with TemporaryDirectory() as name:
        work = Path(name)
        for file in folder.iterdir():
            (work / file.name).symlink_to(file.resolve())
        (work / GENAI_CONFIG).write_text(json.dumps(_config(folder)), encoding="utf-8")
        note = (
            f"with a {GENAI_CONFIG} of cuantiza/core/onnx/genai_config.py: the cache is a new tensor after every token"
        )
        return _run(work, job) | {"note": note}


def _config(folder: Path) -> dict:
    """The fields of genai_config.json for a graph that concatenates its cache."""
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    keys = [item.shape for item in session.get_inputs() if item.name.endswith(".key")]
    config = read_config(folder)
    return genai_config(
        config,
        json.loads((folder / "generation_config.json").read_text(encoding="utf-8")),
        layers=len(keys),
        heads=keys[0][1],
        head_dim=keys[0][3],
        vocabulary=session.get_outputs()[0].shape[-1],
        positions=max_positions(config),
        in_place=False,
    )


def _run(folder: Path, job: dict) -> dict:
    config = genai.Config(str(folder))
    options = {"intra_op_num_threads": job["threads"], "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = genai.Model(config)
    tokenizer = genai.Tokenizer(model)
    count = len(job["ids"])

    whole = _generator(model, count + 1)
    whole.append_tokens(_tokens(job["ids"]))
    cached, rows = _generator(model, count + 1), []
    for piece in pieces(job):
        cached.append_tokens(_tokens(job["ids"][piece]))
        rows.append(cached.get_logits()[0, -1].copy())

    prompt = [int(token) for token in tokenizer.encode(job["prompt"])]
    loop = _generator(model, 1 + len(prompt) + job["generate"], min_length=1 + len(prompt) + job["generate"])
    loop.append_tokens(_tokens([job["start"], *prompt]))
    generated = []
    while not loop.is_done():
        loop.generate_next_token()
        generated.append(int(loop.get_next_tokens()[0]))
    no_mask = "a batch of another length a row goes through its tokenizer, which adds no start token"
    return {
        "version": f"onnxruntime-genai {version('onnxruntime-genai')} (onnxruntime {version('onnxruntime')})",
        "whole": whole.get_output("logits")[0],
        "cached": np.stack(rows),
        "prompt_ids": prompt,
        "generated": generated,
        "skipped": {"padded": no_mask, "generated_padded": no_mask},
    }


def _generator(model: genai.Model, length: int, **options: object) -> genai.Generator:
    """A greedy generator for `length` tokens, one more than are fed, because a full generator gives no logits."""
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(batch_size=1, max_length=length, do_sample=False, **options)
    return genai.Generator(model, parameters)


def _tokens(ids: list[int]) -> np.ndarray:
    return np.array([ids], np.int32)


if __name__ == "__main__":
    run(main)
