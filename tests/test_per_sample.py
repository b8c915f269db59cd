"""Scores out of the fine-tuning's own backward pass: exact, cheap, and never of the wrong sample."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from tests.test_metagradient import BENCHMARK, METRIC, RANDOM_WEIGHTS, SAMPLES, float64_scores, with_lora
from tests.tiny import make_model, make_samples
from tests.unroll import log_likelihood, relative_error, unroll
from trl_dpg import InnerLoopConfig, Student, metagradient
from trl_dpg.metagradients import gradient, per_sample, reverse, trajectory


PLAIN = dict(lr=1e-3, eps_root=1e-7)


def tuned(model, **kwargs):
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **kwargs))
    with torch.no_grad():  # adapters that start at zero would hide errors
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


STUDENTS = {  # and whether their samples are told apart
    "full": (lambda model: model, True),
    "lora": (with_lora, True),
    "head": (lambda model: tuned(model, target_modules=["c_attn", "lm_head"]), True),
    "saved": (lambda model: tuned(model, target_modules=["c_attn"], modules_to_save=["lm_head", "ln_f"]), True),
    "bias": (lambda model: tuned(model, target_modules=["c_fc", "c_proj"], bias="all"), True),
    "embedding": (lambda model: tuned(model, target_modules=["wte", "c_attn"]), False),
}


def two_adapters(model):
    model = tuned(model, target_modules=["c_attn", "c_fc"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["c_attn"]))
    model.base_model.set_adapter(["default", "second"])
    return model


STUDENTS["two adapters"] = (two_adapters, True)


@pytest.mark.parametrize("memory_budget", ["auto", 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("weights", [torch.ones(16), RANDOM_WEIGHTS], ids=["ones", "random"])
@pytest.mark.parametrize("kind", STUDENTS)
def test_float64_scores_are_exact(kind, weights, memory_budget):
    make, told_apart = STUDENTS[kind]
    model = make(make_model("gpt2", scale=1.0)).double()
    for batch_size, micro_batch_size in ((16, 5), (8, None)):  # T = 1 and 2
        exact, _, value, losses = unroll(
            model, SAMPLES, log_likelihood(BENCHMARK), weights, **PLAIN, batch_size=batch_size
        )
        config = InnerLoopConfig(
            learning_rate=1e-3,
            eps_root=1e-7,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            memory_budget=memory_budget,
        )
        assert relative_error(float64_scores(model, config, weights), exact) <= 1e-9
        student = Student(model)
        out = metagradient(student, SAMPLES, METRIC, config, weights=weights)
        assert out.metric_after == pytest.approx(value, rel=1e-9)
        assert out.losses.tolist() == pytest.approx(losses, rel=1e-6)
        assert student.tells_samples_apart is told_apart


def test_the_only_step_needs_no_graph_and_no_further_pass(monkeypatch):
    passes = []
    for module in (trajectory, reverse):
        monkeypatch.setattr(module, "micro_batch_gradient", lambda *_, **__: pytest.fail("a pass for a graph"))
    backward = per_sample._backward
    monkeypatch.setattr(per_sample, "_backward", lambda *a, **k: passes.append(k) or backward(*a, **k))
    student = Student(with_lora(make_model()).double())
    kept = metagradient(student, SAMPLES, METRIC, InnerLoopConfig(batch_size=16))
    assert len(passes) == 2  # one of them tests, once, whether samples are told apart
    metagradient(student, SAMPLES, METRIC, InnerLoopConfig(batch_size=16))
    assert len(passes) == 3
    monkeypatch.undo()
    token = metagradient(student, SAMPLES, METRIC, InnerLoopConfig(batch_size=16, per_token=True))
    assert relative_error(kept.scores, token.scores) <= 1e-6


def test_memory_for_the_samples_gradients_is_bounded(monkeypatch):
    sizes, kept = [], []
    size = per_sample.SampleGradients.bytes
    monkeypatch.setattr(per_sample.SampleGradients, "bytes", lambda *a: sizes.append(size(*a)) or sizes[-1])
    student, plan = Student(with_lora(make_model()).double()), dict(batch_size=16, micro_batch_size=2)
    everything = metagradient(student, SAMPLES, METRIC, InnerLoopConfig(**plan))
    budget = sum(sizes[:3])
    products = per_sample.SampleGradients.products
    monkeypatch.setattr(per_sample.SampleGradients, "products", lambda *a: kept.append(1) or products(*a))
    some = metagradient(student, SAMPLES, METRIC, InnerLoopConfig(**plan, memory_budget=budget))
    assert 0 < len(kept) <= 3
    assert relative_error(some.scores, everything.scores) <= 1e-6


@pytest.mark.parametrize("order", ["tokens first", "samples reversed"])
def test_a_model_that_reorders_its_rows_is_found_out(order):
    samples = make_samples(12, low=12, high=13)  # as many tokens as samples, so that no shape tells
    model = make_model("llama", scale=1.0).double()
    for layer in model.model.layers:
        forward = layer.mlp.forward
        turn = (lambda x: x.transpose(0, 1)) if order == "tokens first" else (lambda x: x.flip(0))
        layer.mlp.forward = lambda x, forward=forward, turn=turn: turn(forward(turn(x)))
    student = Student(model)
    out = metagradient(student, samples, METRIC, InnerLoopConfig(batch_size=12))
    assert student.tells_samples_apart is False
    token = metagradient(student, samples, METRIC, InnerLoopConfig(batch_size=12, per_token=True))
    assert relative_error(out.scores, token.scores) <= 1e-6


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "mistral"])
def test_families_are_covered(family):
    for model in (make_model(family), with_lora(make_model(family))):
        student = Student(model)
        metagradient(student, SAMPLES, METRIC, InnerLoopConfig(batch_size=16, gradient_checkpointing=True))
        assert student.tells_samples_apart


# -- first order -----------------------------------------------------------------------------------------------------


def first_order(model, samples, weights, lr, eps_root, batch_size, betas=(0.9, 0.95), eps=1e-8):
    """The yardstick: AdamW's steps as a function of the weights, with each sample's gradient a constant."""
    theta = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    names, sizes = list(theta), [p.numel() for p in theta.values()]
    flat = torch.cat([p.flatten() for p in theta.values()])
    w = torch.as_tensor(weights, dtype=flat.dtype).clone().requires_grad_()
    m = v = torch.zeros_like(flat)

    def parts(flat):
        return {n: x.view(theta[n].shape) for n, x in zip(names, flat.split(sizes), strict=True)}

    for t, first in enumerate(range(0, len(samples), batch_size)):
        rows, gradients = samples[first : first + batch_size], []
        for sample in rows:
            ids, leaves = torch.tensor([sample["input_ids"]]), parts(flat.detach().clone())
            leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
            logits = torch.func.functional_call(model, leaves, (ids,), {"use_cache": False}).logits
            loss = F.cross_entropy(logits[0, :-1], ids[0, 1:]) / len(rows)
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))]))
        g = w[first : first + batch_size] @ torch.stack(gradients)
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        root = (v / (1 - betas[1] ** (t + 1)) + eps_root).sqrt()
        flat = flat - lr * m / (1 - betas[0] ** (t + 1)) / (root + eps)
    return torch.autograd.grad(log_likelihood(BENCHMARK)(model, parts(flat), None), w)[0]


@pytest.mark.parametrize("memory_budget", ["auto", 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("weights", [torch.ones(16), RANDOM_WEIGHTS], ids=["ones", "random"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_first_order_scores_leave_out_the_hessian_and_nothing_else(lora, weights, memory_budget):
    model = make_model("gpt2", scale=1.0)
    model = (with_lora(model) if lora else model).double()
    expected = first_order(model, SAMPLES, weights, **PLAIN, batch_size=4)
    config = InnerLoopConfig(
        learning_rate=1e-3, eps_root=1e-7, batch_size=4, attribution="first_order", memory_budget=memory_budget
    )
    assert relative_error(float64_scores(model, config, weights), expected) <= 1e-9
    exact = unroll(model, SAMPLES, log_likelihood(BENCHMARK), weights, **PLAIN, batch_size=4)[0]
    assert relative_error(expected, exact) > 1e-4  # otherwise this shows nothing


def test_first_order_scores_with_one_step_are_the_exact_ones():
    student = Student(make_model())
    first, exact = (
        metagradient(student, SAMPLES, METRIC, InnerLoopConfig(batch_size=16, attribution=attribution))
        for attribution in ("first_order", "metagradient")
    )
    assert torch.equal(first.scores, exact.scores)


def test_first_order_needs_no_second_derivative(monkeypatch):
    def once(*arguments, differentiable=False, **kwargs):
        assert not differentiable
        return gradient.micro_batch_gradient(*arguments, **kwargs)

    monkeypatch.setattr(trajectory, "micro_batch_gradient", once)
    monkeypatch.setattr(reverse, "micro_batch_gradient", once)
    student = Student(with_lora(make_model()))
    student.model.config._attn_implementation_internal = "flash_attention_2"
    config = InnerLoopConfig(batch_size=4, attribution="first_order")
    monkeypatch.setattr(student.model.base_model.model, "set_attn_implementation", SimpleNamespace())
    with pytest.raises(ValueError, match="no second derivative"):
        metagradient(student, SAMPLES, METRIC, InnerLoopConfig(batch_size=4))
    student.model.config._attn_implementation_internal = "sdpa"
    assert metagradient(student, SAMPLES, METRIC, config).scores.abs().sum() > 0
