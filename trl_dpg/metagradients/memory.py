"""Memory of the sweeps: the size of graphs, the budget for them, and copies of states in host memory."""

import math
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor

from .batches import MicroBatch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


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
    Memory that is left for the graphs of micro-batches.

    The size of a graph is known only after it is built. It is estimated before: the size of the graph of the
    micro-batch with the most similar number of tokens, scaled by the numbers of tokens. If the estimate does not fit,
    the gradient is computed without a graph that could be differentiated.

    Args:
        left (`int`): Memory in bytes.
    """

    def __init__(self, left: int):
        self.left = left
        self._sizes: dict[int, int] = {}  # bytes by number of tokens

    def has_room_for(self, micro_batch: MicroBatch) -> bool:
        """Whether the micro-batch's graph probably fits. Before the first measurement: whether any memory is left."""
        if not self._sizes:
            return self.left > 0
        num_tokens = micro_batch.batch.input_ids.numel()
        nearest = min(self._sizes, key=lambda number: abs(math.log(number / num_tokens)))
        return self._sizes[nearest] * num_tokens / nearest <= self.left

    def take(self, micro_batch: MicroBatch, size: int) -> bool:
        """Whether the micro-batch's graph of `size` bytes fits. If so, `size` is subtracted from the budget."""
        self._sizes[micro_batch.batch.input_ids.numel()] = size
        if size > self.left:
            return False
        self.left -= size
        return True


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Apply a function to a tensor, or to each tensor in an optimizer's state."""
    if isinstance(state, Tensor):
        return function(state)
    return type(state)(*(function(x) if isinstance(x, Tensor) else x for x in state))


def pinned(x: Tensor) -> Tensor:
    """A copy in pinned host memory. The copy is asynchronous."""
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
