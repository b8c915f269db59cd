"""
What a command says when it ends with an error, and its exit status: the one place where errors become messages.

Exit status 2 is wrong usage: arguments, files or data that the user has to change. 1 is a failure while the command
ran: a disk that is full, not enough memory, numbers that are not finite. Each is one message without a traceback. With
the environment variable `TRL_DPG_TRACEBACK=1`, the error comes as Python shows it.
"""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..redaction import redacted_text
from .flags import in_flags
from .usage import UsageError


PACKAGE = str(Path(__file__).parents[1])
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GONE = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN)
FULL_TEXTS = (
    *("No space left on device", "StorageFull", "File too large", "FileTooLarge"),
    *("inline_container", "iostream error"),  # torch.save
)
"""What the libraries that write weights and tables say when they cannot write on."""


@contextmanager
def explained(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End the process with a message and the exit status if the command inside raises an error."""
    try:
        yield
    except UsageError as error:
        parser.error(redacted_text(str(error)))
    except Exception as error:
        if os.environ.get("TRL_DPG_TRACEBACK", "0") not in ("", "0"):
            raise
        status, text = explain(error)
        if status == 2:
            parser.error(redacted_text(text))
        print(f"{parser.prog}: error: {redacted_text(text)}", file=sys.stderr)
        sys.exit(status)


def explain(error: Exception) -> tuple[int, str]:
    """The exit status and the message of an error, with its notes."""
    text = " ".join([str(error), *getattr(error, "__notes__", [])])
    name = getattr(error, "filename", None)
    where = f" {str(name)!r}" if name else ""
    if (isinstance(error, OSError) and error.errno in FULL) or any(known in text for known in FULL_TEXTS):
        return 1, (
            f"The disk is full, or a limit on the size of files is reached: the file{where} could not be written "
            f"({text}). Free some space or choose another output folder, and start the command again."
        )
    if isinstance(error, OSError) and error.errno in GONE:
        again = "When it is there again, start the command again."
        return 1, f"The disk does not answer any more{f' at{where}' if where else ''} ({text}). {again}"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return 1, f"No permission for{where} ({text}). Choose another folder, or change its permissions."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 1, (
            f"Not enough memory ({text}). For the student, lower --student_micro_batch_size or set "
            "--student_memory_budget 0; see docs/performance.md."
        )
    if "gloo/transport" in text or type(error).__name__ == "DistBackendError":
        return 1, f"Another process of this run has ended, or cannot be reached. Its own message says why ({text})."
    frames = traceback.extract_tb(error.__traceback__)
    own = bool(frames) and frames[-1].filename.startswith(PACKAGE)
    if own and isinstance(error, ValueError):
        return 2, in_flags(text)
    if own and isinstance(error, RuntimeError | FloatingPointError | OSError | ImportError):
        return 1, in_flags(text)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return (
        1,
        f"{type(error).__name__}: {text}{place}. TRL_DPG_TRACEBACK=1 in the environment shows where it comes from.",
    )
