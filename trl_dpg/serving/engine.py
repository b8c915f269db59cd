"""Scores datasets one at a time, on all processes together."""

import queue
from concurrent.futures import Future
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..reward import DPGReward
from ..scored_batch import ScoredDataset, as_samples


class Engine:
    """
    Scores datasets in the order in which they are submitted.

    Every process calls [`run`]. The main process takes the jobs and sends each to the others, so that all run the same
    collective operations in the same order. An error on any process is the end of that job on all of them.

    Args:
        reward (`DPGReward`):
            Student, metric and inner loop.
        heartbeat (`float`, *optional*, defaults to `10.0`):
            Seconds after which the main process tells the others that there is no job, so that they do not run into
            the timeout of a collective operation.
    """

    def __init__(self, reward: DPGReward, heartbeat: float = 10.0):
        self.reward = reward
        self.heartbeat = heartbeat
        self._jobs: queue.SimpleQueue[tuple[Any, Future | None]] = queue.SimpleQueue()

    def submit(self, examples: list[Any]) -> "Future[ScoredDataset]":
        """Have the samples scored as one dataset. On the main process, from any thread."""
        future: Future[ScoredDataset] = Future()
        self._jobs.put((examples, future))
        return future

    def stop(self) -> None:
        """End [`run`] on all processes, after the jobs that were submitted before."""
        self._jobs.put(("stop", None))

    def run(self) -> None:
        """Do the jobs, until [`stop`] is called. On every process, at the same time."""
        while True:
            job, future = self._next()
            (job,) = broadcast_object_list([job])
            if job == "stop":
                return
            if job is None:
                continue
            if future is not None:
                future.set_running_or_notify_cancel()
            try:
                (scored,) = self.reward.score([as_samples(job)])
            except Exception as error:
                if future is not None:
                    future.set_exception(error)
                if isinstance(error, torch.AcceleratorError):  # nothing works on this device any more
                    raise
                continue
            if future is not None:
                future.set_result(scored)

    def _next(self) -> tuple[Any, Future | None]:
        """The next job on the main process; nothing on the others, or while there is none."""
        if not PartialState().is_main_process:
            return None, None
        try:
            return self._jobs.get(timeout=self.heartbeat)
        except queue.Empty:
            return None, None
