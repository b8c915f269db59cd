"""Gradient checkpointing of the student's blocks. The second forward pass uses the kernels of the sweep, too."""

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
    Context in which blocks keep only their inputs and run again in the backward pass (Chen et al., arXiv 1604.06174).

    Args:
        model (`torch.nn.Module`): The student's model.
        enable (`bool`): Checkpoint every block. If `False`, only blocks whose gradient checkpointing is on already.
        kernels (`Callable`): Makes the context manager in which a block runs. It is called for every run of a block.
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
