"""
The gradient of each sample, out of the backward pass that computes the gradient of all samples together.

Samples of a batch do not meet before their losses are added. So a layer y = W x of a sample with tokens l has the
gradient Σ_l δ_l x_lᵀ in W, with δ the cotangents of its outputs, and the batch's gradient is the sum over the samples.
Either the samples' gradients are kept, `[B, out, in]`, or the factors x and δ, whichever is smaller. Products with a
direction U follow without another pass: ⟨U, Σ_l δ_l x_lᵀ⟩ = Σ_l δ_l · (U x_l). For several directions they are one
matrix product with the samples' gradients.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from .activations import RMSNorm
from .cross_entropy import linear_cross_entropy
from .sample_gradients import Dense, Factors, Head, Lookup


class Recorder:
    """
    Collects what a backward pass says about each sample.

    Args:
        parameters (`Sequence[torch.Tensor]`):
            The trained parameters, as the model uses them.
        num_samples (`int`):
            B. The first dimension of the model's activations is that of the samples.
        owners (`torch.Tensor` of shape `[n]`):
            The sample of each supervised token. The head may only see these tokens.
        weights (`torch.Tensor` of shape `[B]`, *optional*):
            Data weights of the samples. The gradient of all samples together is weighted by them, that of each sample
            is not. Ones if `None`.
        along (`Sequence[torch.Tensor]`, *optional*):
            M directions `[M, *shape]` for each parameter. Then nothing is kept, and no gradient of all samples is
            computed. Only the products with the directions are, in the backward pass itself.
        keep (`bool`, *optional*, defaults to `True`):
            Keep the samples' gradients. The gradient of all samples is bit for bit the same without.

    Attributes:
        covers (`bool`): Whether all uses of the parameters are of a known kind. If not, the result is incomplete.
        parts (`list`): What was kept.
        scores (`torch.Tensor` of shape `[M, B]`): The products with `along`.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        num_samples: int,
        owners: Tensor,
        weights: Tensor | None = None,
        along: Sequence[Tensor] | None = None,
        keep: bool = True,
    ):
        self.places = {id(parameter): place for place, parameter in enumerate(parameters)}
        self.shapes = [parameter.shape for parameter in parameters]
        self.num_samples, self.owners, self.weights, self.directions = num_samples, owners, weights, along
        self.keep = keep and along is None
        self.covers = True
        self.parts: list = []
        self.last: list[tuple[set[int], Tensor]] = []
        self.scores = parameters[0].new_zeros(0) if along is None else along[0].new_zeros(len(along[0]), num_samples)

    def place(self, parameter: Tensor | None) -> int | None:
        """The place of a trained parameter. `None` for any other tensor."""
        return None if parameter is None else self.places.get(id(parameter))

    def knows(self, x: Tensor) -> bool:
        """Whether the sample of each row of an activation is known."""
        if x.dim() > 2:
            return x.size(0) == self.num_samples
        return x.dim() == 2 and x.size(0) == len(self.owners)

    def add(self, part) -> None:
        """Keep a part, or its product with its direction."""
        if self.keep:
            self.parts.append(part)
        elif self.directions is not None:
            products = part.along(self.directions, self.by_sample)
            self.scores += products
            self.last.append((_places(part), products[0, -1]))

    def last_by_place(self, along: Sequence[Tensor]) -> list[tuple[list[int], float]]:
        """
        The last sample's products with the first of `along`, for each parameter, or several used as one.

        If nothing was kept, these are the directions that were given at the start.
        """
        kept = [(_places(part), part.along(along, self.by_sample)[0, -1]) for part in self.parts]
        groups: list[tuple[set[int], float]] = []
        for places, product in self.last or kept:
            overlapping = [group for group in groups if group[0] & places]
            groups = [group for group in groups if not group[0] & places]
            merged = places.union(*(group[0] for group in overlapping))
            groups.append((merged, product.item() + sum(group[1] for group in overlapping)))
        return [(sorted(places), product) for places, product in groups]

    @torch.no_grad()
    def products(self, u: Sequence[Tensor]) -> Tensor:
        """⟨u_m, ∇ℓ_i⟩ for M directions and B samples, of shape `[M, B]`; `u` has `[M, *shape]` for each parameter."""
        total = u[0].new_zeros(len(u[0]), self.num_samples)
        for part in self.parts:
            total += part.along(u, self.by_sample)
        return total

    @torch.no_grad()
    def combinations(self, weights: Tensor) -> list[Tensor] | None:
        """
        Σ_i a_i ∇ℓ_i for each row a of `weights` `[K, B]`: one tensor `[K, *shape]` for each parameter.

        `None` if an embedding or a head is trained, whose samples' gradients are not of a size to be combined.
        """
        found = [weights.new_zeros(len(weights), *shape) for shape in self.shapes]
        for part in self.parts:
            if isinstance(part, Dense):
                flat = part.gradients.flatten(1).to(weights.dtype)
                found[part.place].flatten(1).addmm_(weights, flat)
            elif isinstance(part, Factors):
                for total, row in zip(found[part.place], weights, strict=True):
                    inputs, cotangents = part.inputs.flatten(0, -2), self.weighted(part.cotangents, row).flatten(0, -2)
                    left, right = (inputs, cotangents) if part.transposed else (cotangents, inputs)
                    total.addmm_(left.mT.to(total.dtype), right.to(total.dtype))
            else:
                return None
        return found

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All tensors that are kept."""
        for part in self.parts:
            for value in part:
                yield from (x for x in (value if isinstance(value, list) else [value]) if isinstance(x, Tensor))

    def by_sample(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum over each sample's tokens, of shape `[B]`."""
        return self.sums(values.unsqueeze(-1).to(dtype)).squeeze(-1)

    def sums(self, values: Tensor) -> Tensor:
        """The sum over each sample's tokens: `[B, D]` of `[B, *, D]` or `[n, D]`."""
        if values.dim() == 2 and values.size(0) == len(self.owners) != self.num_samples:
            total = values.new_zeros(self.num_samples, values.size(-1))
            return total.index_add_(0, self.owners, values)
        return values.reshape(self.num_samples, -1, values.size(-1)).sum(1)

    def weighted(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """Cotangents `[B, *]` or `[n, D]`, times weights `[B]` of their samples."""
        if weights is None:
            return values
        weights = weights if values.size(0) == self.num_samples else weights[self.owners]
        return values * weights.to(values.dtype).view(-1, *[1] * (values.dim() - 1))

    def linear(self, place: int | None, x: Tensor, y_bar: Tensor, transposed: bool) -> Tensor | None:
        """Record a linear layer. Returns the gradient of all samples in its weight, if it is trained and wanted."""
        if place is None:
            return None
        x = x.detach()  # without its graph
        left, right = (x, y_bar) if transposed else (y_bar, x)
        width, tokens = left.size(-1) + right.size(-1), x.shape[1:-1].numel()
        if self.keep and x.dim() > 2 and left.size(-1) * right.size(-1) <= tokens * width:
            self.add(Dense(place, left.flatten(1, -2).mT @ right.flatten(1, -2)))
        else:
            self.add(Factors(place, x, y_bar, transposed))
        if self.directions is not None:
            return None
        y_bar = self.weighted(y_bar, self.weights)
        left, right = (x, y_bar) if transposed else (y_bar, x)
        return left.flatten(0, -2).mT @ right.flatten(0, -2)

    def vector(self, place: int | None, values: Tensor) -> Tensor | None:
        """The same for a bias or a scale, whose gradient is the sum of `values` over the tokens."""
        if place is None:
            return None
        if self.keep or self.directions is not None:
            self.add(Dense(place, self.sums(values)))
        return None if self.directions is not None else self.weighted(values, self.weights).flatten(0, -2).sum(0)

    def head_loss(self, inputs, matrices, bias, labels, loss_weights, *_) -> tuple[Tensor, Tensor]:
        """
        Record a linear head. See [`~trl_dpg.kernels.cross_entropy.linear_cross_entropy`] for arguments and results.

        Only the loss that belongs to the gradient of the hidden states is returned. If there are data weights, its
        value is not weighted.
        """
        places = [self.place(matrix) for matrix in (*matrices, bias)]
        if all(place is None for place in places):
            return linear_cross_entropy(inputs, matrices, bias, labels, loss_weights, False)
        fixed = [matrix.detach() for matrix in matrices], None if bias is None else bias.detach()
        seen = [x.detach() for x in inputs]
        if self.keep or self.directions is not None:
            self.add(Head(places, seen, *fixed, labels, loss_weights, self.owners, self.num_samples))
        if self.directions is None and self.weights is None:
            return linear_cross_entropy(inputs, matrices, bias, labels, loss_weights, False)
        loss, losses = linear_cross_entropy(inputs, *fixed, labels, loss_weights, False)
        if self.weights is not None and self.directions is None:
            weighted = self.weights[self.owners] * loss_weights
            loss = loss + linear_cross_entropy(seen, matrices, bias, labels, weighted, False)[0]
        return loss, losses


class BySample(TorchFunctionMode):
    """
    Runs operations that use a trained parameter such that their backward pass tells a [`Recorder`] of each sample.

    Linear layers, embeddings, RMSNorm and LayerNorm are known. If a parameter is used in any other way, `covers` of
    the recorder becomes `False`.
    """

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():  # inside an operation that is recorded as a whole
            return function(*args, **kwargs)
        used = [x for group in (*args, *kwargs.values()) for x in _tensors(group) if id(x) in self.recorder.places]
        if used:
            known = self._known(function, *args, **kwargs)
            if known is not None:
                return known
        elif function is F.rms_norm and kwargs["weight"] is not None and kwargs["eps"] is not None:
            return RMSNorm.apply(args[0], kwargs["weight"], kwargs["eps"], False)
        result = function(*args, **kwargs)
        if used and any(x.requires_grad for x in _tensors(result)):
            self.recorder.covers = False
        return result

    def _known(self, function, *args, **kwargs) -> Tensor | None:
        """The result of an operation of a known kind."""
        recorder = self.recorder
        if function is F.linear:
            return self._linear(*args, **kwargs)
        if function is torch.addmm and not kwargs:  # the linear layer of GPT-2, which sees all tokens in a row
            bias, x, weight = args
            if x.size(0) % recorder.num_samples:
                return None
            return self._linear(x.view(recorder.num_samples, -1, x.size(-1)), weight, bias, True).flatten(0, 1)
        if function is F.embedding:
            return self._embedding(*args, **kwargs)
        if function is F.rms_norm:
            normalized = function(*args, **kwargs | {"weight": None})
            return self._affine(normalized, kwargs["weight"], None)
        if function is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        return None

    def _linear(self, x, weight, bias=None, transposed=False):
        places = self.recorder.place(weight), self.recorder.place(bias)
        return _Linear.apply(x, weight, bias, transposed, self.recorder, *places) if self.recorder.knows(x) else None

    def _embedding(self, ids, weight, padding_idx=None, max_norm=None, *further, **kwargs):
        if ids.dim() == 2 and ids.size(0) == 1:  # positions, which all samples share
            ids = ids.expand(self.recorder.num_samples, -1)
        if (
            kwargs.get("scale_grad_by_freq")
            or max_norm is not None
            or ids.dim() != 2
            or ids.size(0) != self.recorder.num_samples
        ):
            return None
        return _Embedding.apply(ids, weight, padding_idx, self.recorder, self.recorder.place(weight))

    def _layer_norm(self, x, shape, weight=None, bias=None, eps=1e-5):
        return self._affine(F.layer_norm(x, shape, eps=eps), weight, bias) if len(shape) == 1 else None

    def _affine(self, x, weight, bias):
        if not self.recorder.knows(x) or weight is None or weight.dim() != 1:
            return None
        return _Affine.apply(x, weight, bias, self.recorder, self.recorder.place(weight), self.recorder.place(bias))


def _places(part) -> set[int]:
    """The places of a part's parameters."""
    places = part.places if isinstance(part, Head) else [part.place]
    return {place for place in places if place is not None}


def _tensors(value) -> list[Tensor]:
    """A tensor, or those in a list."""
    return [x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, Tensor)]


