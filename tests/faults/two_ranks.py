"""A run on two processes that goes on from a save in a generation batch; started by tests/faults/test_restart.py."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from tests.small_runs import dpg_config, make_trainer


def main(folder: Path) -> None:
    ends = []
    for checkpoint in (None, str(folder / "checkpoint-3")):
        args = dpg_config(
            folder,
            max_steps=6,
            per_device_train_batch_size=4,
            steps_per_generation=2,
            num_iterations=2,
            save_strategy="steps",
            save_steps=3,
        )
        trainer = make_trainer(args)
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    if PartialState().is_main_process:
        print("same" if torch.equal(*ends) else f"differ by {(ends[0] - ends[1]).abs().max()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
