"""Many metrics at once: the scores of each are those of a call of its own, and the fine-tuning is shared."""

from dataclasses import replace

import pytest
import torch

from tests.small_runs import CONFIG, PROMPTS, TEXTS, make_student
from tests.test_metagradient import BENCHMARK, METRIC, RANDOM_WEIGHTS, SAMPLES, detached, float64_scores, with_lora
from tests.test_per_sample import STUDENTS, first_order
from tests.tiny import make_model, make_samples
from tests.unroll import log_likelihood, relative_error, unroll
from trl_dpg import DPGReward, InnerLoopConfig, Student, metagradient
from trl_dpg.metagradients import MetagradientOutputs, per_sample, reverse, trajectory
from trl_dpg.metagradients.fine_tuning import FineTuning
from trl_dpg.metagradients.trajectory import forward_sweep
from trl_dpg.metrics import CombinedMetric, LanguageModelingMetric, WeightNormMetric


OTHER = make_samples(3, seed=6)
METRICS = {  # and how the yardstick computes them
    "benchmark": (METRIC, log_likelihood(BENCHMARK)),
    "size": (
        lambda student: -student.theta.square().sum(),
        lambda model, theta, initial: -sum(p.square().sum() for p in theta.values()),
    ),
    "other": (LanguageModelingMetric(OTHER), log_likelihood(OTHER)),
}
OURS = {name: ours for name, (ours, _) in METRICS.items()}
CASES = {
    "one step": dict(batch_size=16),
    "adamw": dict(weight_decay=0.3),
    "sgd": dict(optimizer="sgd", lr=0.3, momentum=0.9, weight_decay=0.1),
    "clipped": dict(max_grad_norm=0.3),
    "epochs": dict(order=list(range(16)) * 2, batch_size=8),
}


