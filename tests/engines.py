"""A run and its restart under each engine, over gloo on a CPU; started on two ranks by tests/test_engines.py."""

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import DistributedType, PartialState
from accelerate.commands.launch import launch_command, launch_command_parser
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from tests.small_runs import dpg_config, make_trainer
from trl_dpg.run_setup import digest


def main(folder: Path, name: str) -> None:
    """
    Run under an accelerate config of TRL. The launcher's environment is used, but no further process is started.

    The generator of a `name` such as `fsdp2-lora` has adapters.
    """
    engine = name.partition("-")[0]
    flags = ["--num_processes", "2", "--mixed_precision", "no"]
    arguments = resolve_accelerate_config_argument(["--accelerate_config", engine, *flags, str(folder)])
    with patch("torch.distributed.run.run", lambda _: train_and_restart(folder, name)):
        launch_command(launch_command_parser().parse_args(arguments))


def train_and_restart(folder: Path, name: str) -> None:
    """Three steps, of which the third is made again from the checkpoint of the second."""
    rank, (engine, _, adapters) = int(os.environ["RANK"]), name.partition("-")
    with ExitStack() as stack:
        if engine != "multi_gpu":
            for mocked in as_if_on_gpus():
                stack.enter_context(mocked)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

        def train(checkpoint=None):
            args = dpg_config(
                folder / name,
                max_steps=3,
                per_device_train_batch_size=8,
                learning_rate=1e-3,
                use_cpu=engine == "multi_gpu",
                save_strategy="steps",
                save_steps=2,
            )
            names = dict(model=str(folder / "generator"), student=str(folder / "student"))
            trainer = make_trainer(args, student_peft_config=lora, peft_config=lora if adapters else None, **names)
            trainer.train(resume_from_checkpoint=checkpoint)
            return trainer

        trainer = train()
        kind = trainer.accelerator.distributed_type.name  # the next training resets it
        parameters = list(trainer.model.parameters())
        results = {
            "kind": kind,
            "sharded": sum(isinstance(own, DTensor) or hasattr(own, "ds_id") for own in parameters) / len(parameters),
            "trained": sorted({"lora" in own for own, p in trainer.model.named_parameters() if p.requires_grad}),
            "student": digest(trainer.dpg_reward.student.model.named_parameters()),
            "buffers": [float(own.double().sum()) for own in trainer.dpg_reward.student.model.buffers()],
            "logs": logs(trainer),
            "restarted": logs(train(str(folder / name / "checkpoint-2"))),
            "scores": trainer.dpg_reward.last_batch.scores.tolist(),
        }
    (folder / f"{name}-{rank}.json").write_text(json.dumps(results))


def logs(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "dpg/metric_after" in log]


def as_if_on_gpus():
    """On a CPU, accelerate starts neither FSDP nor DeepSpeed. It does if it believes that gloo joins GPUs."""
    kind = DistributedType.MULTI_GPU
    yield patch.object(PartialState, "_prepare_backend", lambda *args: ("gloo", kind))
    yield patch.object(PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu")))
    yield patch("torch.accelerator.is_available", lambda: True)  # else DPGConfig sets `use_cpu`


if __name__ == "__main__":
    for name in sys.argv[2:]:
        main(Path(sys.argv[1]), name)
