"""What commands print beside a progress bar."""

import os
import sys

from tqdm import tqdm


def say(text: str) -> None:
    """Print a text at once, above a progress bar. Of several processes, the first one does."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)
        sys.stdout.flush()
