"""Loads models and tokenizers. A damaged file is named, whatever the library that reads it says."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.integrations import deepspeed


def load_pretrained(kind: Any, path: str, what: str, **kwargs: Any) -> Any:
    """
    `kind.from_pretrained(path, **kwargs)`.

    Args:
        kind (`type`): A class such as [`~transformers.AutoTokenizer`].
        path (`str`): Path or Hub id.
        what (`str`): What is loaded, for the message: `"the student's tokenizer"`.

    Raises:
        `ValueError`: If a file cannot be read.
    """
    try:
        return kind.from_pretrained(path, **kwargs)
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise  # they say what is missing
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, JSONDecodeError):
            raise
        raise ValueError(
            f"{what[0].upper()}{what[1:]} in {path!r} could not be read ({type(error).__name__}: {error}). Is a file "
            "damaged? Copy or download the model again."
        ) from error


@contextmanager
def loading_whole() -> Iterator[None]:
    """
    Context in which `from_pretrained` gives every process all of a model's weights.

    The settings that shard the generator hold for the whole process: under DeepSpeed ZeRO-3, `from_pretrained` keeps a
    part of the weights, and under FSDP with `cpu_ram_efficient_loading` only the first process of a node has all. The
    context sets both aside.
    """
    zero3 = deepspeed._hf_deepspeed_config_weak_ref
    fsdp = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3
        if fsdp is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = fsdp


def check_weights(path: str) -> None:
    """
    Refuse a local model with a damaged file of weights, before it is loaded. Only the files' headers are read.

    Raises:
        `ValueError`: If there is one.
    """
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"the weights {file.name!r} are damaged or not complete ({error}). Copy or download the model again."
            ) from error
