"""`trl-dpg <command>`."""

import argparse
import sys
from importlib import import_module
from itertools import groupby

from yaml import YAMLError

from . import __version__
from .scripts.utils import UsageError


COMMANDS = {
    "dpg": "Train a generator by Dataset Policy Gradients.",
    "attribute": "Score the samples of a dataset by what they do for a metric.",
    "generate": "Sample a synthetic dataset from a trained generator.",
    "evaluate": "Fine-tune fresh students by SFTTrainer on datasets and compare their metric.",
    "verify": "Can the scores of a set-up be trusted?",
    "report": "Make an HTML report of a run.",
    "quickstart": "Try the method on tiny models made on the spot.",
    "env": "Print versions and devices, for a bug report.",
}


def main(argv: list[str] | None = None) -> None:
    """
    Run a command; each is a module of `trl_dpg.scripts` with `make_parser` and `main`.

    Arguments of `accelerate launch` (and TRL's `--accelerate_config`) may stand among those of a command; it then runs
    under accelerate. Wrong usage ends with exit status 2, anything else that fails with 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    listing = "\n".join(f"  {name:12} {summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="trl-dpg",
        usage="trl-dpg <command> [<args>]",
        epilog=f"commands:\n{listing}\n\n`trl-dpg <command> --help` lists a command's arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trl-dpg {__version__}")
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS, metavar="command")
    run(parser.parse_args(argv[:1]).command, argv[1:], may_launch=True)


def run(command: str, argv: list[str], may_launch: bool = False) -> None:
    """
    Run a command in this process; with `may_launch`, under accelerate, if there are arguments for it.

    Args:
        command (`str`): One of `COMMANDS`.
        argv (`list[str]`): Its arguments.
        may_launch (`bool`, *optional*, defaults to `False`): Whether accelerate's may be among them.
    """
    script = import_module(f".scripts.{command}", __package__)
    parser = script.make_parser(prog=f"trl-dpg {command}")
    if argv[-1:] == ["--config"]:
        parser.error("argument --config: expected one argument")
    try:
        *arguments, from_config, unknown = parser.parse_args_and_config(
            args=argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except (ValueError, OSError, YAMLError) as error:  # what the arguments' own checks say; no such file
        parser.error(str(error))
    if unknown and not may_launch:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (see {parser.prog} --help)")
    launch_arguments = _for_accelerate(parser, from_config, unknown) if from_config or unknown else []
    if launch_arguments and may_launch:
        _launch(parser, command, argv, unknown, launch_arguments)
        return
    try:
        script.main(*arguments)
    except UsageError as error:
        parser.error(str(error))


def _for_accelerate(parser: argparse.ArgumentParser, from_config: list[str], unknown: list[str]) -> list[str]:
    """
    The arguments of `accelerate launch` among those that the command does not know, the command line's last.

    A recipe for `dpg` serves the other commands, too: what only `dpg` reads is left aside. Nothing else is.
    """
    from accelerate.commands.launch import launch_command_parser

    accelerates = {*launch_command_parser()._option_string_actions, "--accelerate_config"}
    recipes = import_module(".scripts.dpg", __package__).make_parser()._option_string_actions
    found: list[str] = []
    for strings, others, message in (
        (from_config, recipes, "the config file has keys that no command knows"),
        (unknown, {}, "unrecognized arguments"),
    ):
        flags = _by_flag(strings)
        strangers = [flag for flag, _ in flags if flag not in accelerates and flag not in others]
        if strangers:
            parser.error(f"{message}: {' '.join(strangers)} (see {parser.prog} --help)")
        for flag, values in flags:
            if flag not in others:
                if flag == "--accelerate_config" and flag in found:  # the command line's comes last, and wins
                    place = found.index(flag)
                    del found[place : place + 2]
                found += values
    return found


def _by_flag(strings: list[str]) -> list[tuple[str, list[str]]]:
    """Flags with their values; each group is as it stands on a command line."""
    numbers, number = [], 0
    for string in strings:
        number += string.startswith("--")
        numbers.append(number)
    groups = [
        [s for s, _ in group] for _, group in groupby(zip(strings, numbers, strict=True), key=lambda pair: pair[1])
    ]
    return [(group[0].split("=")[0], group) for group in groups]


def _launch(
    parser: argparse.ArgumentParser, command: str, argv: list[str], unknown: list[str], launch_arguments: list[str]
) -> None:
    """Run a command under `accelerate launch`, with what is its own of the command line."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

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
    module = ["--module", f"{__package__}.scripts.{command}"]
    launch_command(launch_command_parser().parse_args([*launch_arguments, *module, *mine]))


if __name__ == "__main__":
    main()
