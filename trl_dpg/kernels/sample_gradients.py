"""The gradients of a batch's samples in one parameter, as whole tensors or as their factors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cross_entropy import loss_derivative


class Dense(NamedTuple):
    """The gradients of B samples in a parameter: `[B, *shape]`."""

    place: int
    gradients: Tensor

    def along(self, u: Sequence[Tensor]) -> Tensor:
        """⟨u, ∇ℓ_i⟩ for each sample, of shape `[B]`."""
        direction = u[self.place].flatten()
        return self.gradients.flatten(1).to(direction.dtype) @ direction


class Factors(NamedTuple):
    """The inputs `[*, in]` and the outputs' cotangents `[*, out]` of a linear layer."""

    place: int
    inputs: Tensor
    cotangents: Tensor
    transposed: bool  # whether the weight is stored as [in, out]

    def along(self, u: Sequence[Tensor]) -> Tensor:
        """⟨u, δ xᵀ⟩ for each token, of shape `[*]`."""
        direction = u[self.place].to(self.inputs.dtype)
        return torch.linalg.vecdot(self.inputs @ (direction if self.transposed else direction.mT), self.cotangents)


class Lookup(NamedTuple):
    """The rows `[B, L]` that an embedding took, and their cotangents `[B, L, D]`."""

    place: int
    ids: Tensor
    cotangents: Tensor

    def along(self, u: Sequence[Tensor]) -> Tensor:
        """⟨u, ∇⟩ for each token, of shape `[B, L]`."""
        return torch.linalg.vecdot(u[self.place][self.ids].to(self.cotangents.dtype), self.cotangents)


class Head(NamedTuple):
    """The factors of a linear head, whose logits are Σ_j X_j W_jᵀ + b, and the loss on them."""

    places: list[int | None]  # of W_j and b
    inputs: list[Tensor]
    matrices: list[Tensor]
    bias: Tensor | None
    labels: Tensor
    loss_weights: Tensor

    def along(self, u: Sequence[Tensor]) -> Tensor:
        """⟨u, ∇⟩ for each supervised token, of shape `[n]`."""
        *directions, bias = (None if place is None else u[place] for place in self.places)
        derivative = loss_derivative(self.inputs, self.matrices, self.bias, self.labels, directions, bias)
        return self.loss_weights * derivative
