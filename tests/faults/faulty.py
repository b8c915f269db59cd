"""
A reward whose module breaks the process that imports it.

`TRL_DPG_TEST_FAULT="<rank> <phase> <call> <signal>"` sends a signal to this rank in a phase of a training, when one of
its calls begins. The time is written to `<phase>.txt` in the folder `TRL_DPG_TEST_FOLDER`.
"""

import os
import time
from pathlib import Path

from trl import GRPOTrainer

from trl_dpg import DPGReward, restart


PHASES = {
    "generation": (GRPOTrainer, "_generate"),
    "reward": (DPGReward, "__call__"),
    "update": (GRPOTrainer, "compute_loss"),
    "saving": (restart, "save_file"),
}


def nothing(completions, **kwargs):
    return [0.0] * len(completions)


def break_down(rank: str, phase: str, call: str, number: str) -> None:
    if rank != os.environ["RANK"]:
        return
    owner, name = PHASES[phase]
    whole, calls = getattr(owner, name), []

    def broken(*arguments, **kwargs):
        calls.append(name)
        if len(calls) == int(call):
            Path(os.environ["TRL_DPG_TEST_FOLDER"], f"{phase}.txt").write_text(str(time.time()))
            os.kill(os.getpid(), int(number))
        return whole(*arguments, **kwargs)

    setattr(owner, name, broken)


if "TRL_DPG_TEST_FAULT" in os.environ:
    break_down(*os.environ["TRL_DPG_TEST_FAULT"].split())