class _Linear(Function):
    """Y = X Wᵀ + b"""

    @staticmethod
    def forward(ctx, x, weight, bias, transposed, recorder, weight_place, bias_place):
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.recorder, ctx.places = transposed, recorder, (weight_place, bias_place)
        return F.linear(x, weight.mT if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, y_bar):
        x, weight = ctx.saved_tensors
        weight_place, bias_place = ctx.places
        weight_bar = ctx.recorder.linear(weight_place, x, y_bar, ctx.transposed)
        bias_bar = ctx.recorder.vector(bias_place, y_bar)
        x_bar = y_bar @ (weight.mT if ctx.transposed else weight) if ctx.needs_input_grad[0] else None
        return x_bar, weight_bar, bias_bar, None, None, None, None


class _Embedding(Function):
    """The rows of a table. The gradient of the row `padding_idx` is zero, as in `torch.nn.functional.embedding`."""

    @staticmethod
    def forward(ctx, ids, weight, padding_idx, recorder, place):
        ctx.save_for_backward(ids)
        ctx.padding_idx = -1 if padding_idx is None else padding_idx % weight.size(0)
        ctx.num_rows, ctx.recorder, ctx.place = weight.size(0), recorder, place
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx, y_bar):
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx >= 0:
            y_bar = y_bar.masked_fill((ids == ctx.padding_idx).unsqueeze(-1), 0.0)
        ctx.recorder.add(Lookup(ctx.place, ids, y_bar))
        if ctx.recorder.directions is not None:
            return None, None, None, None, None
        y_bar = ctx.recorder.weighted(y_bar, ctx.recorder.weights).flatten(0, 1)
        total = y_bar.new_zeros(ctx.num_rows, y_bar.size(-1)).index_add_(0, ids.flatten(), y_bar)
        return None, total, None, None, None


class _Affine(Function):
    """Y = w ∘ X + b over the last dimension"""

    @staticmethod
    def forward(ctx, x, weight, bias, recorder, weight_place, bias_place):
        ctx.save_for_backward(x, weight)
        ctx.recorder, ctx.places = recorder, (weight_place, bias_place)
        return x * weight if bias is None else torch.addcmul(bias, x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, y_bar):
        x, weight = ctx.saved_tensors
        weight_place, bias_place = ctx.places
        weight_bar = ctx.recorder.vector(weight_place, y_bar * x)
        bias_bar = ctx.recorder.vector(bias_place, y_bar)
        return y_bar * weight, weight_bar, bias_bar, None, None, None
