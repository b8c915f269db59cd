"""`trl-dpg <command>`."""

import argparse
import sys
from importlib import import_module
from subprocess import CalledProcessError

from yaml import YAMLError

from . import __version__
from .scripts.arguments import UsageError


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
    parser.usage = "%(prog)s [--config recipe.yaml] [--argument value ...]"
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if argv[-1:] == ["--config"]:
        parser.error("argument --config: expected one argument")
    try:
        *arguments, from_config, unknown = parser.parse_args_and_config(
            args=argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except (OSError, YAMLError) as error:
        parser.error(f"--config: {error}")
    except ValueError as error:  # what the arguments' own checks say
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

    accelerates = launch_command_parser()._option_string_actions
    recipes = import_module(".scripts.dpg", __package__).make_parser()._option_string_actions
    found: dict[str, list[str]] = {}  # the command line comes last, and wins
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
            elif action is not None and action.nargs == 0:  # a switch, which is `true` in YAML
                if values not in ([], ["True"], ["False"]):
                    strangers += values
                elif values != ["False"]:
                    found[flag] = []
            else:
                strangers += values[1:]
                found[flag] = values[:1]
        if strangers:
            parser.error(f"{message}: {' '.join(strangers)} (see {parser.prog} --help)")
    return [string for flag, values in found.items() for string in (flag, *values)]


def _by_flag(strings: list[str]) -> list[tuple[str, list[str]]]:
    """Flags with their values. What stands before the first flag is one without values."""
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
    """Run a command under `accelerate launch`, with what is its own of the command line."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
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
    try:
        launch_command(launch_command_parser().parse_args([*launch_arguments, *module, *mine]))
    except CalledProcessError as error:  # one process
        sys.exit(error.returncode)
    except ChildFailedError as error:  # several; what went wrong is on the screen already
        sys.exit(error.get_first_failure()[1].exitcode)


if __name__ == "__main__":
    main()
