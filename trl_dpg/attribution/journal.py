"""The journal of an attribution: a file with a line for each scored chunk, so that an interrupted run can continue."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout


class Journal(AbstractContextManager):
    """
    A JSON Lines file: the settings, then a record for each finished chunk. Use it as a context manager.

    Entering creates the file. If a file with the same settings exists, the journal continues it. Until the exit, no
    other run can open the journal. In a distributed run, the main process writes the file and all processes read it.

    Args:
        path (`str` or `Path`): The file. A lock file with the suffix `.lock` is created in the same folder.
        settings (`dict[str, Any]`): The settings on which the scores depend.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to delete scores of other settings.

    Attributes:
        settings (`dict[str, Any]`): The settings after conversion to JSON and back.
        is_new (`bool`): Whether the file was created on entering.
        done (`dict[int, float | None]`): The chunks that were finished on entering, each with its `metric_before`.

    Raises:
        `ValueError`: On entering, if another run has the journal open, or if it has scores of other settings.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], overwrite: bool = False):
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings, default=str))
        self.overwrite = overwrite
        self.is_new = False
        self.done: dict[int, float | None] = {}
        self._lock = FileLock(self.path.with_suffix(".lock"))

    def __enter__(self) -> "Journal":
        state = PartialState()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if state.is_main_process:
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise ValueError(
                    f"Another attribution is at work in `output_dir` {str(self.path.parent)!r}. Choose another folder."
                ) from error
        try:
            with state.main_process_first():
                self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self._lock.release()

    def _open(self) -> None:
        self.path.touch()
        with self.path.open("rb+") as file:  # remove an incomplete last line
            file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
        lines = self._lines()
        found = next(lines, None)
        done = {line["chunk"]: line["metric_before"] for line in lines}
        if found == self.settings:
            self.done = done
            return
        if found is not None and done and not self.overwrite:
            changes = ", ".join(
                f"{name} (was {found.get(name)!r}, is {self.settings.get(name)!r})"
                for name in {**self.settings, **found}
                if self.settings.get(name) != found.get(name)
            )
            raise ValueError(
                f"`output_dir` {str(self.path.parent)!r} has scores of other settings: {changes}. Choose another "
                "folder, or delete these scores with `overwrite`."
            )
        self.is_new = True
        self.path.write_bytes(b"")
        self.append(self.settings)

    def append(self, record: dict[str, Any]) -> None:
        """Write a line. It is on the disk when this returns."""
        with self.path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def chunks(self, number: int) -> Iterator[dict[str, Any]]:
        """The records of the chunks 0 ... `number` - 1, each of them once."""
        seen = set()
        for record in self._lines():
            if record.get("chunk", number) < number and record["chunk"] not in seen:
                seen.add(record["chunk"])
                yield record

    def check_start(self, metric_before: float | None) -> None:
        """
        Compare the metric of the student before fine-tuning with its value in the chunks done earlier.

        Raises:
            `ValueError`: If the values differ, so the student or the metric has changed.
        """
        earlier = next((value for value in self.done.values() if value is not None), None)
        if None not in (earlier, metric_before) and not math.isclose(earlier, metric_before, rel_tol=1e-3):  # type: ignore
            raise ValueError(
                f"The metric of the student before fine-tuning is {metric_before:.6g}, but was {earlier:.6g} in the "
                f"earlier run in `output_dir` {str(self.path.parent)!r}: the student or the metric's data have "
                "changed. Choose another folder, or delete the old scores with `overwrite`."
            )

    def _lines(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)
