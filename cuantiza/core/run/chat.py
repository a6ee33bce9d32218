"""Write a message as the chat template of a model has it, so that the model answers it.

A chat template is a program in Jinja that comes with the tokenizer. It runs in Jinja's sandbox, where it can neither
change what it is given nor reach the interpreter, with what transformers gives it: `messages`,
`add_generation_prompt`, the texts of special tokens, `raise_exception`, `strftime_now` and `tojson`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.model_config import read_object
from cuantiza.core.inputs.tokenizer import token_ids
from cuantiza.core.inputs.tokenizer_files import SETTINGS, TEMPLATE

_ANSWER = "0123456789"  # an answer that no template writes by itself


@dataclass(frozen=True)
class Chat:
    """A conversation in which the user has said one thing: `ids` up to where the model answers, and `end`, the token
    that ends an answer (none where the template writes no special token there)."""

    ids: list[int]
    end: frozenset[int]


class _Generation(Extension):
    """The block {% generation %}, with which training marks answers; it changes no text."""

    tags = {"generation"}  # noqa: RUF012  # as Extension declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def chat(folder: Path, tokenizer: Tokenizer, message: str) -> Chat:
    """The conversation in which the user says `message`, by the chat template of the artifact `folder`.

    The template writes the start token itself, where the model wants one. Raises UserError if there is no template, or
    if it fails.
    """
    render = _template(folder)
    asked = [{"role": "user", "content": message}]
    ids = token_ids(tokenizer, render(asked, True))
    if not ids:
        raise UserError(
            f"{folder}: its chat template writes nothing; leave --chat out, or take the original's template"
        )
    try:
        answered = render([*asked, {"role": "assistant", "content": _ANSWER}], False)
    except UserError:  # templates may refuse an answer that has no thoughts or tools
        return Chat(ids, frozenset())
    _, found, after = answered.rpartition(_ANSWER)
    known = tokenizer.get_added_tokens_decoder()
    first = token_ids(tokenizer, after.lstrip())[:1] if found else []
    return Chat(ids, frozenset(token for token in first if token in known))


def _template(folder: Path) -> Callable[[list[dict[str, str]], bool], str]:
    """The function of `folder`'s template: the text of messages, up to an answer if its second argument says so."""
    settings = read_object(folder / SETTINGS, "artifact")
    source = settings.get("chat_template")
    if isinstance(source, list):  # named ones, of which others are for tools
        source = next((item.get("template") for item in source if item.get("name") == "default"), None)
    if (folder / TEMPLATE).is_file():
        source = (folder / TEMPLATE).read_text(encoding="utf-8")
    if not isinstance(source, str):
        raise UserError(
            f"--chat: {folder} has no chat template, as a model that was not trained to answer has none; leave --chat out, "
            f"and the model continues the text, or put the model's own {TEMPLATE} into the folder of its checkpoint"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda text: datetime.now().strftime(text)}
    # Not the switches such as add_bos_token, which transformers keeps to itself.
    tokens = {key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str | dict)}
    given = {"tools": None, "documents": None} | {key: _text(value) for key, value in tokens.items()}

    def render(messages: list[dict[str, str]], answer: bool) -> str:
        try:
            compiled = environment.from_string(source)
            return compiled.render(messages=messages, add_generation_prompt=answer, **given)
        except (
            TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
        ) as error:
            raise UserError(
                f"{folder}: its chat template fails ({error}); leave --chat out, or take the original's template"
            ) from None

    return render


def _refuse(reason: object) -> str:
    raise TemplateError(str(reason))


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) and "content" in token else token)
