"""`trl-dpg <command>`."""

import argparse
import sys
from importlib import import_module


COMMANDS = {
    "dpg": "Train a generator by Dataset Policy Gradients.",
    "quickstart": "Try the method on tiny models made on the spot.",
}


def main(argv: list[str] | None = None) -> None:
    """Run a command; each is a module of `trl_dpg.scripts` with `make_parser` and `main`."""
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
        parser.exit(1, f"trl-dpg {command} needs {missing.name}: pip install 'trl-dpg[{command}]'\n")
    parser = script.make_parser(prog=f"trl-dpg {command}")
    *arguments, unknown = parser.parse_args_and_config(args=argv[1:], return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (see trl-dpg {command} --help)")
    script.main(*arguments)


if __name__ == "__main__":
    main()
