"""`trl-dpg <command>`."""

import argparse
import sys
from importlib import import_module

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

    Arguments of `accelerate launch` (and TRL's `--accelerate_config`) may stand among those of `dpg`; it then runs
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
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS, metavar="command")
    command = parser.parse_args(argv[:1]).command
    try:
        script = import_module(f".scripts.{command}", __package__)
    except ModuleNotFoundError as missing:
        if str(missing.name).startswith(__package__):
            raise
        parser.exit(1, f"trl-dpg {command} needs {missing.name}: pip install 'trl-dpg[{command}]'\n")
    parser = script.make_parser(prog=f"trl-dpg {command}")
    try:
        *arguments, from_config, unknown = parser.parse_args_and_config(
            args=argv[1:], return_remaining_strings=True, separate_remaining_strings=True
        )
    except (ValueError, OSError) as error:  # what the arguments' own checks say; no such file
        parser.error(str(error))
    if command == "dpg" and (from_config or unknown):
        _launch(parser, command, argv[1:], from_config, unknown)
        return
    _check_recipe(parser, from_config)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (see trl-dpg {command} --help)")
    try:
        script.main(*arguments)
    except UsageError as error:
        parser.error(str(error))


def _check_recipe(parser: argparse.ArgumentParser, strings: list[str]) -> None:
    """A recipe for `dpg` serves the other commands, too: what only `dpg` reads is left aside, but nothing else is."""
    flags = [string for string in strings if string.startswith("--")]
    if flags:
        known = import_module(".scripts.dpg", __package__).make_parser()._option_string_actions
        strangers = [flag for flag in flags if flag not in known]
        if strangers:
            parser.error(f"the config file has keys that no command knows: {', '.join(strangers)}")


def _launch(
    parser: argparse.ArgumentParser, command: str, argv: list[str], from_config: list[str], unknown: list[str]
) -> None:
    """Run a command under `accelerate launch`; its arguments stand in the config file or on the command line."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    launcher = launch_command_parser()
    known = {*launcher._option_string_actions, "--accelerate_config"}
    both = from_config + unknown  # the command line comes last, and wins
    strangers = [string for string in both if string.split("=")[0] not in known and string.startswith("-")]
    if strangers or not both[0].startswith("-"):
        parser.error(f"unrecognized arguments: {' '.join(both)} (see trl-dpg {command} --help)")
    if "--accelerate_config" in unknown and "--accelerate_config" in from_config:
        place = from_config.index("--accelerate_config")
        both = from_config[:place] + from_config[place + 2 :] + unknown
    try:
        launch_arguments = resolve_accelerate_config_argument(both)
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
    launch_command(launcher.parse_args([*launch_arguments, *module, *mine]))


if __name__ == "__main__":
    main()
