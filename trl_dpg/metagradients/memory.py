"""Memory of the sweeps: the size of graphs, the budget for them, and copies of states in host memory."""

import math
import os
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor

from .batches import MicroBatch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device. Processes of one machine have equal shares of its memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class GraphSize(torch.autograd.graph.saved_tensors_hooks):
    """
    Context manager that measures the memory of the graphs built inside it.

    Attributes:
        storages (`dict[int, int]`): Size in bytes of each storage, by its address.
    """

    def __init__(self):
        self.storages: dict[int, int] = {}
        super().__init__(self._count, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # otherwise an operation that saves its own output is never freed

    def bytes(self, *others: Tensor) -> int:
        """Bytes of the graphs, without the storages of `others`, which are in memory anyway."""
        held = {other.untyped_storage().data_ptr() for other in others}
        return sum(size for pointer, size in self.storages.items() if pointer not in held)


class GraphBudget:
    """
    Memory that is left for the graphs of micro-batches, or for the gradients of their samples (`by_sample`).

    The size of a graph is known once a graph of the same shape has been built. Before that it is estimated: the size
    of the graph with the most similar number of tokens, scaled by the numbers of tokens. If a graph does not fit, the
    gradient is computed without one.

    Args:
        left (`int`): Memory in bytes.
    """

    def __init__(self, left: int):
        self.left = left
        self._sizes: dict[tuple[tuple[int, ...], bool], int] = {}  # bytes by shape and kind

    def has_room_for(self, micro_batch: MicroBatch, by_sample: bool = False) -> bool:
        """Whether the micro-batch's graph probably fits. Before the first measurement: whether any memory is left."""
        sizes = {shape: size for (shape, kind), size in self._sizes.items() if kind == by_sample}
        if not sizes:
            return self.left > 0
        shape, num_tokens = _shape(micro_batch), micro_batch.batch.input_ids.numel()
        if shape in sizes:
            return sizes[shape] <= self.left
        nearest = min(sizes, key=lambda other: abs(math.log(other[0] * other[1] / num_tokens)))
        return sizes[nearest] * num_tokens / (nearest[0] * nearest[1]) <= self.left

    def knows(self, micro_batch: MicroBatch, by_sample: bool = False) -> bool:
        """Whether a graph of the same shape was measured."""
        return (_shape(micro_batch), by_sample) in self._sizes

    def learn(self, micro_batch: MicroBatch, size: int, by_sample: bool = False) -> None:
        """Note the size of the micro-batch's graph, in bytes."""
        self._sizes[_shape(micro_batch), by_sample] = size

    def take(self, micro_batch: MicroBatch, by_sample: bool = False) -> bool:
        """Whether the micro-batch's graph fits. If so, its size is subtracted from the budget."""
        size = self._sizes[_shape(micro_batch), by_sample]
        if size > self.left:
            return False
        self.left -= size
        return True


def _shape(micro_batch: MicroBatch) -> tuple[int, ...]:
    """What the size of a graph depends on: samples, their padded length, and supervised tokens."""
    return (*micro_batch.batch.input_ids.shape, micro_batch.batch.labels.numel())


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Apply a function to a tensor, or to each tensor in an optimizer's state."""
    if isinstance(state, Tensor):
        return function(state)
    return type(state)(*(function(x) if isinstance(x, Tensor) else x for x in state))


def pinned(x: Tensor) -> Tensor:
    """A copy in pinned host memory. The copy is asynchronous."""
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
