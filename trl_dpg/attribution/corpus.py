"""Distilled scores of a whole dataset, shard by shard. Any number of processes and machines may share the shards."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as pads
from accelerate import PartialState
from datasets import Dataset
from filelock import FileLock, Timeout
from tqdm import tqdm

from ..files import write_json
from ..ranks import from_all_ranks
from .distil import Regressor
from .features import FeatureReader
from .result import Estimates, score_columns, write


ROWS_PER_READ = 2_000
"""Rows that are tokenised, and sorted by length, together."""


@dataclass
class Shards:
    """
    A dataset in shards of consecutive rows. Each is scored as a whole, and written to a file of its own.

    A shard that is done has a note beside its file. While a process works on it, it holds the shard's lock. So all
    processes that see the folder may work on one dataset, and one that is killed leaves its shard to the others.

    Args:
        folder (`Path`): The folder of the shards, with a folder `notes`.
        num_rows (`int`): Rows of the dataset.
        size (`int`): Rows of a shard.
        output_format (`str`): `"parquet"` or `"jsonl"`.
        regressors (`str`): A hash of the regressors. Shards of others are not done.
    """

    folder: Path
    num_rows: int
    size: int
    output_format: str
    regressors: str

    @property
    def number(self) -> int:
        """The number of shards."""
        return -(-self.num_rows // self.size)

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.num_rows))

    def name(self, shard: int) -> str:
        """The name of a shard's file, without its ending."""
        return f"{shard:05}-of-{self.number:05}"

    @property
    def files(self) -> list[Path]:
        """The files of all shards."""
        return [self.folder / f"{self.name(shard)}.{self.output_format}" for shard in range(self.number)]

    def note(self, shard: int) -> Path:
        """The file that says that a shard is done."""
        return self.folder / "notes" / f"{self.name(shard)}.json"

    def notes(self) -> list[dict[str, Any]]:
        """What is noted of the shards that are done."""
        found = (self.noted(shard) for shard in range(self.number))
        return [own for own in found if own is not None]

    def noted(self, shard: int) -> dict[str, Any] | None:
        """What is noted of a shard, if it was done with these regressors."""
        path = self.note(shard)
        found = json.loads(path.read_bytes()) if path.exists() else {}
        return found if found.get("regressors") == self.regressors else None

    @contextmanager
    def next(self) -> Iterator[int | None]:
        """Hold the lock of a shard that is not done, and on which no other process works. `None`: there is none."""
        for shard in range(self.number):
            if self.noted(shard) is not None:
                continue
            lock = FileLock(self.note(shard).with_suffix(".lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                if self.noted(shard) is None:  # another process may have been faster
                    yield shard
                    return
            finally:
                lock.release()
        yield None


def score_shards(
    shards: Shards,
    dataset: Dataset,
    samples: Dataset,
    reader: FeatureReader,
    regressors: Mapping[Any, Regressor],
    exact: Mapping[Any, np.ndarray],
    progress: bool = False,
) -> None:
    """
    Score the shards that are left. Of several processes, each takes one at a time.

    Args:
        shards ([`Shards`]): The shards of the dataset.
        dataset ([`~datasets.Dataset`]): N rows, which are written with their scores.
        samples ([`~datasets.Dataset`]): The same rows as the student reads them.
        reader ([`FeatureReader`]): Reads their features.
        regressors (`Mapping[str, Regressor]`): Regressors by the names of their metrics, or by `None`.
        exact (`Mapping[str, np.ndarray]`): By the same names, exact scores `[N]`, and NaN for the other samples.
        progress (`bool`, *optional*, defaults to `False`): Show a progress bar of this process's own samples.
    """
    numbers = sorted({own.described.num_blocks for own in regressors.values()})
    show = progress and PartialState().is_main_process
    done = sum(note["rows"] for note in shards.notes())
    with tqdm(desc="Distilling", total=shards.num_rows, initial=done, unit="sample", disable=not show, delay=0) as bar:

        def score_next() -> int:
            with shards.next() as shard:
                if shard is None:
                    return 0
                started, rows = time.perf_counter(), shards.rows(shard)
                parts: dict[Any, list[np.ndarray]] = {name: [] for name in regressors}
                for first in range(rows.start, rows.stop, ROWS_PER_READ):
                    piece = samples.select(range(first, min(first + ROWS_PER_READ, rows.stop)))
                    features, counts = reader.read(piece, numbers)
                    for name, regressor in regressors.items():
                        parts[name].append(regressor.predict(features, counts))
                results = {}
                for name, found in parts.items():
                    results[name] = Estimates(np.concatenate(found))
                    results[exact_name(name)] = Estimates(exact[name][rows.start : rows.stop])
                write(results, dataset.select(rows), shards.folder, shards.output_format, None, shards.name(shard))
                seconds = time.perf_counter() - started
                note = {"rows": len(rows), "seconds": seconds, "regressors": shards.regressors}
                write_json(shards.note(shard), note)
                return len(rows)

        scored = [1]
        while any(scored):
            scored = from_all_ranks(score_next, "Distilling a shard")
            bar.update(sum(scored))


def exact_name(name: str | None) -> str:
    """The name of a metric's exact scores beside the distilled ones."""
    return "exact" if name is None else f"{name}_exact"


def read_scores(shards: Shards, name: str | None) -> np.ndarray:
    """The distilled scores `[N]` in the files of all shards."""
    column = score_columns(name)[0]
    file_format = {"parquet": "parquet", "jsonl": "json"}[shards.output_format]
    tables = (pads.dataset(file, format=file_format).to_table(columns=[column]) for file in shards.files)
    return np.concatenate([table[column].to_numpy() for table in tables]).astype(np.float32)
