"""Versions and devices, for a bug report."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from trl import TrlParser


PACKAGES = (
    *("trl-dpg", "trl", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers"),
    *("numpy", "wandb", "vllm", "lm-eval", "sentence-transformers", "zxing-cpp"),
)


@dataclass
class EnvArguments:
    """`trl-dpg env` takes no arguments."""


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main(script_args: EnvArguments) -> None:
    import torch

    lines = {"platform": platform.platform(), "python": platform.python_version()}
    lines |= {package: installed(package) for package in PACKAGES}
    lines["devices"] = (
        ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) or "CPU only"
    )
    lines["CPU threads of torch"] = str(torch.get_num_threads())
    print("\n".join(f"- {name}: {value}" for name, value in lines.items()))


def make_parser(prog: str | None = None) -> TrlParser:
    return TrlParser(EnvArguments, prog=prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
