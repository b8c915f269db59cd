"""A reward on the ranks of a process group, for the check `two_ranks` of `gpu.py`."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from tests.small_runs import CONFIG, METRIC, PROMPTS, TEXTS, make_student
from trl_dpg import DPGReward


def rank_scores(device: str) -> torch.Tensor:
    """The scores of all texts, of which each rank brings its own."""
    state = PartialState(cpu=device == "cpu")
    share = len(TEXTS) // state.num_processes
    mine = slice(share * state.process_index, share * (state.process_index + 1))
    reward = DPGReward(make_student(), METRIC, CONFIG)
    reward(PROMPTS[mine], TEXTS[mine])
    return reward.last_batch.scores


if __name__ == "__main__":
    device, path = sys.argv[1:]
    scores = rank_scores(device)
    if PartialState().is_main_process:
        Path(path).write_text(json.dumps(scores.tolist()))
    PartialState().destroy_process_group()
