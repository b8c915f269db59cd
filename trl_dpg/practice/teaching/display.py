"""What is shown while a teacher is asked."""

import sys
import time
from typing import Any

from tqdm import tqdm


EVERY = 15.0
"""Seconds between two lines, if the output is no terminal."""


class Display:
    """
    A line with the samples so far, the time left, tokens and cost. In a background run, lines of text.

    Args:
        there (`int`): Samples that are there already.
        total (`int`): Samples that are wanted.
        show (`bool`): Whether to show anything.
    """

    def __init__(self, there: int, total: int, show: bool):
        self.there, self.total, self.visible = there, total, show
        self._lines = show and not sys.stderr.isatty()
        self._bar = tqdm(
            desc="teach", initial=there, total=total, unit="sample", disable=not show or self._lines, smoothing=0.05
        )
        self._began = self._last = time.monotonic()
        self._tokens: int | None = None

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        """Print a line above the progress."""
        if self.visible:
            tqdm.write(text, file=sys.stderr)

    def show(self, run: Any) -> None:
        """Show how far a run is."""
        if not self.visible:
            return
        now = time.monotonic()
        if self._lines:
            if now - self._last >= EVERY:
                self._last = now
                print(f"{self.there + run.accepted}/{self.total} samples, {self._left(run, now)}{self._figures(run)}")
                sys.stdout.flush()
            return
        self._bar.set_postfix_str(self._figures(run), refresh=False)
        self._bar.update(self.there + run.accepted + run.failed - self._bar.n)

    def _left(self, run: Any, now: float) -> str:
        ended = run.accepted + run.failed
        if not ended:
            return ""
        seconds = (now - self._began) / ended * max(self.total - self.there - ended, 0)
        return f"{duration(seconds)} left, "

    def _figures(self, run: Any) -> str:
        tally = run.journal.tally
        if self._tokens is None:
            self._tokens = tally.completion_tokens
        rate = (tally.completion_tokens - self._tokens) / max(time.monotonic() - self._began, 1e-9)
        text = f"{run.throttle.in_flight}/{run.throttle.limit} at once, {count(tally.completion_tokens)} tokens"
        text += f" ({rate:,.0f}/s)"
        if tally.teacher.prices is not None:
            most = run.limits.max_cost
            text += f", ${tally.cost:.3g}" + (f" of ${most:g}" if most is not None else "")
        return text + (f", {run.failed} failed" if run.failed else "")


def count(number: float) -> str:
    """A number with three digits: 950, 12.3k, 4.56M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
