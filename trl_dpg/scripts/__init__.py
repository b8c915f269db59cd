"""
One module for each command.

A progress bar of a library appears only if it is needed for some seconds. What other packages say of their own code is
left out: a user cannot act on it.
"""

import logging
import os
import sys
import warnings


# Read by tqdm when it is imported
os.environ.setdefault("TQDM_DELAY", "3")
if not sys.stderr.isatty():  # in a file, each state of a bar stays
    os.environ.setdefault("TQDM_MININTERVAL", "10")
# TRL reads and sets transformers' deprecated names, which older versions need
warnings.filterwarnings(
    "ignore", "`(is_)?gradient_checkpointing(_kwargs)?` is deprecated and will be removed in v6", FutureWarning
)
# A faster kernel for inference with 4-bit models, which training does not use
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
