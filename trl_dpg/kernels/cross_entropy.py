"""Cross-entropy of a linear head, twice differentiable. The logits of all tokens are never in memory together."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import blocks


def chunk_elements(device: torch.device) -> int:
    """Number of logits in memory at a time: 16 MiB of float32 on the CPU, 256 MiB on an accelerator."""
    return blocks.LOGITS["cpu" if device.type == "cpu" else "accelerator"]


def linear_cross_entropy(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    labels: Tensor,
    loss_weights: Tensor,
    through_theta: bool = True,
    skip_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    Weighted cross-entropy Σ_i q_i ℓ_i with ℓ_i = logsumexp(z_i) - z_{i, y_i}, for the logits z = Σ_j X_j W_jᵀ + b.

    The tokens are processed in chunks. So memory does not grow with tokens times vocabulary in the loss, in its
    gradient, or in the derivative of the gradient. The gradient is computed together with the loss, from the same
    logits. The second derivative computes the logits again, unless all of them fit into one chunk.

    Args:
        inputs (`Sequence[torch.Tensor]` of shapes `[N, D_j]`):
            X_j. The first is the hidden state. The others are its projections by the head's adapters.
        weights (`Sequence[torch.Tensor]` of shapes `[V, D_j]`):
            W_j.
        bias (`torch.Tensor` of shape `[V]`, *optional*):
            b.
        labels (`torch.Tensor` of shape `[N]`):
            y.
        loss_weights (`torch.Tensor` of shape `[N]`):
            q, in float32 or float64. The losses have the same dtype.
        through_theta (`bool`, *optional*, defaults to `True`):
            Whether the gradient will be differentiated in X_j, W_j and b as well as in q.
        skip_values (`bool`, *optional*, defaults to `False`):
            Do not compute the values of the gradients in W_j. These gradients can then only be differentiated.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The weighted sum, and ℓ of shape `[N]`, detached.
    """
    return _Loss.apply(labels, loss_weights, bias, len(inputs), through_theta, skip_values, *inputs, *weights)


@torch.no_grad()
def loss_derivative(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    labels: Tensor,
    directions: Sequence[Tensor | None],
    bias_direction: Tensor | None,
) -> Tensor:
    """
    The derivative of each token's loss along a direction of W_j and b, of shape `[N]`: Σ (P - Y) ∘ Ż with
    Ż = Σ_j X_j Ẇ_jᵀ + ḃ.

    Args:
        inputs, weights, bias, labels: See [`linear_cross_entropy`].
        directions (`Sequence[torch.Tensor or None]` of shapes `[V, D_j]`): Ẇ_j; `None` for zero.
        bias_direction (`torch.Tensor` of shape `[V]`, *optional*): ḃ.
    """
    dtype = next(x for x in (*directions, bias_direction) if x is not None).dtype
    derivative = torch.empty(len(labels), dtype=dtype, device=labels.device)
    moved = [(x, w.to(x.dtype)) for x, w in zip(inputs, directions, strict=True) if w is not None]
    for rows in _chunks(len(labels), weights[0]):
        probabilities = _product([x[rows] for x in inputs], weights, bias, dtype).softmax(1)
        if moved:
            z_dot = _product([x[rows] for x, _ in moved], [w for _, w in moved], bias_direction, dtype)
        else:
            z_dot = torch.zeros_like(probabilities).add_(bias_direction)  # type: ignore[arg-type]
        chosen = z_dot.gather(1, labels[rows, None]).squeeze(1)
        derivative[rows] = torch.linalg.vecdot(probabilities, z_dot) - chosen
    return derivative


