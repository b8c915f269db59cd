"""The old import path of `arguments`, `data`, `registry` and `toy_world`."""

from ..rows import FILE_FORMATS, FORMATS
from .arguments import (
    DTYPES,
    METRICS,
    REWARDS,
    WORLDS,
    CommandArguments,
    GeneratorArguments,
    MetricArguments,
    PromptArguments,
    ToyWorldArguments,
    UsageError,
    at_least,
    from_json,
)
from .data import (
    check_model,
    check_student,
    load_data,
    make_folder,
    make_prompts,
    one_process,
    process_state,
)
from .registry import call_with, language_modeling, lm_eval, make_metric, make_rewards, resolve
from .toy_world import make_world, toy_world, world_folder


__all__ = [
    "DTYPES",
    "FILE_FORMATS",
    "FORMATS",
    "METRICS",
    "REWARDS",
    "WORLDS",
    "CommandArguments",
    "GeneratorArguments",
    "MetricArguments",
    "PromptArguments",
    "ToyWorldArguments",
    "UsageError",
    "at_least",
    "call_with",
    "check_model",
    "check_student",
    "from_json",
    "language_modeling",
    "lm_eval",
    "load_data",
    "make_folder",
    "make_metric",
    "make_prompts",
    "make_rewards",
    "make_world",
    "one_process",
    "process_state",
    "resolve",
    "toy_world",
    "world_folder",
]
