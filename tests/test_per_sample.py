"""Scores out of the fine-tuning's own backward pass: exact, cheap, and never of the wrong sample."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from tests.test_metagradient import BENCHMARK, METRIC, RANDOM_WEIGHTS, SAMPLES, float64_scores, with_lora
from tests.tiny import make_model, make_samples
from tests.unroll import log_likelihood, relative_error, unroll
from trl_dpg import InnerLoopConfig, Student, metagradient
from trl_dpg.kernels import TwiceDifferentiable
from trl_dpg.metagradients import per_sample, reverse, trajectory


PLAIN = dict(lr=1e-3, eps_root=1e-7)
EXACT_METRIC = log_likelihood(BENCHMARK)


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
    assert len(passes) == 1 and student.tells_samples_apart  # this was tested on what the pass kept
    metagradient(student, SAMPLES, METRIC, InnerLoopConfig(batch_size=16))
    assert len(passes) == 2
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


def test_one_wrong_layer_of_many_is_found_out():
    samples = make_samples(12, low=12, high=13)
    model = make_model("llama", scale=1.0)
    model.config.num_hidden_layers = 12
    model = type(model)(model.config).double()
    down = model.model.layers[5].mlp.down_proj
    forward = down.forward
    down.forward = lambda x: forward(x.flip(0)).flip(0)
    student = Student(model)
    metagradient(student, samples, METRIC, InnerLoopConfig(batch_size=12))
    assert student.tells_samples_apart is False


@pytest.mark.parametrize("first", ["one sample", "weights"])
def test_nothing_is_taken_for_granted_before_the_test(first):
    samples = make_samples(12, low=12, high=13)
    model = make_model("llama", scale=1.0).double()
    for layer in model.model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: forward(x.flip(0)).flip(0)
    student = Student(model)
    config = dict(batch_size=12, memory_budget=0)
    if first == "one sample":
        metagradient(student, samples[:1], METRIC, InnerLoopConfig(**config))
    weights = 2 * torch.rand(12, generator=torch.Generator().manual_seed(0))
    out = metagradient(student, samples, METRIC, InnerLoopConfig(**config), weights=weights)
    token = metagradient(student, samples, METRIC, InnerLoopConfig(**config, per_token=True), weights=weights)
    assert student.tells_samples_apart is False and out.metric_after == pytest.approx(token.metric_after, rel=1e-9)
    assert relative_error(out.scores, token.scores) <= 1e-6


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gpt2"])
def test_students_of_16_bits_are_covered(family):
    student = Student(make_model(family, dtype=torch.bfloat16))
    metagradient(student, SAMPLES, METRIC, InnerLoopConfig(batch_size=16))
    assert student.tells_samples_apart


def test_one_key_and_value_may_serve_all_heads():
    query, key, value = (torch.randn(2, heads, 5, 8, dtype=torch.float64) for heads in (4, 1, 1))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    with TwiceDifferentiable(through_theta=True, skip_values=False):
        ours = F.scaled_dot_product_attention(*inputs, is_causal=True)
    plain = F.scaled_dot_product_attention(*inputs, is_causal=True)
    target = torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad((y * target).sum(), inputs) for y in (ours, plain)), strict=True):
        assert torch.allclose(a, b)


def test_a_trained_module_in_two_places_is_refused():
    model = make_model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate_proj' are one and the same"):
        Student(model)


# -- first order -----------------------------------------------------------------------------------------------------


def first_order(model, samples, weights, lr, eps_root, batch_size, betas=(0.9, 0.95), eps=1e-8, metric=EXACT_METRIC):
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
    return torch.autograd.grad(metric(model, parts(flat), None), w)[0]


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


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_finite_differences_have_no_hessian_in_first_order_scores(lora):
    model = make_model("llama", scale=1.0)
    student = Student((with_lora(model) if lora else model).double())
    scores = [
        metagradient(
            student,
            SAMPLES,
            METRIC,
            InnerLoopConfig(batch_size=4, learning_rate=1e-2, eps_root=1e-7, attribution="first_order", **config),
        ).scores
        for config in (dict(), dict(hvp="finite_difference"), dict(hvp="finite_difference", per_token=True))
    ]
    assert relative_error(scores[1], scores[0]) <= 1e-5
    assert relative_error(scores[2], scores[0]) <= 1e-2


def test_first_order_takes_an_attention_without_a_second_derivative_unless_it_would_need_it():
    student = Student(with_lora(make_model()))
    first = dict(batch_size=4, attribution="first_order")
    expected = metagradient(student, SAMPLES, METRIC, InnerLoopConfig(**first)).scores
    student.model.config._attn_implementation_internal = "flash_attention_2"
    for config in (dict(batch_size=4), first | dict(per_token=True)):
        with pytest.raises(ValueError, match="no second derivative"):
            metagradient(student, SAMPLES, METRIC, InnerLoopConfig(**config))
    student.tells_samples_apart = False
    student.model.config._attn_implementation_internal = "sdpa"
    fallback = metagradient(student, SAMPLES, METRIC, InnerLoopConfig(**first)).scores
    assert relative_error(fallback, expected) <= 1e-3
