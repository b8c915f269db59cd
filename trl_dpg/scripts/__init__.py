"""One module for each command. A progress bar of a library appears only if it is needed for some seconds."""

import os
import sys


# Read by tqdm when it is imported
os.environ.setdefault("TQDM_DELAY", "3")
if not sys.stderr.isatty():  # in a file, each state of a bar stays
    os.environ.setdefault("TQDM_MININTERVAL", "10")
