"""The journal of an attribution: a file with a line for each scored chunk, so that an interrupted run can continue."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..files import append_line, locked, remove_half_line
from ..metagradients.config import SettingsError
from ..provenance import digest as digest
from ..ranks import from_all_ranks
from ..redaction import as_stored


class JournalError(SettingsError):
    """A journal that cannot be used for this run."""


class Journal(AbstractContextManager):
    """
    A JSON Lines file: its layout and the settings, then a record for each finished chunk. Use it as a context manager.

    Entering creates the file. If a file with the same settings exists, the journal continues it. Until the exit, no
    other run can open the journal. In a distributed run, the main process writes the file and all processes read it.

    Args:
        path (`str` or `Path`): The file. A lock file with the suffix `.lock` is created in the same folder.
        settings (`dict[str, Any]`): The settings on which the scores depend.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to delete scores of other settings.

    Attributes:
        settings (`dict[str, Any]`): The settings after conversion to JSON and back, without credentials.
        is_new (`bool`): Whether the file was created on entering.
        layout (`str`): Stands at the beginning of every journal of its kind.
        done (`dict[int, Any]`):
            The chunks that were finished on entering, each with its `metric_before`: a `float`, one for each of
            several metrics by name, or `None`.

    Raises:
        `ValueError`: On entering, if another run has the journal open, if it has scores of other settings, or if the
        file is no journal.
    """

    layout = "trl-dpg attribution 1"
    work, results = "attribution", "scores"  # what messages call them

    def __init__(self, path: str | Path, settings: dict[str, Any], overwrite: bool = False):
        self.path = Path(path)
        self.settings = {"layout": self.layout} | as_stored(settings)
        self.overwrite = overwrite
        self.is_new = False
        self.done: dict[Any, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Journal":
        main = PartialState().is_main_process
        opened = from_all_ranks(lambda: self._open_locked() if main else None, "Opening the journal")
        self.is_new, self.done = opened[0]  # type: ignore[misc]  # the main process is the first
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def _open_locked(self) -> tuple[bool, dict[Any, Any]]:
        """Whether the journal is new, and the chunks that are done."""
        taken = JournalError(f"Another {self.work} is at work on the journal {str(self.path)!r}. Choose another one.")
        with ExitStack() as stack:
            stack.enter_context(locked(self.path.with_suffix(".lock"), taken))
            found = self._open()
            self._stack = stack.pop_all()
        return found

    def _open(self) -> tuple[bool, dict[Any, Any]]:
        self._check_layout()
        remove_half_line(self.path)
        lines = self._lines()
        found = next(lines, None)
        done = dict(map(self.entry, lines))
        if found == self.settings:
            return False, done
        if found is not None and done and not self.overwrite:
            changes = ", ".join(
                f"{name} (was {found.get(name)!r}, is {self.settings.get(name)!r})"
                for name in {**self.settings, **found}
                if self.settings.get(name) != found.get(name)
            )
            raise JournalError(
                f"The journal {str(self.path)!r} has {self.results} of other settings: {changes}. Choose another "
                f"one, or delete these {self.results} with `overwrite`."
            )
        self.path.write_bytes(b"")
        self.append(self.settings)
        return True, {}

    def _check_layout(self) -> None:
        """Refuse a file that is no journal, before anything is written to it."""
        if not self.path.exists():
            return
        start = f'{{"layout": "{self.layout}"'.encode()
        with self.path.open("rb") as file:
            found = file.read(len(start))
        if not start.startswith(found):  # an empty file, or a first line that was cut short, is one
            raise JournalError(f"The file {str(self.path)!r} is not a journal of an {self.work}. Choose another one.")

    @staticmethod
    def entry(record: dict[str, Any]) -> tuple[Any, Any]:
        """A record's key and value in `done`."""
        return record["chunk"], record["metric_before"]

    def append(self, record: dict[str, Any]) -> None:
        """Write a line. It is on the disk when this returns."""
        append_line(self.path, record)

    def chunks(self, number: int) -> Iterator[dict[str, Any]]:
        """The records of the chunks 0 ... `number` - 1, each of them once."""
        seen = set()
        for record in self._lines():
            if record.get("chunk", number) < number and record["chunk"] not in seen:
                seen.add(record["chunk"])
                yield record

    def check_start(self, metric_before: float | Mapping[str, float] | None) -> None:
        """
        Compare the metric of the student before fine-tuning with its value in the chunks done earlier.

        Raises:
            `ValueError`: If the values differ, so the student or the metric has changed.
        """
        earlier = next((value for value in self.done.values() if value is not None), None)
        if earlier is not None and metric_before is not None:
            self.compare(earlier, metric_before)

    def compare(self, earlier: Any, metric_before: float | Mapping[str, float]) -> None:
        """Refuse values of the metric before fine-tuning that are not those of then, see [`Journal.check_start`]."""
        several = isinstance(metric_before, Mapping)
        for name, value in metric_before.items() if isinstance(metric_before, Mapping) else [("", metric_before)]:
            then = earlier.get(name, value) if several else earlier
            if not math.isclose(then, value, rel_tol=1e-3):
                raise JournalError(
                    f"The metric {f'{name!r} ' if several else ''}of the student before fine-tuning is {value:.6g}, "
                    f"but was {then:.6g} when the journal {str(self.path)!r} was written: the student or the metric's "
                    f"data have changed. Choose another journal, or delete the old {self.results} with `overwrite`."
                )

    def _lines(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)
