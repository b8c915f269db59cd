"""`--help` of a command: the arguments one needs. `--help all` has all of them, `--help WORD` those with a word."""

import argparse
import itertools
import sys
from collections.abc import Callable

from trl import TrlParser


STUDENT = [
    "student_model_name_or_path",
    "student_use_peft",
    "student_load_in_4bit",
    "student_batch_size",
    "student_learning_rate",
    "student_eps_root",
    "student_max_length",
]
METRIC = ["metric", "metric_kwargs"]
GENERATOR = ["model_name_or_path", "max_completion_length", "temperature"]
FIRST: dict[str, dict[str, list[str]]] = {
    "dpg": {
        "run": ["output_dir", "dataset_name", "prompt_template", "max_steps", "resume_from_checkpoint"],
        "generator": [
            "model_name_or_path",
            "use_peft",
            "learning_rate",
            "per_device_train_batch_size",
            "num_generations",
            "max_completion_length",
        ],
        "student": STUDENT,
        "metric": METRIC,
    },
    "attribute": {
        "run": ["output_dir", "dataset_name", "dataset_text_field", "keep_top", "num_repeats", "overwrite"],
        "large datasets": ["distill", "distill_samples", "distill_blocks", "distill_floor"],
        "student": [*STUDENT, "student_models", "replay_dataset"],
        "metric": [*METRIC, "metrics", "contrast"],
    },
    "audit": {
        "run": ["dataset_name", "control", "wanted", "num_parts", "alpha", "output_dir", "overwrite"],
        "student": [*STUDENT, "other_student_model_name_or_path"],
        "panel": ["metrics", "default_panel"],
    },
    "evaluate": {
        "run": ["datasets", "num_samples", "seeds", "output_dir"],
        "student": [*STUDENT, "student_models", "replay_dataset"],
        "metric": METRIC,
    },
    "serve": {
        "server": ["host", "port", "token_file", "max_samples", "dataset_timeout"],
        "student": STUDENT,
        "metric": METRIC,
    },
    "verify": {
        "run": ["dataset_name", "num_samples", "num_directions", "output_dir"],
        "generator, if the dataset has prompts": GENERATOR,
        "student": STUDENT,
        "metric": METRIC,
    },
    "generate": {
        "run": ["output_dir", "dataset_name", "prompt_template", "num_samples", "overwrite", "hub_dataset_id"],
        "generator": [*GENERATOR, "use_vllm"],
    },
    "memory": {
        "plan": ["memory", "num_processes", "accelerate_config", "prompt_tokens", "device_type", "json_file"],
        "generator": ["model_name_or_path", "use_peft", "per_device_train_batch_size", "max_completion_length"],
        "student": [*STUDENT, "student_micro_batch_size", "student_memory_budget"],
        "metric": METRIC,
    },
    "teach": {
        "teacher": ["preset", "base_url", "model", "api_key_env", "request_parameters", "max_completion_length"],
        "prompts": ["dataset_name", "prompt_template", "num_samples", "output_dir"],
        "limits": ["max_concurrency", "max_requests_per_minute", "max_tokens_per_minute", "max_cost", "prices"],
        "result": ["student_model_name_or_path", "verifier", "answer_column", "sft_finish_reasons"],
    },
}
"""The arguments that `--help` of a command leads with, in groups. The other commands show all of theirs."""


WORDS = {
    "output_dir": "Folder for the trained generator, its logs and figures.",
    "dataset_name": "The prompts: a Hub id, or a file (json, jsonl, parquet, csv, txt).",
    "max_steps": "Number of training steps.",
    "resume_from_checkpoint": "A checkpoint to go on from, or 'auto' for the newest whole one in output_dir.",
    "model_name_or_path": "The generator's path or Hub id.",
    "use_peft": "Train LoRA adapters of the generator instead of all its parameters.",
    "learning_rate": "The generator's peak learning rate. Short runs need more, e.g. 1e-3 for 40 steps of LoRA.",
    "per_device_train_batch_size": "Completions that a device takes at once.",
    "num_generations": "Completions of each prompt.",
    "max_completion_length": "Longest completion, in tokens.",
}
"""What `trl-dpg dpg --help` says of TRL's arguments, in fewer words than TRL."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """One name for each argument. It may also be written with hyphens, and argparse would list both."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = next((option for option in action.option_strings if option.startswith("--")), None)
        if name is None:
            return super()._format_action_invocation(action)
        kind = "true|false" if action.const is True else "VALUE"
        values = "" if action.nargs == 0 else self._format_args(action, kind)
        return f"{name} {values}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def show_help(parser: TrlParser, command: str, main: Callable[..., object], argv: list[str]) -> None:
    """
    Print the help of a command and end, if its arguments ask for it.

    `--help` lists the arguments one needs, `--help all` and `--help_all` all of them, and `--help WORD` those with a
    word in their names.
    """
    parser.formatter_class = _Formatter
    parser.description = (sys.modules[main.__module__].__doc__ or "").strip().split("\n\n")[0]
    word = _wanted(argv)
    if word is None:
        return
    groups = FIRST.get(command, {})
    if word == "all" or not (word or groups):
        parser.print_help()
        parser.exit()
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions[1:]:  # the first is --help
        actions.setdefault(action.dest, action)  # --no_evaluate comes after --evaluate
    if word:
        groups = {f"arguments with {word!r}": [name for name in actions if word in name]}
        if not any(groups.values()):
            parser.error(f"--help {word}: no argument has {word!r} in its name. --help all lists all of them.")
    for name in WORDS if command == "dpg" and not word else ():
        actions[name].help = WORDS[name]
    formatter = _Formatter(parser.prog, max_help_position=38)
    formatter.add_usage(parser.usage, parser._actions, [])
    formatter.add_text(parser.description)
    for title, names in groups.items():
        formatter.start_section(title)
        formatter.add_arguments([actions[name] for name in names])
        formatter.end_section()
    formatter.add_text(
        f"Shown: {sum(map(len, groups.values()))} of {len(actions)} arguments. `{parser.prog} --help all` lists all "
        "of them, `--help WORD` those with a word in their names. Each is also a key of a recipe, the YAML file that "
        "--config names."
    )
    print(formatter.format_help(), end="")
    parser.exit()


def _wanted(argv: list[str]) -> str | None:
    """The word after `--help`, `"all"` for `--help_all`, `""` for `--help` alone. `None` without a call for help."""
    for flag, word in itertools.pairwise([*argv, ""]):
        if flag in ("--help_all", "--help-all"):
            return "all"
        if flag in ("-h", "--help"):
            return "" if word.startswith("-") and not word.strip("-") else word.lstrip("-").replace("-", "_")
    return None
