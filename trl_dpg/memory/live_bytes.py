"""Counts the bytes of tensors that are in memory together, while code runs on real tensors or on fake ones."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """
    Context manager that counts the tensors that operations inside of it make, until each of them is freed.

    A storage counts once, however many tensors are views of it. What a single operation allocates and frees inside of
    itself is not seen, except for the dequantised weight in a 4-bit layer.

    Args:
        held (`Iterable[torch.Tensor]`): Tensors that are in memory anyway. They do not count.

    Attributes:
        now (`int`): Bytes of the tensors that exist.
        peak (`int`): The most there were.
    """

    def __init__(self, held: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}
        for tensor in held:
            self._known[_address(tensor)] = tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _address(tensor) not in self._known:
                self._begin(tensor)
        if function.name() == "bitsandbytes::gemm_4bit":  # a custom operation, which dequantises the weight
            inputs, _, shape, *_ = args
            self.peak = max(self.peak, self.now + shape[0] * shape[1] * inputs.element_size())
        return result

    def _begin(self, tensor: Tensor) -> None:
        storage, address = tensor.untyped_storage(), _address(tensor)
        size = storage.nbytes()

        def end(_):
            self.now -= size
            del self._known[address]

        self._known[address] = weakref.ref(storage, end)
        self.now += size
        self.peak = max(self.peak, self.now)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # that of the storage itself: fake tensors have no data


class Traced(NamedTuple):
    """
    What a function needs of memory.

    Attributes:
        peak (`int`): The most bytes of its tensors that were in memory together.
        kept (`int`): Bytes that its result holds.
    """

    peak: int
    kept: int


def traced(function: Callable[[], Any], held: Iterable[Tensor]) -> tuple[Traced, Any]:
    """Call a function, and count the bytes of its tensors. `held` are tensors that are in memory anyway."""
    with LiveBytes(held) as live:
        result = function()
    return Traced(live.peak, live.now), result
