"""The processes that a command is going to start: how many, and settings that are checked as theirs."""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .usage import UsageError


def accelerate_settings(name: str | None) -> dict[str, Any]:
    """
    What a config of accelerate says.

    Args:
        name (`str` or `None`): A name of TRL's (`multi_gpu`, `zero1`, `zero2`, `zero3`, `fsdp1`, `fsdp2`), or a file
            of `accelerate config`. `None`: no config.
    """
    if name is None:
        return {}
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    try:
        _, path = resolve_accelerate_config_argument(["--accelerate_config", name])
    except ValueError as error:
        raise UsageError(f"--accelerate_config: {error}") from error
    return yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}


def number_of_processes(given: Any, accelerate_config: str | None) -> int:
    """The number that is given or, without one, that of the config of accelerate, or 1."""
    number = str(given or accelerate_settings(accelerate_config).get("num_processes"))
    return int(number) if number.isdecimal() else 1  # accelerate refuses what is no number


def processes_to_start(argv: Sequence[str], recipe: Mapping[str, Any]) -> int:
    """The processes that a command is going to start: 1 if it is one of them itself."""
    if "RANK" in os.environ:
        return 1
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", nargs="?", default=recipe.get("num_processes"))
    parser.add_argument("--accelerate_config", nargs="?", default=recipe.get("accelerate_config"))
    return number_of_processes(*vars(parser.parse_known_args(argv)[0]).values())


@contextmanager
def batches_of(number: int) -> Iterator[None]:
    """Context in which a trainer's arguments are checked as those of one of several processes."""
    if number < 2:
        yield
        return
    from transformers import TrainingArguments

    usual = TrainingArguments.world_size
    TrainingArguments.world_size = property(lambda self: number)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        TrainingArguments.world_size = usual  # type: ignore[method-assign]
