"""Reads the files that a run writes to its output folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..callbacks import CONFIG_NAME, LOG_NAME, pictures
from ..redaction import redacted


logger = logging.get_logger(__name__)


@dataclass
class Run:
    """
    The contents of a run's files. `config`, `summary` and `state` are empty if their file does not exist.

    Attributes:
        name (`str`): The folder's name.
        lines (`list[dict]`): The lines of `dpg_log.jsonl`.
        scored (`list[dict]`): The lines that training wrote and that have scores.
        config (`dict`): `dpg_config.json`.
        summary (`dict`): `summary.json`.
        state (`dict`): `trainer_state.json`, of the folder or of the last checkpoint.
        last_logged (`datetime`): When `dpg_log.jsonl` was last written to.
    """

    name: str
    lines: list[dict[str, Any]]
    scored: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    state: dict[str, Any]
    last_logged: datetime

    def series(self, name: str, mode: str) -> dict[int, float]:
        """The values of a scalar by step, in `"train"` or `"eval"` mode."""
        key = f"eval_{name}" if mode == "eval" else name
        return {line["step"]: line["scalars"][key] for line in self.lines if key in line["scalars"]}


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """
    Read the folders of a run, or of several that differ in their seeds.

    Raises:
        `ValueError`: If there is a folder without a readable log, or if the runs have different metrics.
    """
    runs = [read_run(Path(folder)) for folder in folders]
    shown = [set(pictures(run.scored[-1]["readout"])) for run in runs]
    if any(names != shown[0] for names in shown):
        raise ValueError("These are runs of different metrics. Make one report for each metric.")
    return runs


def read_run(folder: Path) -> Run:
    """
    Read the folder of a run. The run may be unfinished.

    Raises:
        `ValueError`: If there is no log, or if it cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}.")
    log = folder / LOG_NAME
    if not log.exists():
        near = sorted(str(path.parent) for path in folder.glob(f"*/{LOG_NAME}"))
        hint = f"Did you mean {', '.join(near)}?" if near else "Give the output_dir of a DPGTrainer."
        raise ValueError(f"{str(folder)!r} has no {LOG_NAME}. {hint}")
    lines = []
    for number, line in enumerate(log.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"Line {number} of {str(log)!r} is not JSON ({error}). Remove it.") from error
    scored = [line for line in lines if line["mode"] == "train" and "histogram" in line]
    if not scored:
        raise ValueError(f"No step has been logged in {str(log)!r} yet. Wait, or lower logging_steps.")
    checkpoints = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    states = [path for path in (folder / "trainer_state.json", *reversed(checkpoints)) if path.exists()]

    return Run(
        name=folder.resolve().name,
        lines=lines,
        scored=scored,
        config=redacted(_read(folder / CONFIG_NAME)),  # also of earlier versions, which wrote credentials
        summary=_read(folder / "summary.json"),
        state=_read(states[0]) if states else {},
        last_logged=datetime.fromtimestamp(log.stat().st_mtime),
    )


def _read(path: Path) -> dict[str, Any]:
    """A file of figures. One that does not exist or was half-written when the run was killed has none."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        logger.warning(f"{str(path)!r} is left out: it is not JSON ({error}).")
        return {}


def spread(items: list, number: int) -> list:
    """At most `number` evenly spaced items, among them the first and the last."""
    chosen = np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)
    return [items[index] for index in chosen]
