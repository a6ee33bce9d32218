"""The tables of docs/report.md, from the fields of eval/report/schema.py and their descriptions.

python -m lab.report_page    prints the tables again

They stand between `<!-- fields -->` and `<!-- end -->`; the rest of the page is written by hand.
"""

from __future__ import annotations

import re

from pydantic import BaseModel

from cuantiza.core.errors import UserError, run
from cuantiza.core.machine.progress import report as say
from cuantiza.core.pages import table
from cuantiza.eval.report.schema import (
    Corpus,
    Decode,
    Inputs,
    LastWords,
    LeftOut,
    LlamaCpp,
    Machine,
    Prefill,
    Protocol,
    Report,
    Row,
)
from lab import DOCS
from lab.pages import write

PAGE = "report.md"
_PLACE = re.compile(r"(<!-- fields -->\n).*?(\n<!-- end -->)", re.DOTALL)
# (what a table is about, the prefix of its fields, the class whose fields they are), in the order of the page.
_TABLES = (
    ("The file:", "", Report),
    ("Each row:", "artifacts[].", Row),
    ("The last words of sentences:", "artifacts[].last_words.", LastWords),
    ("Each element of `prefill`:", "artifacts[].prefill[].", Prefill),
    ("Each element of `decode` has the same fields, except for its length:", "artifacts[].decode[].", Decode),
    ("llama.cpp's protocol:", "artifacts[].llama_cpp.", LlamaCpp),
    ("Each element of `protocols`:", "artifacts[].protocols[].", Protocol),
    ("The text that was scored:", "corpus.", Corpus),
    ("A row that is missing:", "left_out[].", LeftOut),
    ("The machine:", "machine.", Machine),
    ("The inputs:", "inputs.", Inputs),
)


def main() -> int:
    path = DOCS / PAGE
    write(path, filled(path.read_text(encoding="utf-8")))
    say(f"report    {path}: written")
    return 0


def filled(text: str) -> str:
    """`text` with its tables made again. Raises UserError if it has no place for them."""
    if not _PLACE.search(text):
        raise UserError(f"docs/{PAGE}: has no line <!-- fields --> with a line <!-- end --> after it")
    made = "\n".join(f"{title}\n\n{_table(prefix, model)}" for title, prefix, model in _TABLES)
    return _PLACE.sub(lambda found: f"{found[1]}\n{made}{found[2]}", text)


def _table(prefix: str, model: type[BaseModel]) -> str:
    """The table of the fields of `model` by their JSON names. For Decode it lists only the field that Prefill lacks."""
    fields = model.model_json_schema()["properties"]
    if model is Decode:
        fields = {"position": fields["position"]}
    rows = [[f"`{prefix}{name}`", _kind(field), field["description"]] for name, field in fields.items()]
    return table(["field", "type", "meaning"], rows, left=range(3))


def _kind(field: dict) -> str:
    """The JSON type of a field, such as "number or null"."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(map(_kind, field["anyOf"])))
    if "$ref" in field or "allOf" in field:
        return "object"
    return {"array": "list"}.get(field.get("type", ""), field.get("type", "string"))


if __name__ == "__main__":
    run(main)
