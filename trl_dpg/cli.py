"""`trl-dpg <command>`."""

import argparse
import sys
from importlib import import_module

from . import __version__


COMMANDS = {
    "dpg": "Train a generator by Dataset Policy Gradients.",
    "attribute": "Score the samples of a dataset by their effect on a metric.",
    "generate": "Sample a synthetic dataset from a trained generator.",
    "teach": "Sample a dataset from a strong model behind an OpenAI-compatible API.",
    "audit": "Look for effects of a dataset that its texts do not say, and for the rows behind them.",
    "evaluate": "Compare datasets by fresh students that SFTTrainer fine-tunes on them.",
    "serve": "Serve a student over HTTP, for the rewards of any trainer.",
    "verify": "Test whether the scores of a set-up can be trusted.",
    "memory": "Predict the memory of a training, and say what to change if it does not fit.",
    "tune": "Choose the student's learning rate and eps_root.",
    "lengths": "Report the lengths of a dataset's reasoning, and fit targets to them.",
    "mix": "Choose samples with the lengths of a target, and mix datasets.",
    "report": "Make an HTML report of a run.",
    "check": "Compare the files of a folder with their manifest, row by row.",
    "quickstart": "Try the method on tiny models, without a network; with --real, on SmolLM2.",
    "metrics": "List the metrics and their arguments.",
    "rewards": "List the further rewards and their arguments.",
    "env": "Print versions and devices, for a bug report.",
}


def main(argv: list[str] | None = None) -> None:
    """
    Run a command. Each command is a module of `trl_dpg.scripts` with `make_parser` and `main`.

    A command's arguments may include those of `accelerate launch`, and TRL's `--accelerate_config`. The command then
    runs under accelerate. The exit status is 2 for wrong usage, and 1 for any other error; `audit` ends
    with 3 if it found something.
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
    Run a command in this process; with `may_launch`, under accelerate if it has arguments of `accelerate launch`.

    Args:
        command (`str`): One of `COMMANDS`.
        argv (`list[str]`): Its arguments.
        may_launch (`bool`, *optional*, defaults to `False`): Whether arguments of `accelerate launch` are allowed.
    """
    from .scripts import launcher

    script = import_module(f".scripts.{command}", __package__)
    launcher.run(command, script.make_parser, script.main, argv, may_launch)


if __name__ == "__main__":
    main()
