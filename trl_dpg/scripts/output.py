"""What commands print beside a progress bar."""

import sys

from tqdm import tqdm


def say(text: str) -> None:
    """Print a text at once, above a progress bar."""
    tqdm.write(text)
    sys.stdout.flush()
