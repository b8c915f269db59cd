"""The set-up of a run, in values that JSON can hold: what must be the same when a run goes on from a checkpoint."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

import torch
from datasets import Dataset

from .callbacks import run_config
from .config import DPGConfig
from .metagradients.config import MEMORY_ONLY
from .metrics.base import Metric, metric_name
from .redaction import as_stored
from .reward import DPGReward


FREE = (
    # where and how often something is written
    "disable_tqdm",
    "hub_",
    "log_",
    "logging_",
    "num_completions_to_print",
    "num_logged_samples",
    "output_dir",
    "project",
    "push_to_hub",
    "report_to",
    "run_name",
    "save_",
    "trackio_",
    "verify_steps",
    # the length of the run, and how it goes on
    "accept_changed_setup",
    "max_steps",
    "num_train_epochs",
    "restore_callback_states_from_checkpoint",
    "resume_from_checkpoint",
    # where it runs: the number of processes is compared apart
    "dataloader_",
    "ddp_",
    "local_rank",
    "skip_memory_metrics",
    "vllm_server_",
)
"""Settings that may change when a run goes on, by the beginnings of their names."""
OF_THE_STUDENT = (
    "student_aggregation",
    "student_bnb_",
    "student_load_",
    "student_lora_",
    "student_model",
    "student_text",
    "student_use_",
)
"""The other settings of the student are those of the inner loop, which is compared as the numbers that it uses."""
NUM_ROWS, NUM_ELEMENTS = 1000, 64
DEFAULTS = {own.name: own.default for own in fields(DPGConfig)}


def run_setup(trainer, reward: DPGReward | None, further: dict[str, Any]) -> dict[str, Any]:
    """
    The set-up of a run.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The trainer.
        reward ([`DPGReward`], *optional*): Its DPG reward.
        further (`dict[str, Any]`): Settings that the trainer does not know, such as the arguments of a script.
    """
    described = run_config(trainer.args, reward) if reward is not None else {}
    settings = described.get("settings") or json.loads(trainer.args.to_json_string())
    setup: dict[str, Any] = {
        "settings": {name: value for name, value in settings.items() if _is_fixed(name)},
        "further": {name: value for name, value in further.items() if _is_fixed(name)},
        "run": {
            "processes": trainer.args.world_size,
            "data": dataset_digest(trainer.train_dataset),
            "generator's frozen weights": _frozen_weights(trainer),
        },
    }
    if reward is not None:
        own = reward_setup(reward)
        setup["run"] |= {"metric": own["metric"], "student": own["student"], "student's weights": own["weights"]}
        if reward.replay is not None:
            replay = reward.replay
            described_rows = f"{dataset_digest(replay.rows)}, {replay.ratio:g} for each sample, seed {replay.seed}"
            setup["run"]["replayed rows"] = described_rows
        setup["inner loop"] = own["inner_loop"]
    return as_stored(setup)


def reward_setup(reward: DPGReward) -> dict[str, Any]:
    """What makes scores what they are: `metric`, `student`, its `weights`, and `inner_loop`. Of a server, its own."""
    described = reward.described()
    if reward.client is not None:
        return {name: reward.client.known[name] for name in ("metric", "student", "weights", "inner_loop")}
    inner_loop = asdict(reward.inner_loop_config)
    return {
        "metric": metric_setup(reward.metric),
        "student": described["student"],
        "weights": digest(named for student in reward.students for named in student.model.named_parameters()),
        "inner_loop": {name: value for name, value in inner_loop.items() if name not in MEMORY_ONLY},
    }


def metric_setup(metric: Any) -> str:
    """The name of a metric, and a short name of its settings and data."""
    return f"{metric_name(metric)}, {_short(json.dumps(_content(metric), default=str))}"


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """
    What is different in two set-ups. An `"auto"` of the inner loop stands for the number that was chosen. A setting
    that an earlier version did not have had its default.
    """
    found = []
    for part in now.keys() & then.keys():
        defaults = DEFAULTS if part == "settings" else {}
        for name in {**then[part], **now[part]}:
            was, own = then[part].get(name, defaults.get(name)), now[part].get(name)
            if was != own and not (part == "inner loop" and own == "auto"):
                found.append(f"{name} (was {was!r}, is {own!r})")
    return found


def digest(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A short name of a model's weights, from some elements of each. A fine-tuning changes it."""
    found = hashlib.sha256()
    for name, parameter in parameters:
        flat = parameter.data.flatten()
        some = flat[:: max(1, flat.numel() // NUM_ELEMENTS)].cpu().contiguous()
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        found.update(some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _frozen_weights(trainer) -> str | None:
    """A short name of the generator's frozen weights. With FSDP and DeepSpeed, a process has only parts of them."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    weights = trainer.model.named_parameters()
    return digest((name, own) for name, own in weights if not own.requires_grad and "lora_" not in name)


def _content(value: Any) -> Any:
    """What makes a metric of this package what it is. Of other objects, only their type is known."""
    if isinstance(value, Metric):
        return {name: _content(own) for name, own in vars(value).items() if not name.startswith("_") and own != {}}
    if isinstance(value, torch.Tensor):
        return digest([("", value)])
    if isinstance(value, Dataset):
        return dataset_digest(value)
    if isinstance(value, list | tuple):
        return [_content(own) for own in value]
    return value if isinstance(value, str | int | float | dict | None) else type(value).__name__


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def dataset_digest(dataset: Any) -> str:
    """A short name of a dataset, from its number of rows and some of them. Streams are not compared."""
    if isinstance(dataset, list):
        return f"{len(dataset)} rows, {_short(json.dumps(dataset, default=str))}"
    if not isinstance(dataset, Dataset):
        return "a stream"
    rows = range(0, len(dataset), max(1, len(dataset) // NUM_ROWS))
    some = dataset.with_format("arrow")[list(rows)].to_pylist()
    return f"{len(dataset)} rows, {_short(json.dumps(some, default=str))}"


def _is_fixed(name: str) -> bool:
    of_the_inner_loop = name.startswith("student_") and not name.startswith(OF_THE_STUDENT)
    return not name.startswith(FREE) and not of_the_inner_loop and name not in ("attribution", "per_token")
