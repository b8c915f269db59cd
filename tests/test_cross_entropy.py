"""The chunked cross-entropy against torch's, to the second derivative."""

import pytest
import torch
import torch.nn.functional as F

from trl_dpg.kernels import cross_entropy


TRAINED = {"hidden": [0], "adapter": [0, 1, 3], "all": [0, 1, 2, 3, 4], "head": [2], "bias": [4], "none": []}


def factors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(10, 4), (10, 2), (13, 4), (13, 2), (13,)]  # X_0, X_1, W_0, W_1, b
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return tensors, torch.randint(0, 13, (10,), generator=generator), torch.rand(10, generator=generator, dtype=dtype)


def derivatives(trained, loss_of, scale=1.0):
    """Loss, token losses, gradients, and the derivative of the gradients along fixed directions."""
    tensors, labels, q = factors()
    leaves = [tensor.requires_grad_(k in trained) for k, tensor in enumerate(tensors)]
    q.requires_grad_()
    loss, losses = loss_of([2 * leaf for leaf in leaves], labels, q)
    wanted = [leaves[k] for k in trained]
    gradients = torch.autograd.grad(scale * loss, [*wanted, q], create_graph=True)[:-1]
    if not trained:
        return [loss, losses]
    along = [torch.linspace(-1, 2, g.numel(), dtype=g.dtype).view_as(g) for g in gradients]
    second = torch.autograd.grad(gradients, [*wanted, q], along, materialize_grads=True, allow_unused=True)
    return [loss, losses], gradients, second


def plain(tensors, labels, q):
    x0, x1, w0, w1, b = tensors
    losses = F.cross_entropy(x0 @ w0.T + x1 @ w1.T + b, labels, reduction="none")
    return q @ losses, losses


def chunked(tensors, labels, q, **flags):
    return cross_entropy.linear_cross_entropy(tensors[:2], tensors[2:4], tensors[4], labels, q, **flags)


@pytest.mark.parametrize("rows", [10, 3, 1])
@pytest.mark.parametrize("trained", TRAINED)
def test_two_derivatives_are_exact_in_chunks(trained, rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "chunk_elements", lambda device: 13 * rows)
    ours, theirs = (derivatives(TRAINED[trained], loss_of, scale=1.7) for loss_of in (chunked, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [10, 3])
def test_a_graph_without_values_has_the_same_derivatives(rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "chunk_elements", lambda device: 13 * rows)
    ours = derivatives(TRAINED["all"], lambda *args: chunked(*args, skip_values=True))
    theirs = derivatives(TRAINED["all"], plain)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-12, atol=1e-12)
    assert all((value == 0).all() for value in ours[1][2:4])


@pytest.mark.parametrize("rows", [10, 3])
def test_the_derivative_in_the_loss_weights_alone_needs_no_other(rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "chunk_elements", lambda device: 13 * rows)
    ours = derivatives(TRAINED["all"], lambda *args: chunked(*args, through_theta=False))
    theirs = derivatives(TRAINED["all"], plain)
    torch.testing.assert_close(ours[2][-1], theirs[2][-1], rtol=1e-12, atol=1e-12)


def test_half_precision_factors_give_float32_losses():
    (x0, x1, w0, w1, b), labels, q = factors(torch.float32)
    half = [tensor.bfloat16() for tensor in (x0, x1, w0, w1, b)]
    losses = chunked(half, labels, q)[1]
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, plain([tensor.float() for tensor in half], labels, q)[1], rtol=2e-2, atol=5e-2)
