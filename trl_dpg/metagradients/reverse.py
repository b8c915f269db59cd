"""The reverse sweep: backpropagates metrics' gradients through all fine-tuning steps to the samples' weights."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from ..student import Student
from .batches import MicroBatch
from .config import InnerLoopConfig
from .gradient import Gradient, check_attention, micro_batch_gradient
from .optimizers import clip, clip_vjp
from .per_sample import SampleGradients, sample_products
from .trajectory import InnerLoop, Step, Trajectory


def reverse_sweep(trajectory: Trajectory, theta_bar: Tensor, scores: Tensor, token_scores: Tensor) -> None:
    """
    Differentiate M metrics through the whole fine-tuning (Engstrom et al., arXiv 2503.13751; Thrush et al., arXiv
    2604.08423), for t = T-1 ... 0, from λ_T = ∇Φ(θ_T) and σ_T = 0 of each:

        1. (u, λ', σ_t) = VJP of the optimizer step U_t with cotangents (λ_{t+1}, σ_{t+1})
        2. τ_{i,k} += c_{i,k} ⟨u, ∇ℓ_{i,k}(θ_t)⟩                for the tokens of the step's batch
        3. λ_t = λ' + ∇_θ ⟨u, g_t(θ_t)⟩                          not needed at t = 0

    Steps 2 and 3 are one double backward. Since g_t is linear in the token weights, the derivative of ⟨u, g_t⟩ in the
    token weights gives 2. Its derivative in θ gives 3. Where 3 is not needed, the samples' own gradients give 2, see
    `per_sample.py`. With `attribution="first_order"`, 3 is left out everywhere: λ_t = λ'. The metrics share the graph
    of g_t, or the samples' gradients. Only the double backward runs once for each.

    Of several ranks, each computes 1 for its shard and gathers u. It then computes 2 for its own samples, and its
    share of 3. The shares are summed shard by shard.

    Args:
        trajectory (`Trajectory`): The forward sweep.
        theta_bar (`torch.Tensor` of shape `[M, S]`): This rank's shards of λ_T, the metrics' gradients ∇Φ(θ_T). They
            are overwritten.
        scores (`torch.Tensor` of shape `[M, N]`): τ_i = ∂Φ/∂w_i is added for this rank's samples that are not scored
            token by token.
        token_scores (`torch.Tensor` of shape `[M, N, L]`): τ_{i,k} = ∂Φ/∂w_{i,k} of the others is added to this.
    """
    loop, size = trajectory.loop, trajectory.loop.initial_theta.numel()
    config, optimizer, ranks = loop.config, loop.optimizer, loop.ranks
    state_bar = optimizer.init(theta_bar) if len(loop.steps) > 1 else None  # zeros
    several = theta_bar if state_bar is None else torch.empty_like(theta_bar) if len(theta_bar) > 1 else None
    for stretch in trajectory.stretches_backwards():
        next_state = stretch.state
        while stretch.steps:
            t = stretch.first + len(stretch.steps) - 1
            step = stretch.steps.pop()
            own, state, gradient = map(loop.get, (step.theta, step.state, step.gradient))
            clipped, max_norm = gradient[None], config.max_grad_norm
            if max_norm is not None:
                norm = ranks.norm(gradient)
                clipped = clip(gradient, max_norm, norm)[None]
            u = clipped if several is None else several
            state_bar = optimizer.vjp(clipped, state, next_state, step.lr, theta_bar, state_bar, out=u)
            if max_norm is not None:
                clip_vjp(gradient, max_norm, norm, ranks.sum(u @ gradient), u)
            u, theta = ranks.gather(u, size), loop.theta(t, own)
            exact = t > 0 and config.attribution != "first_order"
            total = theta_bar if ranks.alone or not exact else torch.zeros_like(u)
            totals = loop.student.unflatten(total, cast=False).values() if exact else None
            _add_step(loop, step, theta, u, scores, token_scores, totals)
            if exact and not ranks.alone:
                theta_bar += ranks.sum_shards(total)
            del u, theta, total, totals  # before those of the next step are there
            next_state = state


def _add_step(
    loop: InnerLoop,
    step: Step,
    theta: Tensor,
    u: Tensor,
    scores: Tensor,
    token_scores: Tensor,
    totals: Collection[Tensor] | None,
) -> None:
    """Add a step's scores and, to `totals` `[M, *shape]` if given, its Hessian products ∇_θ ⟨u, g_t⟩."""
    student, config = loop.student, loop.config
    u_parts = list(student.unflatten(u, cast=False).values())
    for micro_batch in step.micro_batches:
        part = step.retained.pop(0)
        if step.by_sample and not isinstance(part, Gradient):
            found = _sample_scores(student, theta, micro_batch, part, config, u_parts)
            if found is not None:
                scores[:, micro_batch.samples] += found
                continue
        arguments = (student, theta, micro_batch, part, loop.weights, u, u_parts, config)
        pulled = _products(*arguments, through_theta=totals is not None)
        del part  # so that the last product frees its graph
        for m, (token_bar, products) in enumerate(pulled):
            if token_bar is not None:
                token_scores[m, micro_batch.rows, micro_batch.columns] += token_bar
            if totals is not None:
                _add([total[m] for total in totals], products)


def _add(totals: list[Tensor], products: Sequence[Tensor | None]) -> None:
    """Add products, which may be missing, to their totals."""
    for total, product in zip(totals, products, strict=False):
        if product is not None:
            total += product


def _sample_scores(
    student: Student,
    theta: Tensor,
    micro_batch: MicroBatch,
    kept: SampleGradients | None,
    config: InnerLoopConfig,
    u: list[Tensor],
) -> Tensor | None:
    """c_i ⟨u, ∇ℓ_i⟩ for each metric and sample, `[M, B]`; `None` if the samples cannot be told apart."""
    if kept is not None:
        return kept.products(u)
    return sample_products(student, theta, micro_batch, config, u)


def _products(
    student: Student,
    theta: Tensor,
    micro_batch: MicroBatch,
    retained: Gradient | SampleGradients | None,
    weights: Tensor,
    u: Tensor,
    u_parts: list[Tensor],
    config: InnerLoopConfig,
    through_theta: bool,
) -> Iterator[tuple[Tensor | None, Sequence[Tensor | None]]]:
    """
    For each metric, ∇_w ⟨u, g⟩ of shape `[n]` and, with `through_theta`, ∇_θ ⟨u, g⟩ by parameter; g is a micro-batch's
    gradient.
    """
    if config.hvp == "finite_difference":
        for own in u:
            token_bar, products = _shifted(student, theta, micro_batch, weights, own, config)
            yield token_bar, products if through_theta else ()
        return
    check_attention(student)
    part = (
        retained
        if isinstance(retained, Gradient)
        else micro_batch_gradient(
            student,
            theta,
            micro_batch,
            weights,
            config,
            differentiable=True,
            through_theta=through_theta,
            skip_values=True,
        )
    )
    for m in range(len(u)):
        yield _pull_back(student, part, [own[m] for own in u_parts], through_theta, keep=m < len(u) - 1)


def _pull_back(
    student: Student, part: Gradient, u: list[Tensor], through_theta: bool, keep: bool
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """The results of [`_products`] for one metric, by a double backward. With `keep`, the graph can be used again."""
    inputs = [part.token_weights, *part.leaves] if through_theta else [part.token_weights]
    edges, cotangents = zip(*((edge, bar) for edge, bar in zip(part.edges, u, strict=True) if edge), strict=True)
    token_bar, *products = student.run(
        part.parameters,
        lambda _: torch.autograd.grad(edges, inputs, cotangents, retain_graph=keep, allow_unused=True),
    )
    return token_bar, products


def _shifted(
    student: Student, theta: Tensor, micro_batch: MicroBatch, weights: Tensor, u: Tensor, config: InnerLoopConfig
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """
    The results of [`_products`] for one metric, by central differences along u. They need first derivatives only.

    θ is moved by ε^(1/3) ‖θ‖ in each direction, where ε is the machine epsilon. This length balances the rounding
    error with the error from the third derivative.
    """
    norm = u.norm()
    h = torch.finfo(theta.dtype).eps ** (1 / 3) * theta.norm() / torch.where(norm > 0, norm, 1.0)
    ahead, behind = (
        micro_batch_gradient(student, theta + shift * u, micro_batch, weights, config) for shift in (h, -h)
    )
    token_bar = micro_batch.coefficients * (ahead.token_losses - behind.token_losses) / (2 * h)
    return token_bar, [(a - b) / (2 * h) for a, b in zip(ahead.values, behind.values, strict=True)]