@pytest.mark.parametrize("memory_budget", ["auto", 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_float64_scores_of_each_metric_are_exact(case, lora, memory_budget):
    model = make_model("gpt2", scale=1.0)
    model = (with_lora(model) if lora else model).double()
    plain = dict(lr=1e-3, batch_size=4, eps_root=1e-7) | CASES[case]
    ours = {"learning_rate" if key == "lr" else key: value for key, value in plain.items() if key != "order"}
    if case == "epochs":
        ours["num_epochs"] = 2
    config = InnerLoopConfig(**ours, memory_budget=memory_budget, micro_batch_size=3)
    found = float64_scores(model, config, RANDOM_WEIGHTS, OURS)
    for row, (_, metric) in zip(found, METRICS.values(), strict=True):
        assert relative_error(row, unroll(model, SAMPLES, metric, RANDOM_WEIGHTS, **plain)[0]) <= 1e-9


@pytest.mark.parametrize("memory_budget", ["auto", 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("batch_size", [4, 16])
def test_first_order_scores_of_each_metric_are_exact(batch_size, lora, memory_budget):
    model = make_model("gpt2", scale=1.0)
    model = (with_lora(model) if lora else model).double()
    plain = dict(eps_root=1e-7, batch_size=batch_size)
    config = InnerLoopConfig(**plain, learning_rate=1e-3, attribution="first_order", memory_budget=memory_budget)
    found = float64_scores(model, config, RANDOM_WEIGHTS, OURS)
    for row, (_, metric) in zip(found, METRICS.values(), strict=True):
        expected = first_order(model, SAMPLES, RANDOM_WEIGHTS, 1e-3, **plain, metric=metric)
        assert relative_error(row, expected) <= 1e-9


SETTINGS = {
    "plain": dict(),
    "one step": dict(batch_size=16),
    "recomputed": dict(memory_budget=0),
    "one step, recomputed": dict(batch_size=16, memory_budget=0, micro_batch_size=5),
    "tokens": dict(per_token=True),
    "checkpoints": dict(checkpoint_interval=2, memory_budget=0),
    "block checkpoints": dict(gradient_checkpointing=True),
    "block checkpoints, recomputed": dict(gradient_checkpointing=True, memory_budget=0),
    "first order, tokens": dict(attribution="first_order", per_token=True),
    "finite differences": dict(hvp="finite_difference"),
    "dataset": dict(attribution="dataset"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma"])
def test_each_output_is_that_of_a_call_of_its_own(family, setting):
    model = make_model(family, scale=1.0)
    student = Student((with_lora(model) if family == "llama" else model).double())
    config = InnerLoopConfig(**dict(batch_size=4, learning_rate=1e-3, eps_root=1e-7) | SETTINGS[setting])
    together = metagradient(student, SAMPLES, OURS, config, weights=RANDOM_WEIGHTS)
    assert isinstance(together, MetagradientOutputs) and list(together) == list(together.scores) == list(OURS)
    for name, metric in OURS.items():
        alone, own = metagradient(student, SAMPLES, metric, config, weights=RANDOM_WEIGHTS), together[name]
        assert relative_error(own.scores, alone.scores) <= 1e-6 and torch.equal(own.losses, alone.losses)
        assert (own.metric_before, own.metric_after) == (alone.metric_before, alone.metric_after)
        assert own.proxies == alone.proxies and together.scores[name] is own.scores
        assert (own.token_scores is None) == (alone.token_scores is None)
        if own.token_scores is not None:
            assert relative_error(own.token_scores, alone.token_scores) <= 1e-6


@pytest.mark.parametrize("memory_budget", ["auto", 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("chunk", [None, 40], ids=["in one piece", "in pieces"])
@pytest.mark.parametrize("kind", STUDENTS)
def test_one_step_of_every_kind_of_student(kind, chunk, memory_budget, monkeypatch):
    if chunk is not None:
        for module in ("cross_entropy", "sample_gradients"):
            monkeypatch.setattr(f"trl_dpg.kernels.{module}.chunk_elements", lambda device: chunk)
    student = Student(STUDENTS[kind][0](make_model("gpt2", scale=1.0)).double())
    config = InnerLoopConfig(batch_size=16, micro_batch_size=5, memory_budget=memory_budget)
    together = metagradient(student, SAMPLES, OURS, config)
    for name, metric in OURS.items():
        assert relative_error(together.scores[name], metagradient(student, SAMPLES, metric, config).scores) <= 1e-6


def test_metrics_share_all_passes_but_the_second_derivative(monkeypatch):
    calls = []

    def count(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or original(*a, **k))

    count(trajectory, "micro_batch_gradient")
    count(reverse, "micro_batch_gradient")
    count(per_sample, "_backward")
    count(reverse, "_pull_back")
    student = Student(with_lora(make_model()))
    for batch_size in (4, 16):
        config = InnerLoopConfig(batch_size=batch_size, memory_budget=0)
        metagradient(student, SAMPLES, METRIC, config)  # tests the student
        numbers = []
        for metric in (METRIC, OURS):
            calls.clear()
            metagradient(student, SAMPLES, metric, config)
            numbers.append({name: calls.count(name) for name in set(calls)})
        one, three = numbers
        assert three.pop("_pull_back", 0) == 3 * one.pop("_pull_back", 0) == 9 * (batch_size == 4)
        assert one == three


def test_each_metric_is_evaluated_once_after_the_fine_tuning():
    calls = []

    def counted(name):
        return lambda student: calls.append(name) or METRIC(student)

    metrics = {name: counted(name) for name in "ab"}
    out = metagradient(Student(make_model()), SAMPLES, metrics, metric_before={"a": -5.0})
    assert calls == ["b", "a", "b"]
    assert out["a"].metric_before == -5.0 and out["b"].metric_before != -5.0


def test_cotangents_of_further_metrics_are_part_of_the_plan_of_memory(monkeypatch):
    student = Student(make_model(scale=1.0))
    plan = FineTuning(student, SAMPLES, InnerLoopConfig(batch_size=2))
    weights, size = torch.ones(len(SAMPLES)), student.initial_theta().nbytes
    monkeypatch.setattr(trajectory, "free_memory", lambda device: 100 * size)
    one, ten = (forward_sweep(student, plan.steps, weights, plan.config, num_metrics=number) for number in (1, 10))
    assert one.budget - ten.budget == 9 * 4 * size // 4
    many = forward_sweep(student, plan.steps, weights, plan.config, num_metrics=18)
    assert len(one.checkpoints) == 0 < len(many.checkpoints)  # 8 states no longer fit


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ({}, "mapping of metrics is empty"),
        ({"good": METRIC, "number": 3.0}, "'number' must be a callable .*got 3.0"),
        ({"good": METRIC, 1: METRIC}, "must be texts, got 1"),
        (3.0, "The metric must be a callable .*got 3.0"),
        ({"good": METRIC, "bad": lambda student: METRIC(student) * torch.nan}, "'bad' of the student before .*is nan"),
        ({"good": METRIC, "bad": detached}, "'bad' .* is not differentiable"),
        ({"good": METRIC, "bad": lambda student: 1.0}, "'bad' returned 1.0"),
    ],
)
def test_bad_metrics_are_named_before_any_training(metric, message, monkeypatch):
    monkeypatch.setattr(FineTuning, "sweep", lambda *a, **k: pytest.fail("training"))
    with pytest.raises(ValueError, match=message):
        metagradient(Student(make_model()), SAMPLES, metric)


def test_a_metric_that_is_not_finite_afterwards_is_named():
    calls = []

    def bad(student):
        calls.append(1)
        return METRIC(student) * (1.0 if len(calls) == 1 else torch.inf)

    with pytest.raises(FloatingPointError, match="'bad' of the fine-tuned student is -inf"):
        metagradient(Student(make_model()), SAMPLES, {"good": METRIC, "bad": bad})


# -- combined metrics -------------------------------------------------------------------------------------------------


PARTS = [METRIC, WeightNormMetric(), LanguageModelingMetric(OTHER)]


@pytest.mark.parametrize("batch_size", [4, 16])
def test_a_combined_metric_scores_its_parts_in_passing(batch_size):
    config = InnerLoopConfig(batch_size=batch_size, learning_rate=1e-3, eps_root=1e-7)
    student = Student(make_model(scale=1.0).double())
    combined = CombinedMetric(PARTS, [1.0, -0.5, 2.0], score_parts=True)
    out = metagradient(student, SAMPLES, combined, config)
    names = ["LanguageModelingMetric", "WeightNormMetric", "LanguageModelingMetric_2"]
    assert list(out.part_scores) == combined.names == names
    for name, part in zip(names, PARTS, strict=True):
        alone = metagradient(student, SAMPLES, part, config)
        assert relative_error(out.part_scores[name], alone.scores) <= 1e-6 and alone.part_scores == {}
    combined.score_parts = None  # the default: where it is free
    assert bool(metagradient(student, SAMPLES, combined, config).part_scores) == (batch_size == 16)
    first_order = replace(config, attribution="first_order")
    assert metagradient(student, SAMPLES, combined, first_order).part_scores
    assert not metagradient(student, SAMPLES, combined, replace(config, per_token=True)).part_scores
    combined.score_parts = False
    whole = metagradient(student, SAMPLES, combined, config)
    assert relative_error(out.scores, whole.scores) <= 1e-6 and whole.part_scores == {}
    assert (out.metric_after, out.proxies) == (whole.metric_after, whole.proxies)


def test_a_part_that_does_not_depend_on_the_student_scores_zero():
    combined = CombinedMetric(
        [METRIC, WeightNormMetric("model.norm.weight")], score_parts=True, names=["texts", "norm"]
    )
    out = metagradient(Student(with_lora(make_model())), SAMPLES, combined)
    assert torch.equal(out.scores, out.part_scores["texts"]) and (out.part_scores["norm"] == 0).all()


class Product(CombinedMetric):
    def combine(self, parts):
        super().combine(parts)
        return parts[0] * parts[1]


def test_a_subclass_that_combines_its_parts_otherwise_is_differentiated_as_a_whole():
    student, config = Student(make_model(scale=1.0).double()), InnerLoopConfig(batch_size=16)
    out = metagradient(student, SAMPLES, Product(PARTS[:2]), config)
    plain = metagradient(student, SAMPLES, lambda student: PARTS[0](student) * PARTS[1](student), config)
    assert torch.equal(out.scores, plain.scores) and out.part_scores == {}


@pytest.mark.parametrize("groups", [True, False])
def test_the_reward_logs_the_spread_of_each_part(groups):
    metric = CombinedMetric(
        [LanguageModelingMetric(["w1 w2"]), WeightNormMetric()], [1.0, 0.0], True, ["texts", "norm"]
    )
    settings = dict() if groups else dict(cross_group_batching=False, num_generations=2)
    logged, columns = {}, {}
    config = replace(CONFIG, batch_size=2)
    reward = DPGReward(make_student(), metric, config, **settings)
    reward(PROMPTS, TEXTS, log_metric=logged.__setitem__, log_extra=columns.__setitem__)
    assert logged["dpg/score/std/texts"] == pytest.approx(logged["dpg/score/std"])
    datasets = [TEXTS] if groups else [TEXTS[0::2], TEXTS[1::2]]
    alone = torch.cat([metagradient(make_student(), texts, metric.metrics[1], config).scores for texts in datasets])
    assert logged["dpg/score/std/norm"] == pytest.approx(alone.std(correction=0).item(), rel=1e-4)


def test_a_combined_metric_needs_a_name_for_each_part():
    with pytest.raises(ValueError, match="as many names as metrics, got 1 and 3"):
        CombinedMetric(PARTS, names=["one"])
    assert CombinedMetric(PARTS, names=["a", "b", "a"]).names == ["a", "b", "a_2"]
    with pytest.raises(ValueError, match=r"different names, got .*a_2.*a_2"):
        CombinedMetric(PARTS, names=["a", "a_2", "a"])


@pytest.mark.parametrize("before", [-5.0, {"c": -5.0}])
def test_known_values_of_other_metrics_are_refused(before):
    with pytest.raises(ValueError, match="`metric_before` must be a dictionary with names of the metrics"):
        metagradient(Student(make_model()), SAMPLES, {"a": PARTS[0], "b": PARTS[1]}, metric_before=before)
    with pytest.raises(ValueError, match="of a single metric must be a number"):
        metagradient(Student(make_model()), SAMPLES, PARTS[0], metric_before={"a": -5.0})
