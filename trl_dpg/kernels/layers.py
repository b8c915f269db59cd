"""
Replaces RMSNorm layers and rotary embeddings of transformers by one operation each, whose derivatives take fewer
elementwise passes, and keeps DeepSpeed's linear layer out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .rotary import lean_rotary


@contextmanager
def lean_layers(model: nn.Module) -> Iterator[None]:
    """
    Context in which RMSNorm layers call `rms_norm`, which [`TwiceDifferentiable`] replaces, and in which rotary
    embeddings are one operation. The results are the same up to rounding.

    DeepSpeed ZeRO-3 replaces `torch.nn.functional.linear` in the whole process by its own function, which the sweeps
    do not know. In the context, it is torch's own.

    In transformers, every model family has its own RMSNorm. Most of them compute the same. Those that do not (Gemma's)
    are not changed.
    """
    forwards: dict[Any, Callable] = {}
    alike: dict[type, bool] = {}
    layer: Any
    for layer in model.modules():
        kind = type(layer)
        if kind.__name__.endswith("RMSNorm") and "variance_epsilon" in vars(layer):
            if kind not in alike:
                alike[kind] = _is_rms_norm(layer)
            if alike[kind]:
                forwards[layer] = _rms_norm(layer)
    changed = [layer for layer in forwards if "forward" not in vars(layer)]
    for layer in changed:
        layer.forward = forwards[layer]
    rotary = lean_rotary(model)
    usual = {code: code.apply_rotary_pos_emb for code in rotary}
    linear = F.linear
    try:
        F.linear = torch._C._nn.linear
        for code, function in rotary.items():
            code.apply_rotary_pos_emb = function  # type: ignore[attr-defined]
        yield
    finally:
        F.linear = linear
        for code, function in usual.items():
            code.apply_rotary_pos_emb = function  # type: ignore[attr-defined]
        for layer in changed:
            del layer.forward


@torch.no_grad()
def _is_rms_norm(layer: Any) -> bool:
    x = torch.linspace(-1, 2, layer.weight.numel(), device=layer.weight.device, dtype=torch.float32)
    y = F.rms_norm(x, x.shape, layer.weight.float(), layer.variance_epsilon)
    return torch.allclose(layer(x).float(), y, rtol=1e-4, atol=1e-6)


def _rms_norm(layer: Any) -> Callable:
    return lambda x: F.rms_norm(x, layer.weight.shape, layer.weight, layer.variance_epsilon)
