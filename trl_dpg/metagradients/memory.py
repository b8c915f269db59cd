"""What a sweep keeps in memory: the size of graphs, the budget for them, and where states lie."""

import math
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor

from .batches import MicroBatch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


class GraphSize(torch.autograd.graph.saved_tensors_hooks):
    """
    Counts the memory that the graphs built within it hold on to.

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
        return tensor.detach()  # an operation that holds its own output would never be freed

    def bytes(self, *others: Tensor) -> int:
        """Bytes held, apart from the storages of `others`, which are held in any case."""
        held = {other.untyped_storage().data_ptr() for other in others}
        return sum(size for pointer, size in self.storages.items() if pointer not in held)


class GraphBudget:
    """
    Bytes that are left for the graphs of micro-batches.

    The size of a graph is known once one of the same shape is built. Before that, whether it is worth building with
    everything that the reverse sweep needs is estimated: in proportion to its tokens, from the micro-batch that is
    nearest in size.

    Args:
        left (`int`): Bytes.
    """

    def __init__(self, left: int):
        self.left = left
        self._sizes: dict[tuple[int, ...], int] = {}  # bytes by shape

    def has_room_for(self, micro_batch: MicroBatch) -> bool:
        """Whether its graph seems to fit. Where nothing has been measured yet: whether anything is left."""
        if not self._sizes:
            return self.left > 0
        shape, num_tokens = _shape(micro_batch), micro_batch.batch.input_ids.numel()
        if shape in self._sizes:
            return self._sizes[shape] <= self.left
        nearest = min(self._sizes, key=lambda other: abs(math.log(other[0] * other[1] / num_tokens)))
        return self._sizes[nearest] * num_tokens / (nearest[0] * nearest[1]) <= self.left

    def knows(self, micro_batch: MicroBatch) -> bool:
        """Whether a graph of the same shape was measured."""
        return _shape(micro_batch) in self._sizes

    def learn(self, micro_batch: MicroBatch, size: int) -> None:
        """Note the size of its graph, in bytes."""
        self._sizes[_shape(micro_batch)] = size

    def take(self, micro_batch: MicroBatch) -> bool:
        """Whether its graph, whose size is known, fits. If so, it is taken off the budget."""
        size = self._sizes[_shape(micro_batch)]
        if size > self.left:
            return False
        self.left -= size
        return True


def _shape(micro_batch: MicroBatch) -> tuple[int, ...]:
    """What the size of a graph depends on: samples, their padded length, and supervised tokens."""
    return (*micro_batch.batch.input_ids.shape, micro_batch.batch.labels.numel())


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """`function` of a tensor, or of each tensor in an optimizer's state."""
    if isinstance(state, Tensor):
        return function(state)
    return type(state)(*(function(x) if isinstance(x, Tensor) else x for x in state))


def pinned(x: Tensor) -> Tensor:
    """A copy in pinned host memory, which is not waited for."""
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
