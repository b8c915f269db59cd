"""Versions and devices, for logs and bug reports."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


PACKAGES = (
    "trl-dpg",
    "trl",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "tokenizers",
    "numpy",
    "wandb",
    "vllm",
    "lm-eval",
    "sentence-transformers",
)


def environment() -> dict[str, str]:
    """The versions of the packages that a run's numbers may depend on."""
    versions = {"platform": platform.platform(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def device_name(device: "torch.device") -> str:
    """The model of a GPU, or the type of any other device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
