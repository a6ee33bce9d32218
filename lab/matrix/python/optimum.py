"""optimum's ORTModelForCausalLM on the artifact's folder, used as transformers documents it."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import torch
from onnxruntime import SessionOptions
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

from lab.matrix.python.job import padded_batch, pieces, run


def main(job: dict) -> dict:
    options = SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = job["threads"], 3
    model = ORTModelForCausalLM.from_pretrained(job["folder"], session_options=options)
    tokenizer = AutoTokenizer.from_pretrained(job["folder"], padding_side="left")
    prompt = tokenizer(job["prompt"], add_special_tokens=False).input_ids
    return {
        "version": f"optimum-onnx {version('optimum-onnx')} (onnxruntime {version('onnxruntime')})",
        "prompt_ids": prompt,
        **_logits(model, job),
        **_generated(model, tokenizer, prompt, job),
    }


def _logits(model: ORTModelForCausalLM, job: dict) -> dict[str, np.ndarray]:
    ids = torch.tensor([job["ids"]])
    whole = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].numpy()
    past, rows = None, []
    for piece in pieces(job):
        mask = torch.ones(1, piece.stop, dtype=torch.int64)
        found = model(input_ids=ids[:, piece], attention_mask=mask, past_key_values=past, use_cache=True)
        past = found.past_key_values
        rows.append(found.logits[0, -1].numpy().copy())
    batch, mask = map(torch.from_numpy, padded_batch(job))
    # Positions as transformers' generate() counts them. Without these, a forward pass (PyTorch's, too) would count
    # padding as tokens.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(input_ids=batch, attention_mask=mask, position_ids=positions).logits[1, job["pad"] :].numpy()
    return {"whole": whole, "cached": np.stack(rows), "padded": padded}


def _generated(model: ORTModelForCausalLM, tokenizer: AutoTokenizer, prompt: list[int], job: dict) -> dict:
    """Generate from the prompt alone, and from it as the shorter sequence of a batch, padded on the left."""
    alone = [[job["start"], *prompt]]
    both = [*alone, [job["start"], *prompt, *prompt]]
    found = []
    for rows in (alone, both):
        inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        # No end token, so that every sequence gets as many tokens as asked for.
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=job["generate"], eos_token_id=None)
        found.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    return dict(zip(("generated", "generated_padded"), found, strict=True))


if __name__ == "__main__":
    run(main)
