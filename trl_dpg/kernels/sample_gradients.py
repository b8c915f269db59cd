"""
The gradients of a batch's samples in one parameter, as whole tensors or as their factors.

Each gives the products with M directions. `u` has a tensor `[M, *shape]` for each parameter, and `by_sample` sums
values of tokens over each sample, in a dtype.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cross_entropy import chunk_elements, loss_derivative, loss_gradients


SumBySample = Callable[[Tensor, torch.dtype], Tensor]


class Dense(NamedTuple):
    """The gradients of B samples in a parameter: `[B, *shape]`."""

    place: int
    gradients: Tensor

    def along(self, u: Sequence[Tensor], by_sample: SumBySample) -> Tensor:
        """⟨u_m, ∇ℓ_i⟩ of shape `[M, B]`."""
        return _products(u[self.place], self.gradients)


class Factors(NamedTuple):
    """The inputs `[*, in]` and the outputs' cotangents `[*, out]` of a linear layer."""

    place: int
    inputs: Tensor
    cotangents: Tensor
    transposed: bool  # whether the weight is stored as [in, out]

    def along(self, u: Sequence[Tensor], by_sample: SumBySample) -> Tensor:
        """
        ⟨u_m, Σ_l δ_l x_lᵀ⟩ of shape `[M, B]`.

        With one direction, as Σ_l δ_l · (u x_l). With several, the samples' gradients are computed, some at a time.
        """
        directions = u[self.place]
        if len(directions) == 1 or self.inputs.dim() == 2:
            moved = directions.to(self.inputs.dtype) if self.transposed else directions.to(self.inputs.dtype).mT
            products = (torch.linalg.vecdot(self.inputs @ direction, self.cotangents) for direction in moved)
            return torch.stack([by_sample(product, directions.dtype) for product in products])
        left, right = (self.inputs, self.cotangents) if self.transposed else (self.cotangents, self.inputs)
        found = []
        for rows in _groups(len(left), directions):
            gradients = left[rows].flatten(1, -2).mT @ right[rows].flatten(1, -2)
            found.append(_products(directions, gradients))
        return torch.cat(found, dim=1)


class Lookup(NamedTuple):
    """The rows `[B, L]` that an embedding took, and their cotangents `[B, L, D]`."""

    place: int
    ids: Tensor
    cotangents: Tensor

    def along(self, u: Sequence[Tensor], by_sample: SumBySample) -> Tensor:
        """⟨u_m, ∇ℓ_i⟩ of shape `[M, B]`."""
        moved = (direction[self.ids].to(self.cotangents.dtype) for direction in u[self.place])
        return torch.stack([by_sample(torch.linalg.vecdot(x, self.cotangents), u[self.place].dtype) for x in moved])


class Head(NamedTuple):
    """The factors of a linear head, whose logits are Σ_j X_j W_jᵀ + b, and the loss on them."""

    places: list[int | None]  # of W_j and b
    inputs: list[Tensor]
    matrices: list[Tensor]
    bias: Tensor | None
    labels: Tensor
    loss_weights: Tensor
    owners: Tensor  # the sample of each token
    num_samples: int

    def along(self, u: Sequence[Tensor], by_sample: SumBySample) -> Tensor:
        """⟨u_m, ∇ℓ_i⟩ of shape `[M, B]`: with several directions from the samples' gradients, some at a time."""
        moved = [None if place is None else u[place] for place in self.places]
        trained = [direction for direction in moved if direction is not None]
        dtype, head = trained[0].dtype, (self.inputs, self.matrices, self.bias, self.labels)
        if len(trained[0]) == 1:
            *directions, bias = (None if direction is None else direction[0] for direction in moved)
            derivative = loss_derivative(*head, directions, bias)
            return by_sample(self.loss_weights * derivative, dtype)[None]
        found = []
        for rows in _groups(self.num_samples, self.matrices[0][None]):
            samples = torch.arange(self.num_samples, device=self.labels.device)[rows]
            gradients = loss_gradients(*head, self.loss_weights, self.owners, samples, [x is not None for x in moved])
            parts = (_products(x, g) for x, g in zip(moved, gradients, strict=True) if x is not None and g is not None)
            found.append(sum(parts, start=trained[0].new_zeros(())))
        return torch.cat(found, dim=1)


def _products(directions: Tensor, gradients: Tensor) -> Tensor:
    """Scalar products `[M, B]` of directions `[M, *shape]` and gradients `[B, *shape]`, in the directions' dtype."""
    return directions.flatten(1) @ gradients.flatten(1).to(directions.dtype).mT


def _groups(num_samples: int, directions: Tensor) -> Iterator[slice]:
    """Groups of samples whose gradients in a matrix may be in memory together."""
    size = max(1, 4 * chunk_elements(directions.device) // directions[0].numel())
    return (slice(first, first + size) for first in range(0, num_samples, size))
