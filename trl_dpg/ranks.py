"""Work that several processes share, such that an error on one of them is raised on all."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor


T = TypeVar("T")


def from_all_ranks(function: Callable[[], T], name: str) -> list[T]:
    """
    The results of a function on all ranks. An error on one rank is raised on all, so that no rank waits forever.

    Args:
        function (`Callable`): Called without arguments, on every rank.
        name (`str`): What fails, for the message on the other ranks.

    Raises:
        `RuntimeError`: If the function raised on another rank. Its own error is raised as it is.
    """
    result: Any = None
    error = None
    try:
        result = function()
    except Exception as raised:
        error = raised
    answers = gather_object([(result, None if error is None else _message(error))])
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(answers):
        if failure is not None:
            raise RuntimeError(f"{name} failed on rank {rank}: {failure}")
    return [result for result, _ in answers]


class Ranks:
    """
    Processes that fine-tune one student together. Each computes a share of the micro-batches, and holds a share of
    every vector of P numbers, its *shard*.

    All of them must call the same methods in the same order, in a `guard`. Before each exchange of tensors, they tell
    each other whether one of them has failed. A rank that raises an error in a guard tells it in the place of its next
    exchange, whatever this would have been. So the error is raised on all ranks, and none waits for another.

    Args:
        group (`torch.distributed.ProcessGroup`, *optional*):
            The processes. `None`: this process alone; then nothing is exchanged, and a shard is the whole vector.

    Attributes:
        index (`int`): This process in the group.
        size (`int`): R, the number of processes.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        self.group = group
        self.index = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._name = ""  # of the outermost guard
        self._known: list[BaseException] = []  # errors inside of it that all ranks know
        self._models: WeakSet[torch.nn.Module] = WeakSet()  # that were compared

    @classmethod
    def of_this_run(cls, device: torch.device) -> "Ranks":
        """All processes of a distributed run, exchanging tensors on `device`. All of them must call this."""
        if PartialState().num_processes == 1:
            return cls()
        if device.type == "cpu" and dist.get_backend() == "nccl":  # which exchanges tensors on GPUs only
            return cls(dist.new_group(backend="gloo"))
        return cls(dist.group.WORLD)

    @property
    def alone(self) -> bool:
        return self.size == 1

    # -- errors -----------------------------------------------------------------------------------------------------

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """
        Context in which an error on one rank is raised on all.

        Args:
            name (`str`): What fails, for the message on the other ranks.

        Raises:
            `RuntimeError`: If another rank failed. Its own error is raised as it is. If this rank is out of memory and
            another rank failed for another reason, the other one counts.
            `torch.OutOfMemoryError`: If this was the reason on another rank.
        """
        outer = self._name
        self._name = outer or name
        try:
            yield
            self._tell(None)
        except Exception as error:
            if not self._is_known(error):
                self._tell(error)
            raise
        finally:
            self._name = outer
            if not outer:
                self._known.clear()

    def _is_known(self, error: BaseException | None) -> bool:
        """Whether all ranks know the error, or the one that it was made of."""
        while error is not None:
            if any(error is known for known in self._known):
                return True
            error = error.__cause__ or error.__context__
        return False

    def _tell(self, error: Exception | None) -> None:
        """Exchange whether a rank has failed. If so, an error is raised on all."""
        if self.alone:
            return
        failed = torch.tensor(int(error is not None), device=self._device)
        try:
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self.group)
        except RuntimeError as lost:
            out_of_reach = RuntimeError(
                f"{self._name}: the other ranks cannot be reached. The process of one of them has probably ended, or "
                f"it took longer than the time limit; its own output says more. ({error or lost})"
            )
            self._known.append(out_of_reach)
            raise out_of_reach from lost
        if not failed.item():
            return
        memory = error is not None and is_out_of_memory(error)
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, None if error is None else (memory, _message(error)), group=self.group)
        # Out of memory counts only if it is the only reason, because all ranks may then try again with smaller batches
        first = min(
            (rank for rank in range(self.size) if answers[rank] is not None), key=lambda rank: (answers[rank][0], rank)
        )
        kind = torch.OutOfMemoryError if answers[first][0] else RuntimeError
        shown = error
        if shown is None or memory != answers[first][0]:
            shown = kind(f"{self._name} failed on rank {first}: {answers[first][1]}")
        elif memory and not isinstance(shown, kind):  # all ranks have the same kind of error
            shown = kind(str(error))
        self._known.append(shown)
        raise shown

    def check_same(self, **values: Any) -> None:
        """
        Refuse values that differ between ranks.

        Raises:
            `ValueError`: If one differs. The message names it.
        """
        if self.alone:
            return
        self._tell(None)
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, values, group=self.group)
        for name, value in answers[0].items():
            for rank, other in enumerate(answers):
                if other[name] != value:
                    raise ValueError(
                        f"All ranks must have the same {name}, but that of rank {rank} differs from that of rank 0. "
                        "Load the same model and the same data on every rank, and seed what is random equally."
                    )

    def is_new(self, model: torch.nn.Module) -> bool:
        """
        Whether this is the first time that the ranks compute with a model.

        Frozen weights are compared then, and not again: nothing writes them. Their addresses would not tell whether
        they are the same, because another tensor of the same shape gets the address when the student is moved.
        """
        new = model not in self._models
        self._models.add(model)
        return new

    @property
    def _device(self) -> torch.device:
        on_gpu = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    # -- vectors ----------------------------------------------------------------------------------------------------

    def _range(self, rank: int, size: int) -> slice:
        return slice(size * rank // self.size, size * (rank + 1) // self.size)

    def shard(self, x: Tensor) -> Tensor:
        """This rank's part `[*, S]` of `x` `[*, P]`, with S = P / R up to one. A copy, if there are several ranks."""
        if self.alone:
            return x
        return x[..., self._range(self.index, x.size(-1))].clone()

    def sum_shards(self, x: Tensor) -> Tensor:
        """This rank's part `[*, S]` of the sum of `x` `[*, P]` over all ranks (reduce-scatter). `x` is used up."""
        if self.alone:
            return x
        own = x[..., self._range(self.index, x.size(-1))]
        shard = torch.empty_like(own, memory_format=torch.contiguous_format)  # before the exchange: it may not fit
        self._tell(None)
        for row in x.view(-1, x.size(-1)):
            for rank in range(self.size):
                dist.reduce(row[self._range(rank, len(row))], group=self.group, group_dst=rank)
        return shard.copy_(own)

    def gather(self, shard: Tensor, size: int) -> Tensor:
        """The whole `[*, P]` of the ranks' shards `[*, S]`, with P = `size` (all-gather)."""
        if self.alone:
            return shard
        whole = shard.new_empty(*shard.shape[:-1], size)  # before the exchange: it may not fit
        whole[..., self._range(self.index, size)] = shard
        self._tell(None)
        for row in whole.view(-1, size):
            for rank in range(self.size):
                dist.broadcast(row[self._range(rank, size)], group=self.group, group_src=rank)
        return whole

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks (all-reduce), in place."""
        if not self.alone:
            self._tell(None)
            dist.all_reduce(x, group=self.group)
        return x

    def norm(self, shard: Tensor) -> Tensor:
        """The L2 norm of the vector `[P]` of which this rank has a shard `[S]`."""
        return shard.norm() if self.alone else self.sum(shard.square().sum()).sqrt()

    def first(self, x: Tensor) -> Tensor:
        """`x` as it is on the first rank (broadcast), in place."""
        if not self.alone:
            self._tell(None)
            dist.broadcast(x, group=self.group, group_src=0)
        return x

    def least(self, value: int) -> int:
        """The smallest of the ranks' values."""
        if self.alone:
            return value
        self._tell(None)
        x = torch.tensor(int(value), device=self._device)
        dist.all_reduce(x, dist.ReduceOp.MIN, group=self.group)
        return int(x.item())


ALONE = Ranks()


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the host, had too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _message(error: Exception) -> str:
    return " ".join([repr(error), *getattr(error, "__notes__", [])])


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """A number for each tensor that is the same for the same values, and hardly ever for others."""
    return [int(torch.hash_tensor(x.detach()).item()) for x in tensors]
