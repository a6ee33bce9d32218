"""docs/python.md: its code runs as it is written, as a script and without a guard for child processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from helpers import ROOT


def test_the_page_runs_as_written(tmp_path: Path) -> None:
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    (tmp_path / "script.py").write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder, *rows = done.stdout.splitlines()
    shape, story = rows[-1], rows[2:-1]
    assert folder.startswith("artifacts/es-mini/int8-dynamic ") and shape.endswith(", 8192)") and any(story)
    assert [row.split()[0] for row in rows[:2]] == ["fp32", "int8-dynamic"]
    assert (tmp_path / "artifacts/es-mini/int8-dynamic/manifest.json").is_file()
