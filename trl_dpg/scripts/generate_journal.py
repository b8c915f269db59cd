"""The journal of `trl-dpg generate`: a line for each finished batch, so that a run that was killed goes on."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..files import append_line, locked, remove_half_line
from ..ranks import from_all_ranks
from ..redaction import as_stored
from .usage import UsageError


LAYOUT = "trl-dpg generate 2"
"""Stands at the beginning of every journal."""


class SampleJournal(AbstractContextManager):
    """
    A JSON Lines file: its layout and the settings, then the texts of each finished batch. Use it as a context manager.

    The main process writes the file. Until the exit, no other command can open it.

    Args:
        path (`Path`): The file. A lock file is made beside it.
        settings (`dict[str, Any]`): What the texts depend on.
        overwrite (`bool`): Whether to delete texts of other settings.

    Attributes:
        texts (`dict[int, list[str]]`): The texts of the batches that are done, by their number; on all processes.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False):
        self.path = path
        self.settings = {"layout": LAYOUT} | as_stored(settings)
        self.overwrite = overwrite
        self.texts: dict[int, list[str]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "SampleJournal":
        main = PartialState().is_main_process
        opened = from_all_ranks(lambda: self._open() if main else None, "Opening the journal")
        self.texts = opened[0] or {}
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def _open(self) -> dict[int, list[str]]:
        folder = str(self.path.parent)
        taken = UsageError(f"--output_dir: another `generate` writes to {folder!r}. Choose another folder.")
        with ExitStack() as stack:
            stack.enter_context(locked(self.path.with_suffix(".lock"), taken))
            remove_half_line(self.path)
            lines = self._lines()
            found = next(lines, None)
            texts = {line["batch"]: line["texts"] for line in lines} if found == self.settings else {}
            if found is not None and found != self.settings and not self.overwrite:
                changed = [name for name in self.settings if found.get(name) != self.settings[name]]
                raise UsageError(
                    f"--output_dir: {folder!r} has texts of a `generate` that was stopped, with other settings "
                    f"({', '.join(changed)}). Give its settings to go on, set --overwrite, or choose another folder."
                )
            if found != self.settings:
                self.path.write_bytes(b"")
                append_line(self.path, self.settings)
            self._stack = stack.pop_all()
        return texts

    def _lines(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for line in file:
                yield json.loads(line)

    def store(self, batches: dict[int, list[str]]) -> None:
        """Keep the texts of finished batches. They are on the disk when this returns."""
        if PartialState().is_main_process:
            for batch, texts in batches.items():
                append_line(self.path, {"batch": batch, "texts": texts})
        self.texts |= batches

    def remove(self) -> None:
        """Delete the journal, when the dataset is written. Called on the main process."""
        self.path.unlink()
        self.path.with_suffix(".lock").unlink(missing_ok=True)
