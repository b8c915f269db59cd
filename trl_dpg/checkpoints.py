"""Checkpoints that are whole. The file that lists what is in one is written last, so a half-written one has none."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .files import write_json


logger = logging.get_logger(__name__)

MANIFEST = "dpg_checkpoint.json"
LOG, SETTINGS = "dpg_log.jsonl", "dpg_config.json"
OF_A_RUN = (LOG, SETTINGS, "summary.json", "rollouts", "manifest.json", "manifest_rows.npz")
"""Files that belong to one training. Its checkpoints do, too."""


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    """Where the trainer writes the checkpoint of a step."""
    return Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The checkpoints in a folder by their steps, the first step first."""
    found = {path.name.rpartition("-")[2]: path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int)}


def mark_whole(folder: Path, setup: dict[str, Any], model_only: bool = False) -> None:
    """
    Declare a checkpoint whole. All ranks have written their files before.

    Args:
        folder (`Path`): The checkpoint.
        setup (`dict`): The set-up of the run, which must be the same when it goes on.
        model_only (`bool`, *optional*, defaults to `False`): Whether it has no optimizer and no random states.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    write_json(folder / MANIFEST, {"layout": 1, "model_only": model_only, "files": files, "setup": setup})


def why_not_whole(folder: str | Path) -> str | None:
    """Why a checkpoint is not whole, or `None` if it is."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files, model_only = manifest["files"], manifest["model_only"]
    except OSError:
        return f"it has no {MANIFEST}, so its writing was interrupted, or another trainer or version wrote it"
    except (ValueError, KeyError):
        return f"its {MANIFEST} cannot be read"
    if model_only:
        return "it has only the model (save_only_model)"
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        return f"files are missing: {', '.join(missing)}"
    other = [name for name, size in files.items() if (folder / name).stat().st_size != size]
    return f"files have another size than when they were written: {', '.join(other)}" if other else None


def newest_whole(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint in a folder, or `None`. Newer ones that are not whole are named in a warning."""
    for folder in reversed(checkpoints(output_dir).values()):
        reason = why_not_whole(folder)
        if reason is None:
            return folder
        logger.warning(f"{str(folder)!r} is skipped: {reason}.")
    return None


def setup_of(folder: str | Path) -> dict[str, Any]:
    """The set-up of the run that wrote a checkpoint."""
    return json.loads(Path(folder, MANIFEST).read_bytes())["setup"]


def put_aside(output_dir: str | Path, step: int) -> Path | None:
    """
    Move what is in the way of a training that goes on from a step: the checkpoints after it. At step 0, a new training
    begins, and the log, the settings, the figures and the rollouts of an earlier one are moved as well.

    They are moved to `<output_dir>/_earlier-1`, or `_earlier-2` and so on: `push_to_hub` leaves out names that begin
    with `_`. A checkpoint after the step whose writing stopped before its `trainer_state.json` is removed.

    Returns:
        `Path` or `None`: The folder to which something was moved.
    """
    later = [folder for found, folder in checkpoints(output_dir).items() if found > step]
    broken = [folder for folder in later if step and not (folder / TRAINER_STATE_NAME).is_file()]
    for folder in broken:
        logger.warning(f"{str(folder)!r} is removed: it has no {TRAINER_STATE_NAME}, so its writing was interrupted.")
        shutil.rmtree(folder)
    moved = [folder for folder in later if folder not in broken]
    if step == 0:
        left = [path for name in OF_A_RUN if (path := Path(output_dir, name)).exists()]
        if moved or any(map(_is_of_a_training, left)):
            moved += left
    if not moved:
        return None
    number = 1
    while Path(output_dir, f"_earlier-{number}").exists():
        number += 1
    aside = Path(output_dir, f"_earlier-{number}")
    aside.mkdir()
    for path in moved:
        path.rename(aside / path.name)
    what = f"from after step {step}" if step else "of an earlier training"
    logger.warning(f"{str(output_dir)!r} has files {what}. They were moved to {str(aside)!r}.")
    return aside


def _is_of_a_training(path: Path) -> bool:
    """Whether a training left more than its settings, and a log more than evaluations before the training."""
    if path.name != LOG:
        return path.name != SETTINGS
    with path.open("rb") as file:
        return any(line.endswith(b"\n") and json.loads(line)["step"] > 0 for line in file)
