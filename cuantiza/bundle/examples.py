"""The model card's examples: code that continues the report's prompt with the files of the bundle, as the report did."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tokenizers import Tokenizer

TOKENS = 32  # as many as the report's continuation has

_PYTHON = """from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{id}")
model = ORTModelForCausalLM.from_pretrained("{id}", file_name="{file}")
inputs = tokenizer({opened}, add_special_tokens=False, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))"""
_JAVASCRIPT = """import {{ pipeline }} from "@huggingface/transformers";

const options = {{ dtype: "{dtype}" }};
const generator = await pipeline("text-generation", "{id}", options);
const text = {opened};
const [made] = await generator(text, {{ max_new_tokens: {tokens}, do_sample: false, add_special_tokens: false }});
console.log(made.generated_text);"""
_PLAIN = """import numpy as np, onnxruntime as ort
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
session = ort.InferenceSession("onnx/{file}", providers=["CPUExecutionProvider"])
inputs = {{item.name: item.shape for item in session.get_inputs()}}
names = [name for name in inputs if name.startswith("past_key_values.")]
past = [np.zeros((1, inputs[name][1], 0, inputs[name][3]), np.float32) for name in names]
outputs = ["logits", *(name.replace("past_key_values", "present") for name in names)]

prompt = {prompt}
new = [{start}, *tokenizer.encode(prompt, add_special_tokens=False).ids]  # {start} is {named}
seen, made = 0, []
for _ in range({tokens}):
    seen += len(new)
    feeds = {{"input_ids": [new], "attention_mask": [[1] * seen], "position_ids": [list(range(seen - len(new), seen))]}}
    feeds = {{name: np.array(values, np.int64) for name, values in feeds.items() if name in inputs}}
    logits, *past = session.run(outputs, feeds | dict(zip(names, past)))  # logits [1, tokens, vocabulary]
    new = [int(logits[0, -1].argmax())]
    made += new
text = prompt + tokenizer.decode(made)
print(text)"""


@dataclass(frozen=True)
class Opening:
    """How a text begins: the id of the start token, its text, and whether that text before a prompt gives that id."""

    start: int
    text: str
    parsed: bool


def opening(tokenizer: Tokenizer, start: int, prompt: str) -> Opening:
    """The start token of id `start`, as `tokenizer` writes it before `prompt`."""
    text = tokenizer.id_to_token(start) or ""
    ids = [start, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    return Opening(start, text, tokenizer.encode(text + prompt, add_special_tokens=False).ids == ids)


def examples(hub_id: str, prompt: str, begin: Opening, file: str, dtype: str) -> tuple[str, str, str]:
    """The code for optimum, transformers.js and ONNX Runtime alone, with the graph `file` of type `dtype`.

    Each prints the continuation that the report has for that graph.
    """
    opened = _quoted(begin.text + prompt if begin.parsed else prompt)
    fill = {"id": hub_id, "file": file, "tokens": TOKENS, "opened": opened}
    return (
        _PYTHON.format(**fill),
        _JAVASCRIPT.format(dtype=dtype, **fill),
        _PLAIN.format(
            file=file,
            tokens=TOKENS,
            prompt=_quoted(prompt),
            start=begin.start,
            named=f"{_quoted(begin.text)}, which stands before every text",
        ),
    )


def _quoted(text: str) -> str:
    """`text` as a string of Python and of JavaScript."""
    return json.dumps(text, ensure_ascii=False)