@torch.no_grad()
def loss_gradients(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    labels: Tensor,
    loss_weights: Tensor,
    owners: Tensor,
    samples: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """
    Gradients of each sample's loss Σ_i q_i ℓ_i in W_j and b: `[B, V, D_j]` and `[B, V]` of B samples.

    Args:
        inputs, weights, bias, labels, loss_weights: See [`linear_cross_entropy`].
        owners (`torch.Tensor` of shape `[N]`): The sample of each token.
        samples (`torch.Tensor` of shape `[B]`): The samples of interest.
        needed (`Sequence[bool]`): For W_j and b, whether the gradients are needed. Those that are not are `None`.
    """
    num_rows, dtype = weights[0].size(0), loss_weights.dtype
    shapes = [(num_rows, weight.size(1)) for weight in weights] + [(num_rows,)]
    totals = [
        torch.zeros(len(samples), *shape, dtype=dtype, device=labels.device) if need else None
        for shape, need in zip(shapes, needed, strict=True)
    ]
    for index, sample in enumerate(samples):
        tokens = (owners == sample).nonzero().squeeze(1)
        for rows in _chunks(len(tokens), weights[0]):
            mine = tokens[rows]
            x = [x[mine] for x in inputs]
            z_bar = _minus_one_hot(_product(x, weights, bias, dtype).softmax(1), labels[mine])
            z_bar.mul_(loss_weights[mine, None])
            *matrices, vector = (None if total is None else total[index] for total in totals)
            for total, factor in zip(matrices, x, strict=True):
                if total is not None:
                    total.addmm_(z_bar.mT, factor.to(dtype))
            if vector is not None:
                vector += z_bar.sum(0)
    return totals


def _chunks(num_rows: int, weight: Tensor) -> Iterator[slice]:
    size = max(1, chunk_elements(weight.device) // weight.size(0))
    return (slice(first, first + size) for first in range(0, num_rows, size))


def _product(inputs, weights, bias, dtype):
    """Σ_j X_j W_jᵀ + b; the sum is in `dtype`"""
    product = (inputs[0] @ weights[0].mT).to(dtype)
    for x, weight in zip(inputs[1:], weights[1:], strict=True):
        product += x @ weight.mT
    return product if bias is None else product.add_(bias)


class _Loss(Function):
    @staticmethod
    def forward(ctx, labels, q, bias, num_inputs, through_theta, skip_values, *factors):
        inputs, weights = factors[:num_inputs], factors[num_inputs:]
        needed = ctx.needs_input_grad[2], *ctx.needs_input_grad[6:]
        bars = [  # cotangents of b, X_j, W_j
            torch.zeros_like(factor) if need and not (skip_values and k > num_inputs) else None
            for k, (factor, need) in enumerate(zip((bias, *factors), needed, strict=True))
        ]
        losses = torch.empty_like(q)
        chunks = list(_chunks(len(q), weights[0]))
        probabilities = None
        for rows in chunks:
            x = [x[rows] for x in inputs]
            logits = _product(x, weights, bias, q.dtype)
            logsumexp = logits.logsumexp(1)
            losses[rows] = logsumexp - logits.gather(1, labels[rows, None]).squeeze(1)
            probabilities = logits.sub_(logsumexp[:, None]).exp_()
            if any(needed):
                # if this is the only chunk, the probabilities are kept for the second derivative
                z_bar = probabilities.clone() if len(chunks) == 1 else probabilities
                _accumulate(bars, rows, _minus_one_hot(z_bar, labels[rows]).mul_(q[rows, None]), x, weights)
        if any(ctx.needs_input_grad):
            kept = probabilities if len(chunks) == 1 else None
            ctx.save_for_backward(labels, q, bias, losses, kept, *bars, *factors)
            ctx.num_inputs, ctx.through_theta = num_inputs, through_theta
        ctx.mark_non_differentiable(losses)
        return torch.dot(q, losses), losses

    @staticmethod
    def backward(ctx, loss_bar, _):
        labels, q, bias, losses, kept, *rest = ctx.saved_tensors
        bars, factors = rest[: len(rest) // 2 + 1], rest[len(rest) // 2 + 1 :]
        bars = _Gradient.apply(labels, q, bias, kept, ctx.num_inputs, ctx.through_theta, bars, *factors)
        bias_bar, *factor_bars = (bar if bar is None else bar * loss_bar.to(bar.dtype) for bar in bars)
        return None, losses * loss_bar, bias_bar, None, None, None, *factor_bars


class _Gradient(Function):
    """b̄ = Σ Z̄, X̄_j = Z̄ W_j and W̄_j = Z̄ᵀ X_j with Z̄ = q ∘ (P - Y). The values were computed with the loss."""

    @staticmethod
    def forward(ctx, labels, q, bias, kept, num_inputs, through_theta, bars, *factors):
        ctx.save_for_backward(labels, q, bias, kept, *factors)
        ctx.num_inputs, ctx.through_theta = num_inputs, through_theta
        ctx.set_materialize_grads(False)
        needed = ctx.needs_input_grad[2], *ctx.needs_input_grad[7:]
        return tuple(
            bar.view_as(bar) if bar is not None else factor.new_zeros(()).expand_as(factor) if need else None
            for bar, factor, need in zip(bars, (bias, *factors), needed, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *cotangents):
        """
        The derivative of the logits along the cotangents (a_b, a_X, a_W) is Ż = Σ_j (a_Xj W_jᵀ + X_j a_Wjᵀ) + a_b. So
        q̄ = Σ (P - Y) ∘ Ż, and the cotangent of the logits is q ∘ P ∘ (Ż - Σ P ∘ Ż).
        """
        labels, q, bias, kept, *factors = ctx.saved_tensors
        inputs, weights = factors[: ctx.num_inputs], factors[ctx.num_inputs :]
        a_bias, a_inputs, a_weights = cotangents[0], cotangents[1 : 1 + len(inputs)], cotangents[1 + len(inputs) :]
        needed = ctx.needs_input_grad[2], *ctx.needs_input_grad[7:]
        bars = [
            torch.zeros_like(factor) if need and ctx.through_theta else None
            for factor, need in zip((bias, *factors), needed, strict=True)
        ]
        q_bar = torch.empty_like(q)
        for rows in _chunks(len(q), weights[0]):
            x, a_x = [x[rows] for x in inputs], [a if a is None else a[rows] for a in a_inputs]
            if kept is None:
                probabilities = _product(x, weights, bias, q.dtype).softmax(1)
            else:
                probabilities = kept
            along = [(a, w) for a, w in zip(a_x, weights, strict=True) if a is not None]
            along += [(x, a) for x, a in zip(x, a_weights, strict=True) if a is not None]
            if along:
                z_dot = _product([x for x, _ in along], [w for _, w in along], a_bias, q.dtype)
            else:
                z_dot = torch.zeros_like(probabilities).add_(a_bias)
            mean = torch.linalg.vecdot(probabilities, z_dot)
            q_bar[rows] = mean - z_dot.gather(1, labels[rows, None]).squeeze(1)
            if not ctx.through_theta:
                continue
            weight = q[rows, None]
            _accumulate(bars, rows, z_dot.sub_(mean[:, None]).mul_(probabilities).mul_(weight), x, weights)
            z_bar = (probabilities * weight).scatter_add_(1, labels[rows, None], -weight)  # P may be used again
            _accumulate([None, *bars[1:]], rows, z_bar, a_x, a_weights)
        bias_bar, *factor_bars = bars
        return None, q_bar, bias_bar, None, None, None, None, *factor_bars


def _minus_one_hot(probabilities, labels):
    """P - Y, in place"""
    return probabilities.scatter_add_(1, labels[:, None], probabilities.new_full((), -1.0).expand(len(labels), 1))


def _accumulate(bars, rows, z_bar, inputs, weights):
    """Add the contribution of a chunk's Z̄ to the cotangents of b, X_j and W_j. Those that are `None` are skipped."""
    bias_bar, *factor_bars = bars
    if bias_bar is not None:
        bias_bar += z_bar.sum(0)
    for x, weight, x_bar, w_bar in zip(
        inputs, weights, factor_bars[: len(inputs)], factor_bars[len(inputs) :], strict=True
    ):
        if x_bar is not None and weight is not None:
            x_bar[rows].addmm_(z_bar.to(weight.dtype), weight)
        if w_bar is not None and x is not None:
            w_bar.addmm_(z_bar.to(x.dtype).mT, x)
