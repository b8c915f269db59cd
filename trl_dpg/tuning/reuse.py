"""A choice that is written to a file, so that a resumed run does not choose anew."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers.utils import logging

from ..files import write_json
from ..metagradients import InnerLoopConfig
from ..metagradients.config import MEMORY_ONLY
from ..metrics.base import metric_name
from ..ranks import from_all_ranks
from ..redaction import redacted
from ..student import Examples, FinetunedStudent, Student
from .search import Tuning, tune
from .trials import Trial


logger = logging.get_logger(__name__)


def tune_together(
    student: Student,
    examples: Examples,
    metric: Callable[[FinetunedStudent], Tensor],
    config: InnerLoopConfig,
    path: str | Path | None = None,
    data: dict[str, Any] | None = None,
) -> Tuning:
    """
    [`tune`], with a progress bar, its evidence in the log, and the result in a file.

    If the file has a choice for the same student, metric, inner loop and data, that is returned, and nothing is
    measured. In a distributed run, every process calls this. The first one works, the others wait for it, and all
    return its result.

    Args:
        student (`Student`), examples (`list` or [`~datasets.Dataset`]), metric (`Callable`), config
            (`InnerLoopConfig`): See [`tune`].
        path (`str` or `Path`, *optional*):
            The file, JSON.
        data (`dict[str, Any]`, *optional*):
            What a choice in the file depends on, beside the above, e.g. a digest of the samples. Values that JSON can
            hold. Without it, other samples and another benchmark of the same kind of metric do not matter, as in a
            training that is resumed.
    """

    def choose() -> Tuning | None:
        if not PartialState().is_main_process:
            return None
        return _tune_or_reuse(student, examples, metric, config, path, data)

    return from_all_ranks(choose, "Choosing the inner loop's numbers")[0]  # type: ignore[return-value]


class Choice:
    """
    The choice of a training's `"auto"` values: made on its first batch, and the same from then on.

    An evaluation before the first training step makes a choice for evaluations only, which is not written. All
    processes call the methods.

    Args:
        path (`str` or `Path`, *optional*): The file of the training's choice, JSON.

    Attributes:
        tuning ([`Tuning`] or `None`): The last choice.
        training (`bool`): Whether the samples are of training steps. The trainer sets it to `False` in evaluation.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = path
        self.tuning: Tuning | None = None
        self.training = True
        self._given: InnerLoopConfig | None = None  # of the training, while an evaluation's choice is in its place

    def begin(self, student: Student, metric, config: InnerLoopConfig, resumed: bool) -> InnerLoopConfig:
        """
        The inner loop at the start of a training. A resumed training takes the choice in the file, if there is one for
        its set-up. A new training that is going to choose removes the file.
        """
        config, self._given = self._given or config, None
        if not config.auto or self.path is None:
            return config
        path, main = Path(self.path), PartialState().is_main_process

        def read() -> Tuning | None:
            if main and not resumed:
                path.unlink(missing_ok=True)
            return read_choice(path, dependencies(student, metric, config, data=None)) if main and resumed else None

        found = from_all_ranks(read, "Reading the choice of the inner loop's numbers")[0]
        if found is None:
            return config
        self.tuning = found
        return found.apply(config)

    def make(self, student: Student, examples: Examples, metric, config: InnerLoopConfig, prepare) -> InnerLoopConfig:
        """
        The inner loop with numbers.

        Args:
            student (`Student`), examples (`list`), metric (`Callable`), config (`InnerLoopConfig`): See [`tune`].
            prepare (`Callable`): Called without arguments before the student is used, on the process that works.
        """
        if self.training and self._given is not None:
            config, self._given = self._given, None
        if not config.auto:
            return config

        def choose() -> Tuning | None:
            if not PartialState().is_main_process:
                return None
            prepare()
            return _tune_or_reuse(student, examples, metric, config, self.path, writes=self.training)

        self.tuning = from_all_ranks(choose, "Choosing the inner loop's numbers")[0]
        self._given = None if self.training else config
        return self.tuning.apply(config)  # type: ignore[union-attr]  # the main process is the first


def _tune_or_reuse(student, examples, metric, config, path, data=None, writes: bool = True) -> Tuning:
    settings = dependencies(student, metric, config, data)
    found = None if path is None else read_choice(path, settings)
    if found is not None:
        logger.warning(f"From {path}: {found.choice()}")
        return found

    def write(result: Tuning) -> None:
        if path is not None and writes:
            write_figures(path, result, settings)

    result = tune(student, examples, metric, config, progress=True, on_trial=write)
    logger.warning(f"The inner loop's numbers:\n{result.render()}")
    return result


def write_figures(path: str | Path, result: Tuning, settings: dict[str, Any], **further) -> None:
    """Write a result, and what it depends on, such that the file is whole at any time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, further | result.figures() | {"complete": bool(result.chosen), "settings": settings})


def read_choice(path: str | Path, settings: dict[str, Any]) -> Tuning | None:
    """The result in a file, if there is one that is complete and depends on the same."""
    if not Path(path).exists():
        return None
    written = json.loads(Path(path).read_text(encoding="utf-8"))
    return _as_tuning(written) if written.get("complete") and written.get("settings") == settings else None


def read_figures(path: str | Path) -> Tuning:
    """The result in a file."""
    return _as_tuning(json.loads(Path(path).read_text(encoding="utf-8")))


def _as_tuning(figures: dict[str, Any]) -> Tuning:
    trials: list[Any] = [
        Trial(**{name: math.nan if value is None else value for name, value in trial.items()})  # type: ignore[arg-type]
        for trial in figures["trials"]
    ]
    names = ("chosen", "passes", "reward_steps", "seconds", "found")
    return Tuning(trials=trials, **{name: figures[name] for name in names})


def dependencies(
    student: Student, metric, config: InnerLoopConfig, data: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What a choice depends on. The samples are in it only if `data` has them."""
    inner_loop = {name: value for name, value in asdict(config).items() if name not in MEMORY_ONLY}
    settings = {"student": student.describe(), "metric": metric_name(metric), "inner_loop": inner_loop}
    return redacted(json.loads(json.dumps(settings if data is None else settings | {"data": data})))
