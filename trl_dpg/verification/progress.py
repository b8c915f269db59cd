"""The progress display of `verify` and `tune`."""

from tqdm import tqdm


class Progress:
    """
    A bar over passes of the model (a forward pass, or a backward pass), with what is being measured and the time left.

    Args:
        name (`str`): What the bar is called.
        total (`int`): Passes, at most.
        show (`bool`): Whether to draw it.

    Attributes:
        passes (`int`): Passes so far. A batch of the metric counts as much as the student's samples.
    """

    def __init__(self, name: str, total: int, show: bool):
        self.name = name
        self.passes = 0
        self._bar = tqdm(desc=name, total=total, unit="pass", disable=not show, smoothing=0.1, dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.total = self._bar.n  # what was not needed is not missing
        self._bar.close()

    def measuring(self, what: str) -> None:
        """Show what is being measured."""
        self._bar.set_description(f"{self.name}: {what}")

    def done(self, passes: int) -> None:
        """Count passes that are done."""
        self.passes += passes
        self._bar.update(passes)
