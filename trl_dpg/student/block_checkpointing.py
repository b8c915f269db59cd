"""Gradient checkpointing of the student's blocks, such that the second pass runs in the sweep's kernels, too."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def block_checkpointing(
    model: nn.Module, enable: bool, kernels: Callable[[], AbstractContextManager]
) -> Iterator[None]:
    """
    Blocks keep their inputs only and are run again in the backward pass (Chen et al., arXiv 1604.06174).

    Args:
        model (`torch.nn.Module`): The student's model.
        enable (`bool`): Do so for every block; otherwise for those whose gradient checkpointing is on already.
        kernels (`Callable`): Makes the context that a block runs in, each time.
    """

    def run(function, *args):
        def within(*args):
            with kernels():
                return function(*args)

        return checkpoint(within, *args, use_reentrant=False, preserve_rng_state=False)  # no dropout

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    blocks = [block for block in blocks if enable or block.gradient_checkpointing]
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    own = [{name: value for name, value in vars(block).items() if name in names} for block in blocks]
    for block in blocks:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = run
    try:
        yield
    finally:
        for block, values in zip(blocks, own, strict=True):
            for name in names:
                delattr(block, name)
            vars(block).update(values)
