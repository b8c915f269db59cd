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

    A graph's size is known once it is built. Whether it is worth building, with everything that the reverse sweep
    needs, is guessed from those that were: in proportion to its tokens, from the micro-batch that is nearest in size.

    Args:
        left (`int`): Bytes.
    """

    def __init__(self, left: int):
        self.left = left
        self._sizes: dict[int, int] = {}  # bytes by number of tokens

    def has_room_for(self, micro_batch: MicroBatch) -> bool:
        """Whether its graph seems to fit. Where nothing has been measured yet: whether anything is left."""
        if not self._sizes:
            return self.left > 0
        num_tokens = micro_batch.batch.input_ids.numel()
        nearest = min(self._sizes, key=lambda number: abs(math.log(number / num_tokens)))
        return self._sizes[nearest] * num_tokens / nearest <= self.left

    def take(self, micro_batch: MicroBatch, size: int) -> bool:
        """Whether its graph, of `size` bytes, does fit; if so, it is taken off the budget."""
        self._sizes[micro_batch.batch.input_ids.numel()] = size
        if size > self.left:
            return False
        self.left -= size
        return True


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """`function` of a tensor, or of each tensor in an optimizer's state."""
    if isinstance(state, Tensor):
        return function(state)
    return type(state)(*(function(x) if isinstance(x, Tensor) else x for x in state))


def pinned(x: Tensor) -> Tensor:
    """A copy in pinned host memory, which is not waited for."""
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
