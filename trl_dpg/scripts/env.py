"""Versions and devices, for a bug report."""

import sys
from dataclasses import dataclass

from trl import TrlParser


@dataclass
class EnvArguments:
    """`trl-dpg env` takes no arguments."""


def main(script_args: EnvArguments) -> None:
    import torch

    from trl_dpg.environment import environment

    lines = environment()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    lines["devices"] = ", ".join(gpus) or "CPU only"
    lines["CPU threads of torch"] = str(torch.get_num_threads())
    print("\n".join(f"- {name}: {value}" for name, value in lines.items()))


def make_parser(prog: str | None = None) -> TrlParser:
    return TrlParser(EnvArguments, prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("env", make_parser, main, sys.argv[1:])
