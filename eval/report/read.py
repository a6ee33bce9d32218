"""Read a report.json from anywhere: every field is checked, and an error is one line that names file and field."""

from __future__ import annotations

import reprlib
from pathlib import Path

from pydantic import ValidationError

from cuantiza.core.errors import UserError
from cuantiza.eval.report.schema import SCHEMA, Report

REPORT = "report.json"
MEND = "make the report again by `make eval`"
_LARGEST_BYTES = 2**28


def read_report(path: Path) -> Report:
    """Read the report at `path`: a report.json, or the folder that holds one.

    Raises UserError if there is none, or if a field is missing or has another type than in `Report`.
    """
    path = path / REPORT if path.is_dir() else path
    try:
        if (size := path.stat().st_size) > _LARGEST_BYTES:
            raise UserError(f"{path}: has {size} bytes, more than any report has; {MEND}")
        return Report.from_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: is not there; run `make eval` or `cuantiza eval` first") from None
    except ValidationError as error:
        raise UserError(f"{path}: {_what(error)}; {MEND}") from None


def _what(error: ValidationError) -> str:
    """Describe the first fault in a report, such as `artifacts[1].bytes is '7': input should be a valid integer`."""
    first = error.errors(include_url=False, include_context=False)[0]
    message = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "json_invalid":
        return f"is not JSON ({message.removeprefix('invalid JSON: ')[:80]})"
    where = field(first["loc"])
    if where == "schema":
        found = "missing" if first["type"] == "missing" else shown(first["input"])
        return f"its schema is {found}, not {SCHEMA!r}"
    if first["type"] == "missing":
        return f"{where} is missing"
    return f"{where or 'its content'} is {shown(first['input'])}: {message}"


def field(parts: tuple[str | int, ...]) -> str:
    """Write the place of a field, such as ("artifacts", 1, "bytes"), as artifacts[1].bytes."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def shown(value: object) -> str:
    """Show a value of a report: short, on one line, and without characters that a terminal acts on."""
    text = reprlib.repr(value) if isinstance(value, dict | list) else str(value)
    return ascii(text[:40])
