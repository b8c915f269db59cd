"""Keeps every rollout of a training: prompts, completions, scores and steps, as Parquet files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerCallback

from .files import written_whole


FOLDER = "rollouts"
NAME = re.compile(r"step_(\d+)_rank_\d+(?:_\d+)?\.parquet")


class RolloutWriter(TrainerCallback):
    """
    Writes the rollouts of each reward step to a file: `rollouts/step_000012_rank_0.parquet`.

    Each process writes its own. The columns are `prompt` and `completion` as the trainer has them (texts or messages),
    `step` (the generator's step that learns from them first), `dpg_score` (the raw score), and `reward_<name>` for
    each reward, before its weight. A file has its name only when it is whole. [`~datasets.load_dataset`] and `trl sft`
    read the folder.

    A training that goes on from a checkpoint first deletes the files of later steps, so that no step comes twice.
    [`~trl_dpg.restart.RestartCallback`] has moved those of an earlier training aside.

    Args:
        output_dir (`str` or `Path`): The folder of the training.
    """

    def __init__(self, output_dir: str | Path):
        self.folder = Path(output_dir) / FOLDER

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for path in self.folder.glob("step_*"):
                found = NAME.match(path.name)
                if found is not None and int(found[1]) > state.global_step:
                    path.unlink()

    def write(
        self,
        step: int,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        scores: Sequence[float],
        rewards: Mapping[str, Sequence[float]],
    ) -> Path:
        """Write this process's rollouts of a reward step. With several reward steps in a step, each has a file."""
        columns = {"prompt": list(prompts), "completion": list(completions), "step": [step] * len(prompts)}
        columns |= {"dpg_score": list(scores)} | {f"reward_{name}": list(own) for name, own in rewards.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"step_{step:06d}_rank_{PartialState().process_index}"
        names = (f"{stem}{f'_{k}' if k else ''}.parquet" for k in range(10**6))
        path = next(path for path in map(self.folder.joinpath, names) if not path.exists())
        with written_whole(path) as part:
            Dataset.from_dict(columns).to_parquet(part)
        return path
