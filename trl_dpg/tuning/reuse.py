"""A choice that is written to a file, so that a resumed run does not choose anew."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers.utils import logging

from ..metagradients import InnerLoopConfig
from ..metagradients.config import MEMORY_ONLY
from ..ranks import from_all_ranks
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
) -> Tuning:
    """
    [`tune`], with a progress bar, its evidence in the log, and the result in a file.

    If the file has a choice for the same student, metric and inner loop, that is returned, and nothing is measured. In
    a distributed run, every process calls this; the first one works, and all return its result.

    Args:
        student (`Student`), examples (`list` or [`~datasets.Dataset`]), metric (`Callable`), config
            (`InnerLoopConfig`): See [`tune`].
        path (`str` or `Path`, *optional*):
            The file, JSON.
    """

    def choose() -> Tuning | None:
        return _tune_or_reuse(student, examples, metric, config, path) if PartialState().is_main_process else None

    return from_all_ranks(choose, "Choosing the inner loop's numbers")[0]  # type: ignore[return-value]


def _tune_or_reuse(student, examples, metric, config: InnerLoopConfig, path: str | Path | None) -> Tuning:
    settings = _settings(student, metric, config)
    if path is not None and Path(path).exists():
        written = json.loads(Path(path).read_text(encoding="utf-8"))
        if written["complete"] and written["settings"] == settings:
            result = read_figures(path)
            logger.warning(f"From {path}: {result.choice()}")
            return result

    def write(result: Tuning) -> None:
        if path is not None:
            write_figures(Path(path), result, settings)

    result = tune(student, examples, metric, config, progress=True, on_trial=write)
    logger.warning(f"The inner loop's numbers:\n{result.render()}")
    return result


def write_figures(path: Path, result: Tuning, settings: dict[str, Any]) -> None:
    """Write a result such that the file is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp")
    figures = result.figures() | {"complete": bool(result.chosen), "settings": settings}
    beside.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    os.replace(beside, path)


def read_figures(path: str | Path) -> Tuning:
    """The result in a file."""
    figures = json.loads(Path(path).read_text(encoding="utf-8"))
    trials: list[Any] = [
        Trial(**{name: math.nan if value is None else value for name, value in trial.items()})  # type: ignore[arg-type]
        for trial in figures["trials"]
    ]
    names = ("chosen", "passes", "reward_steps", "seconds", "found")
    return Tuning(trials=trials, **{name: figures[name] for name in names})


def _settings(student: Student, metric, config: InnerLoopConfig) -> dict[str, Any]:
    """What a choice depends on, beside the samples."""
    inner_loop = {name: value for name, value in asdict(config).items() if name not in MEMORY_ONLY}
    name = getattr(metric, "__name__", type(metric).__name__)
    return json.loads(json.dumps({"student": student.describe(), "metric": name, "inner_loop": inner_loop}))
