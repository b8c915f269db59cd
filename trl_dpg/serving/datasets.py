"""Datasets in the making: samples that arrive in parts, until a dataset is complete and has its scores."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ..redaction import redacted_text
from ..score_limits import Limits
from ..scored_batch import ScoredDataset
from .requests import Refused, ScoreRequest, bytes_of, digest


Id = int | str
OVERHEAD = 200
"""Bytes that a sample counts beside those of its text."""


class Dataset:
    """
    One dataset, from its first sample on.

    Attributes:
        name (`str`): Its name.
        size (`int`): Samples that it has when it is complete.
        stream (`str` or `None`): The stream of which it is a part.
        state (`str`): `"collecting"`, `"waiting"` (with all samples), `"running"`, `"done"` or `"failed"`.
        held (`int`): Bytes of its samples, and some more for what each of them needs beside its text.
        digests (`dict`): Short names of the samples that have arrived, by their ids.
        scored (`ScoredDataset` or `None`): The result.
        refused (`Refused` or `None`): Why there is no result.
    """

    def __init__(self, name: str, size: int, stream: str | None, now: float):
        self.name, self.size, self.stream = name, size, stream
        self.state = "collecting"
        self.examples: dict[Id, Any] = {}
        self.digests: dict[Id, str] = {}
        self.changed = now  # when the last sample came, or the end
        self.scored: ScoredDataset | None = None
        self.refused: Refused | None = None
        self.job: Future[ScoredDataset] | None = None
        self.ended = asyncio.Event()
        self.places: dict[Id, int] = {}
        self.held = 0

    def end(self, now: float, scored: ScoredDataset | None = None, refused: Refused | None = None) -> None:
        self.scored, self.refused, self.job = scored, refused, None  # an error's traceback holds the student's states
        self.state, self.changed, self.examples, self.held = "done" if refused is None else "failed", now, {}, 0
        self.ended.set()


class Datasets:
    """
    All datasets of a server. A dataset is scored when its last sample arrives, in the order of its ids.

    Its methods are called in one event loop. None of them waits before it has changed what it changes.

    Args:
        submit (`Callable`): Has a list of samples scored, see [`Engine.submit`].
        limits (`Limits`): How many, and for how long.
        clock (`Callable`, *optional*): Seconds.
    """

    def __init__(
        self,
        submit: "Callable[[list[Any]], Future[ScoredDataset]]",
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._submit, self._limits, self._clock = submit, limits, clock
        self._datasets: dict[str, Dataset] = {}
        self._cuts = 0  # datasets that were cut from streams

    def in_state(self, *states: str) -> list[Dataset]:
        """The datasets in one of these states, oldest first."""
        for dataset in self._datasets.values():
            if dataset.state == "waiting" and dataset.job is not None and dataset.job.running():
                dataset.state = "running"
        return [dataset for dataset in self._datasets.values() if dataset.state in states]

    def take(self, request: ScoreRequest) -> Dataset:
        """
        Take the samples of a request. Those that have arrived before are not taken twice.

        Raises:
            `Refused`: If they contradict what is there, or if there are too many.
        """
        self._tidy()
        examples = request.examples(self._limits)
        digests = {name: digest(example) for name, example in examples.items()}
        dataset = self._dataset(request, digests)
        if dataset.size != (request.size or len(examples)):
            raise Refused(409, f"Dataset {dataset.name!r} has the size {dataset.size}, not {request.size}.")
        new = [name for name in examples if name not in dataset.digests]
        changed = [name for name in examples if dataset.digests.get(name, digests[name]) != digests[name]]
        if changed:
            raise Refused(409, f"Sample {changed[0]!r} of dataset {dataset.name!r} was sent before with another text.")
        if new and dataset.state != "collecting":
            raise Refused(409, f"Dataset {dataset.name!r} is complete, or given up, without sample {new[0]!r}.")
        room = dataset.size - len(dataset.digests)
        if len(new) > room:
            raise Refused(
                409,
                f"{len(new)} new samples, but dataset {dataset.name!r} of {dataset.size} has room for {room}. The "
                "parts must add up to its size.",
            )
        complete = bool(new) and len(new) == room
        held = sum(bytes_of(examples[name]) + OVERHEAD for name in new)
        self._check_room(held, complete)
        self._datasets[dataset.name] = dataset
        dataset.examples |= {name: examples[name] for name in new}
        dataset.digests |= {name: digests[name] for name in new}
        dataset.held += held
        if new:
            dataset.changed = self._clock()
        if complete:
            self._start(dataset)
        return dataset

    async def wait(self, dataset: Dataset, seconds: float) -> bool:
        """Wait for the end of a dataset. Returns whether it has ended."""
        if dataset.state == "collecting":
            seconds = min(seconds, max(0.0, dataset.changed + self._limits.dataset_timeout - self._clock()) + 0.01)
        try:
            await asyncio.wait_for(dataset.ended.wait(), seconds)
        except TimeoutError:
            self._tidy()
        return dataset.ended.is_set()

    def _dataset(self, request: ScoreRequest, digests: dict[Id, str]) -> Dataset:
        """The dataset of a request. A new one is not among the others yet."""
        size, now = request.size or len(digests), self._clock()
        if request.stream is None:
            name = request.dataset or f"#{digest(sorted((str(key), own) for key, own in digests.items()))}"
            return self._datasets.get(name) or Dataset(name, size, None, now)
        own = [dataset for dataset in self._datasets.values() if dataset.stream == request.stream]
        found = [dataset for dataset in own if not dataset.digests.keys().isdisjoint(digests)]
        found = found or [dataset for dataset in own if dataset.state == "collecting"]
        if found:
            return found[-1]
        self._cuts += 1
        return Dataset(f"{request.stream}#{self._cuts}", size, request.stream, now)

    def forget(self, dataset: Dataset) -> None:
        """Forget a dataset without a name that has failed: its only client has the message, and may try again."""
        if dataset.name.startswith("#"):
            self._datasets.pop(dataset.name, None)

    def _check_room(self, size: int, complete: bool) -> None:
        held = sum(dataset.held for dataset in self.in_state("collecting", "waiting", "running"))
        if size and held + size > self._limits.max_held_bytes:
            raise Refused(503, "The datasets that are not finished fill the server's memory.", retry_after=5)
        if complete and len(self.in_state("waiting", "running")) > self._limits.max_waiting:
            raise Refused(503, f"{self._limits.max_waiting} datasets wait for their turn already.", retry_after=5)

    def _start(self, dataset: Dataset) -> None:
        """Have a complete dataset scored."""
        names = sorted(dataset.examples, key=lambda name: (isinstance(name, str), name))
        dataset.places = {name: place for place, name in enumerate(names)}
        dataset.job = self._submit([dataset.examples[name] for name in names])
        dataset.state, loop = "waiting", asyncio.get_running_loop()

        def finish(job: "Future[ScoredDataset]") -> None:
            error, now = job.exception(), self._clock()
            if error is None:
                dataset.end(now, scored=job.result())
            else:
                text = " ".join([str(error), *getattr(error, "__notes__", [])])
                reason = redacted_text(f"Dataset {dataset.name!r} could not be scored. {text}")
                dataset.end(now, refused=Refused(500, reason))

        dataset.job.add_done_callback(lambda job: loop.call_soon_threadsafe(finish, job))

    def _tidy(self) -> None:
        """Give up datasets that never became complete, and forget those that ended long ago."""
        now = self._clock()
        for dataset in self.in_state("collecting"):
            if now - dataset.changed >= self._limits.dataset_timeout:
                reason = (
                    f"Dataset {dataset.name!r} was given up: {len(dataset.digests)} of its {dataset.size} samples "
                    f"came, and none in the last {self._limits.dataset_timeout:g} s. Send it under another name."
                )
                dataset.end(now, refused=Refused(410, reason))
        for dataset in self.in_state("done", "failed"):
            if now - dataset.changed >= self._limits.keep:
                del self._datasets[dataset.name]
