"""Coverage-guided cases: atheris changes bytes and keeps the contents that reach new lines of the readers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

READERS = ("cuantiza",)


def run_guided(attempt: Callable[[bytes], None], valid: bytes, corpus: Path, cases: int, seed: int) -> None:
    """Call `attempt` on `cases` contents that atheris derives from `valid`. Ends the process and never returns.

    Atheris keeps the interesting contents in the folder `corpus`, which must be empty.
    """
    import atheris

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in READERS and module is not None:
            for attribute, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__module__", None) == name and hasattr(value, "__code__"):
                    setattr(module, attribute, atheris.instrument_func(value))
    (corpus / "valid").write_bytes(valid)
    options = [f"-atheris_runs={cases}", f"-seed={seed + 1}", f"-max_len={2 * len(valid)}", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], attempt)
    atheris.Fuzz()
