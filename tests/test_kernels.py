"""The kernels of the sweeps against autograd's own, to the second derivative."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama import modeling_llama

from tests.tiny import make_model
from trl_dpg import kernels
from trl_dpg.kernels import activations, blocks
from trl_dpg.kernels.layers import lean_layers
from trl_dpg.kernels.rotary import Rotary


D = torch.float64


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=D)


MASK = (torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.4) | torch.eye(7, dtype=torch.bool)
QKV = [random(2, 4, 7, 8), random(2, 4, 7, 8) + 0.1, random(2, 4, 7, 8) - 0.1]
GROUPED = [QKV[0], random(2, 2, 7, 8), random(2, 2, 7, 8) + 0.1]
W1, W2 = random(5, 4), random(3, 5)


def attention(**kwargs):
    return lambda *qkv: F.scaled_dot_product_attention(*qkv, **kwargs)


CASES = {
    "silu": (F.silu, [4 * random(3, 5)]),
    "rms_norm": (lambda x, w: F.rms_norm(x, (8,), w, 1e-6), [random(2, 3, 8), random(8)]),
    "transposed silu": (lambda x: F.silu(x.transpose(1, 2)), [random(2, 3, 5)]),
    "learned mask": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), [*QKV, random(7, 7)]),
    "attention without heads": (attention(is_causal=True), [random(2, 7, 8), random(2, 7, 8) + 0.1, random(2, 7, 8)]),
    "rms_norm over two": (lambda x, w: F.rms_norm(x, (3, 8), w, 1e-6), [random(2, 3, 8), random(3, 8)]),
    "attention": (attention(), QKV),
    "causal": (attention(is_causal=True), QKV),
    "masked": (attention(attn_mask=MASK, scale=0.7), QKV),
    "additive mask": (attention(attn_mask=random(2, 4, 7, 7)), QKV),
    "grouped queries": (attention(is_causal=True, enable_gqa=True), GROUPED),
    "linear": (lambda x, w1, w2: F.linear(F.linear(x, w1).tanh(), w2), [random(2, 6, 4), W1, W2]),
    "linear with bias": (F.linear, [random(2, 6, 4), W1, random(5)]),
    "addmm": (torch.addmm, [random(5), random(6, 4), random(4, 5)]),
}


def derivatives(case, mode, through_theta=True):
    """Value, gradients, and the derivative of the gradients along fixed directions in the inputs and a weight."""
    function, inputs = CASES[case]
    inputs = [x.clone().requires_grad_() for x in inputs]
    with mode:
        value = function(*inputs)
        q = torch.linspace(-1, 1, value.numel(), dtype=D).view_as(value).requires_grad_()
        gradients = torch.autograd.grad((value.sin() * q).sum(), inputs, create_graph=True)
    along = [torch.linspace(-1, 2, g.numel(), dtype=D).view_as(g) for g in gradients]
    second = torch.autograd.grad(gradients, [*inputs, q] if through_theta else [q], along, materialize_grads=True)
    return value, gradients, second


@pytest.mark.parametrize("block", [1 << 20, 16])
@pytest.mark.parametrize("case", CASES)
def test_kernels_have_exact_second_derivatives(case, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    ours = derivatives(case, kernels.TwiceDifferentiable(through_theta=True, skip_values=False))
    torch.testing.assert_close(ours, derivatives(case, sdpa_kernel(SDPBackend.MATH)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_without_values_the_second_derivative_is_the_same(case):
    ours = derivatives(case, kernels.TwiceDifferentiable(through_theta=True, skip_values=True))
    theirs = derivatives(case, sdpa_kernel(SDPBackend.MATH))
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-12, atol=1e-12)
    if "linear" in case or case == "addmm":
        assert any((gradient == 0).all() for gradient in ours[1])


@pytest.mark.parametrize("case", CASES)
def test_the_derivative_in_the_weight_alone_needs_no_other(case):
    ours = derivatives(case, kernels.TwiceDifferentiable(through_theta=False, skip_values=True), through_theta=False)
    theirs = derivatives(case, sdpa_kernel(SDPBackend.MATH), through_theta=False)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "weight_of",
    [lambda v: v / v.norm(dim=1, keepdim=True), lambda v: (v @ v.mT @ v).float().double()],
    ids=["normalised", "product, cast"],
)
def test_a_weight_that_is_computed_from_parameters_keeps_its_gradients_value(weight_of):
    x, v = random(6, 4), random(5, 4).requires_grad_()

    def second(mode):
        with mode:
            value = F.linear(x, weight_of(v))
            (gradient,) = torch.autograd.grad(value.sin().sum(), v, create_graph=True)
        return torch.autograd.grad(gradient, v, torch.ones_like(v))[0]

    ours = second(kernels.TwiceDifferentiable(through_theta=True, skip_values=True))
    torch.testing.assert_close(ours, second(sdpa_kernel(SDPBackend.MATH)))


def test_rms_norm_layers_of_a_model_are_seen_and_left_as_they_were():
    model = make_model("qwen3", dtype=D)
    ids = torch.arange(12).view(2, 6)
    plain = model(ids).logits
    calls = []
    original = activations.RMSNorm.apply
    with pytest.MonkeyPatch.context() as patch, lean_layers(model):
        patch.setattr(activations.RMSNorm, "apply", lambda *args: calls.append(1) or original(*args))
        with kernels.TwiceDifferentiable(through_theta=True, skip_values=False):
            ours = model(ids).logits
    assert len(calls) == 9  # two layers of four, and the last one
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)  # transformers' own is float32 inside
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("transposed", [False, True])
def test_rotary_embeddings_have_exact_derivatives(transposed):
    x, cos, sin = random(2, 3, 5, 8).requires_grad_(), random(2, 1, 5, 8), random(2, 1, 5, 8)  # halves that differ
    if not transposed:
        usual, _ = modeling_llama.apply_rotary_pos_emb(x, x, cos[:, 0], sin[:, 0])
        torch.testing.assert_close(Rotary.apply(x, cos, sin, False), usual)
    assert gradcheck(lambda x: Rotary.apply(x, cos, sin, transposed), x)
    assert gradgradcheck(lambda x: Rotary.apply(x, cos, sin, transposed), x)


def test_rotary_embeddings_of_a_model_are_replaced_and_put_back():
    model, ids = make_model(dtype=D), torch.arange(12).view(2, 6)
    plain, usual = model(ids).logits, modeling_llama.apply_rotary_pos_emb
    query, angles = random(2, 3, 5, 4).requires_grad_(), random(2, 5, 4)
    with pytest.raises(KeyError), lean_layers(model):  # put back after an error, too
        embedded, _ = modeling_llama.apply_rotary_pos_emb(query, query, angles.cos(), angles.sin())
        assert "Rotary" in embedded.grad_fn.name()
        torch.testing.assert_close(model(ids).logits, plain)
        raise KeyError
    assert modeling_llama.apply_rotary_pos_emb is usual


def test_a_model_whose_module_is_not_registered_is_used_as_it_is():
    kind = type("Own", (torch.nn.Module,), {"__module__": "of_a_notebook", "forward": lambda self, x: 2 * x})
    with lean_layers(torch.nn.Sequential(kind())):
        assert kind()(1) == 2


def test_rows_that_see_nothing_are_finite():
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    mask[:, :, 3] = False
    with kernels.TwiceDifferentiable(through_theta=True, skip_values=False):
        value = F.scaled_dot_product_attention(*QKV, attn_mask=mask)
    assert value.isfinite().all()
