"""Fix the split of a folder of .txt documents: `python -m cuantiza.index corpus/es`."""

import sys
from pathlib import Path

from cuantiza.core.inputs.corpus import write_index

if len(sys.argv) != 2:
    sys.exit("error: give the folder: python -m cuantiza.index corpus/es")
write_index(Path(sys.argv[1]))
