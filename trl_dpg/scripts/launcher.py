"""Runs a command: parses its arguments, and starts it in this process or under `accelerate launch`."""

import argparse
import difflib
import re
from collections.abc import Callable

from trl import TrlParser
from yaml import YAMLError

from ..redaction import redacted_text
from .arguments import make_recipe_parser
from .config_file import check_config_file
from .errors import explained
from .help import show_help
from .planned_processes import batches_of, processes_to_start


def run(
    command: str,
    make_parser: Callable[..., TrlParser],
    main: Callable[..., object],
    argv: list[str],
    may_launch: bool = False,
) -> None:
    """
    Run a command in this process or, if it has arguments of `accelerate launch`, under accelerate.

    Errors end as `errors` says: with exit status 2 for wrong usage, and 1 otherwise.

    Args:
        command (`str`): Its name; `trl_dpg.scripts.<command>` is its module.
        make_parser (`Callable`): Makes the parser of its arguments.
        main (`Callable`): The command. It takes the parsed arguments.
        argv (`list[str]`): The arguments.
        may_launch (`bool`, *optional*, defaults to `False`): Whether arguments of `accelerate launch` are allowed.
    """
    parser = make_parser(prog=f"trl-dpg {command}")
    parser.usage = parser.usage or "%(prog)s [--config recipe.yaml] [--argument value ...]"
    parser.allow_abbrev = False  # --student_lr must not be read as --student_lr_scheduler_type
    show_help(parser, command, main, argv)
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if argv[-1:] == ["--config"]:
        parser.error("argument --config: expected one argument")
    try:
        recipe = check_config_file(parser, argv)
        with batches_of(processes_to_start(argv, recipe)):
            *arguments, from_config, unknown = parser.parse_args_and_config(
                args=argv, return_remaining_strings=True, separate_remaining_strings=True
            )
    except (OSError, YAMLError) as error:
        parser.error(f"--config: {error}")
    except ValueError as error:  # from the checks of the arguments
        parser.error(redacted_text(str(error)))
    if unknown and not may_launch:
        parser.error(_unrecognized(parser, unknown))
    launch_arguments = _for_accelerate(parser, from_config, unknown) if from_config or unknown else []
    if launch_arguments and may_launch:
        _launch(parser, command, argv, unknown, launch_arguments)
        return
    with explained(parser):
        main(*arguments)


def _for_accelerate(parser: argparse.ArgumentParser, from_config: list[str], unknown: list[str]) -> list[str]:
    """
    The arguments of `accelerate launch` among those that the command does not know.

    A recipe for `dpg` may be given to the other commands, too. Keys that only `dpg` reads are ignored. Other unknown
    arguments are wrong usage.
    """
    from accelerate.commands.launch import launch_command_parser

    accelerates = launch_command_parser()._option_string_actions
    recipes = make_recipe_parser()._option_string_actions
    found: dict[str, list[str]] = {}  # the command line comes last and overrides the config file
    for strings, others, message in (
        (from_config, recipes, "the config file has keys that no command knows"),
        (unknown, {}, "unrecognized arguments"),
    ):
        strangers = []
        for flag, values in _by_flag(strings):
            if flag == "--datasets":
                parser.error("the recipe's mixture (datasets) is for `trl-dpg dpg` only. Give --dataset_name.")
            if flag in others:
                continue
            action = accelerates.get(flag)
            if flag != "--accelerate_config" and action is None:
                strangers += [flag, *values]
            elif action is not None and action.nargs == 0:  # a switch, `true` in YAML
                if values not in ([], ["True"], ["False"]):
                    strangers += values
                elif values != ["False"]:
                    found[flag] = []
            else:
                strangers += values[1:]
                found[flag] = values[:1]
        if strangers:
            parser.error(_unrecognized(parser, strangers, message))
    return [string for flag, values in found.items() for string in (flag, *values)]


def _unrecognized(parser: argparse.ArgumentParser, strings: list[str], message: str = "unrecognized arguments") -> str:
    """What is said of arguments that are not known: the flags that are nearest to them."""
    known = [flag for flag in parser._option_string_actions if flag.startswith("--") and "-" not in flag[2:]]
    near: dict[str, None] = {}
    for flag, _ in _by_flag(strings):
        name = flag[2:].replace("-", "_")
        if flag.startswith("--") and name:
            # Beginnings and initials of words: student_lr may stand for student_learning_rate
            words = "".join(f"{re.escape(letter)}(?:[a-z]*_)?" for letter in name)
            found = [option for option in known if re.match(words, option[2:])]
            near |= dict.fromkeys(found[:4] or difflib.get_close_matches(f"--{name}", known, n=3))
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{message}: {' '.join(strings)} (see {parser.prog} --help).{hint}"


def _by_flag(strings: list[str]) -> list[tuple[str, list[str]]]:
    """Flags with their values. A string before the first flag counts as a flag without values."""
    groups: list[tuple[str, list[str]]] = []
    for string in strings:
        if string.startswith("--") or not groups:
            flag, *value = string.split("=", 1)
            groups.append((flag, value))
        else:
            groups[-1][1].append(string)
    return groups


def _launch(
    parser: argparse.ArgumentParser, command: str, argv: list[str], unknown: list[str], launch_arguments: list[str]
) -> None:
    """
    Run a command under `accelerate launch`, with its own arguments of the command line.

    TRL's `launch_training_script` runs files of `trl/scripts` only, so it cannot be used here.
    """
    from accelerate.commands.launch import launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from .processes import start_and_wait

    try:
        launch_arguments = resolve_accelerate_config_argument(launch_arguments)
    except ValueError as error:
        parser.error(str(error))
    left = iter(unknown)
    mine, skip = [], next(left, None)
    for string in argv:
        if string == skip:
            skip = next(left, None)
        else:
            mine.append(string)
    module = ["--module", f"{__package__}.{command}"]
    arguments = launch_command_parser().parse_args([*launch_arguments, *module, *mine])
    _check_processes(parser, arguments)
    start_and_wait(arguments, parser.prog, " and --resume_from_checkpoint auto" if command == "dpg" else "")


def _check_processes(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """
    Have accelerate start as many processes as `num_processes` says.

    On a machine without several GPUs, it would start a single one and say nothing.
    """
    import torch

    kinds = ("multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")
    number = arguments.num_processes or 1
    if number < 2 or arguments.config_file is not None or any(vars(arguments)[kind] for kind in kinds):
        return
    if not torch.accelerator.is_available():
        arguments.cpu, arguments.multi_gpu = False, True  # accelerate's name for several processes
        return
    if arguments.cpu:
        parser.error(f"--num_processes {number} with --cpu would start a single process. Leave out one of them.")
    if torch.accelerator.device_count() < 2:
        parser.error(
            f"--num_processes {number}, but this machine has 1 {torch.accelerator.current_accelerator()} device. Use "
            "--num_processes 1."
        )
