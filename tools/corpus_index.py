"""Fix the split of a folder of .txt documents: `python tools/corpus_index.py corpus/es`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.corpus import write_index

if len(sys.argv) != 2:
    sys.exit("error: give the folder: python tools/corpus_index.py corpus/es")
write_index(Path(sys.argv[1]))
