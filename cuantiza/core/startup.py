"""Imported by a stage's package before all else: Ctrl-C ends `python -m STAGE` without a word while its modules load.

`cuantiza.core.errors.run` takes over from there.
"""

import signal
import sys

# Python has "-m" here only while it looks for the module to run: a program that imports the package keeps its handler.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
