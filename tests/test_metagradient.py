"""Scores against an independent float64 unroll, and what must hold of them."""

import itertools
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef

from tests.tiny import FAMILIES, VOCAB, LiveStorages, make_model, make_samples, make_tokenizer
from tests.unroll import cosine_lrs, log_likelihood, relative_error, unroll
from trl_dpg import FinetunedStudent, InnerLoopConfig, Student, metagradient
from trl_dpg.kernels import cross_entropy
from trl_dpg.metagradients import memory, reverse, trajectory
from trl_dpg.metagradients.batches import plan_steps
from trl_dpg.metagradients.fine_tuning import FineTuning
from trl_dpg.metagradients.trajectory import forward_sweep
from trl_dpg.metrics import LanguageModelingMetric, WeightNormMetric


BENCHMARK = make_samples(4, seed=5)
SAMPLES = make_samples(16)
METRIC = LanguageModelingMetric(BENCHMARK)
RANDOM_WEIGHTS = 2 * torch.rand(16, generator=torch.Generator().manual_seed(7)) * (torch.arange(16) % 3 != 0)
EPS_ROOT = 1e-7  # where a plain float32 unroll itself is good to 1e-4


def with_lora(model, **kwargs):
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **kwargs))


LEAN = dict(gradient_checkpointing=True)  # and three tokens of the vocabulary at a time, two stretches of steps


@pytest.mark.parametrize(
    ("lora", "families"),
    [
        pytest.param(False, list(FAMILIES), id="full", marks=pytest.mark.faults),
        pytest.param(True, list(FAMILIES), id="lora", marks=pytest.mark.faults),
        pytest.param(True, ["llama", "gpt2"], id="lora-two-families"),
    ],
)
def test_scores_are_as_accurate_as_a_plain_float32_unroll(lora, families):
    samples, log_ratios = SAMPLES[:8], {}
    points = [(8, torch.ones(8)), *((batch_size, RANDOM_WEIGHTS[:8]) for batch_size in (8, 2, 1))]  # T = 1, 1, 4, 8
    cells = itertools.product(families, [("adamw", 1e-3), ("sgd", 0.1)], points)
    for family, (optimizer, lr), (batch_size, weights) in cells:
        model = make_model(family, scale=4.0 if family == "gemma3" else 1.0)
        model = with_lora(model) if lora else model
        plain = dict(optimizer=optimizer, lr=lr, batch_size=batch_size, eps_root=EPS_ROOT, momentum=0.9)
        exact = unroll(model, samples, log_likelihood(BENCHMARK), weights, **plain)[0]
        single = log_likelihood(BENCHMARK, torch.float32)
        float32 = unroll(model, samples, single, weights, dtype=torch.float32, **plain)[0]
        config = plain | dict(learning_rate=lr)
        del config["lr"]
        ours = {"default": metagradient(Student(model), samples, METRIC, InnerLoopConfig(**config), weights=weights)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cross_entropy, "chunk_elements", lambda device: 3 * VOCAB)
            lean = InnerLoopConfig(**config, **LEAN, checkpoint_interval=max(1, 4 // batch_size))
            ours["lean"] = metagradient(Student(model), samples, METRIC, lean, weights=weights)
        for way, out in ours.items():
            error = relative_error(out.scores, exact)
            assert error <= 2e-4, (way, family, optimizer, batch_size)
            log_ratio = math.log(error / relative_error(float32, exact))
            log_ratios.setdefault((way, family, optimizer), []).append(log_ratio)
    # Rounding is random: one cell's ratio says little (0.1 to 10), the geometric means do.
    means = {cell: math.exp(sum(values) / len(values)) for cell, values in log_ratios.items()}
    assert max(means.values()) <= 4, means
    for way in ("default", "lean"):
        logs = [math.log(mean) for (which, *_), mean in means.items() if which == way]
        overall = math.exp(sum(logs) / len(logs))
        print(way, overall)
        assert overall <= 1.5, means


FLOAT64_CASES = {
    "adamw": dict(),
    "weight_decay": dict(weight_decay=0.3),
    "eps_root_zero": dict(eps_root=0.0, eps=1e-3),
    "sgd": dict(optimizer="sgd", lr=0.3, momentum=0.9, weight_decay=0.1),
    "clipped": dict(max_grad_norm=0.3),
    "not_clipped": dict(max_grad_norm=1e6),
    "max_length": dict(normalization="max_length"),
    "batch_tokens": dict(normalization="batch_tokens"),
    "epochs": dict(order=list(range(16)) * 2, batch_size=8),
    "cosine": dict(lrs=cosine_lrs(1e-3, 4, 2)),
}
OUR_NAMES = {"lr": "learning_rate", "normalization": "loss_normalization"}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("weights", [torch.ones(16), RANDOM_WEIGHTS], ids=["ones", "random"])
@pytest.mark.parametrize("case", FLOAT64_CASES)
def test_float64_scores_are_exact(case, weights, lora):
    model = make_model("gpt2", scale=1.0)  # the one family without float32 internals
    model = (with_lora(model) if lora else model).double()
    plain = dict(lr=1e-3, batch_size=4, eps_root=EPS_ROOT) | FLOAT64_CASES[case]
    exact, exact_tokens, value, losses = unroll(model, SAMPLES, log_likelihood(BENCHMARK), weights, **plain)
    ours = {OUR_NAMES.get(key, key): value for key, value in plain.items() if key not in ("order", "lrs")}
    if case == "epochs":
        ours["num_epochs"] = 2
    if case == "cosine":
        ours |= dict(lr_scheduler_type="cosine", warmup_steps=2)
    config = InnerLoopConfig(**ours, max_length=16, per_token=True)
    out = metagradient(Student(model), SAMPLES, METRIC, config, weights=weights)
    assert relative_error(float64_scores(model, config, weights), exact) <= 1e-9
    assert relative_error(out.token_scores, exact_tokens) <= 1e-6  # returned in float32
    assert out.metric_after == pytest.approx(value, rel=1e-9)
    assert out.losses.tolist() == pytest.approx(losses, rel=1e-6)


def float64_scores(model, config, weights, metric=METRIC):
    """Scores before they are rounded to float32 on return: `[N]` or, of several metrics, `[M, N]`."""
    from trl_dpg.metagradients import metagradient as module_function

    kept = {}
    original = module_function.__globals__["reverse_sweep"]

    def keep(trajectory, gradients, scores, token_scores):
        original(trajectory, gradients, scores, token_scores)
        kept["scores"] = scores + token_scores.sum(dim=-1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module_function.__globals__, "reverse_sweep", keep)
        module_function(Student(model), SAMPLES, metric, config, weights=weights)
    return kept["scores"] if isinstance(metric, dict) else kept["scores"][0]


def test_token_scores_sum_to_the_samples_score():
    out = metagradient(Student(make_model()), SAMPLES, METRIC, InnerLoopConfig(per_token=True), weights=RANDOM_WEIGHTS)
    assert out.token_scores.shape == (16, max(len(sample["input_ids"]) for sample in SAMPLES))
    torch.testing.assert_close(out.token_scores.sum(dim=1), out.scores, rtol=1e-4, atol=1e-6)
    for scores, sample in zip(out.token_scores, SAMPLES, strict=True):
        assert scores[0] == 0 and (scores[len(sample["input_ids"]) :] == 0).all()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batches_do_not_change_the_numbers(micro_batch_size):
    def scores(**kwargs):
        config = InnerLoopConfig(learning_rate=1e-3, eps_root=EPS_ROOT, batch_size=8, **kwargs)
        return metagradient(Student(make_model(scale=1.0)), SAMPLES, METRIC, config).scores

    assert relative_error(scores(micro_batch_size=micro_batch_size), scores()) <= 5e-5


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_retained_graphs_do_not_change_the_numbers(lora, micro_batch_size, monkeypatch):
    recomputed = []
    original = reverse.micro_batch_gradient
    monkeypatch.setattr(
        reverse, "micro_batch_gradient", lambda *args, **kwargs: recomputed.append(1) or original(*args, **kwargs)
    )

    def scores(memory_budget):
        recomputed.clear()
        model = make_model(scale=1.0)
        config = InnerLoopConfig(
            learning_rate=1e-3,
            eps_root=EPS_ROOT,
            batch_size=4,
            micro_batch_size=micro_batch_size,
            memory_budget=memory_budget,
            max_grad_norm=0.5,
        )
        out = metagradient(Student(with_lora(model) if lora else model), SAMPLES, METRIC, config, RANDOM_WEIGHTS)
        return out.scores, len(recomputed)

    none_kept, recomputed_all = scores(0)
    all_kept, recomputed_none = scores("auto")
    some_kept, recomputed_some = scores(1_000_000)
    assert relative_error(all_kept, none_kept) <= 5e-5 and relative_error(some_kept, none_kept) <= 5e-5
    assert recomputed_none == 0 < recomputed_some < recomputed_all


@pytest.mark.parametrize("memory_budget", [0, "auto"])
def test_gradient_checkpointing_does_not_change_the_numbers(memory_budget):
    def scores(checkpointing):
        model = with_lora(make_model(scale=1.0))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        config = InnerLoopConfig(learning_rate=1e-3, eps_root=EPS_ROOT, batch_size=4, memory_budget=memory_budget)
        return metagradient(Student(model), SAMPLES, METRIC, config).scores

    assert relative_error(scores(True), scores(False)) <= 5e-5


@pytest.mark.parametrize("memory_budget", [0, "auto"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_checkpoints_do_not_change_the_numbers(optimizer, memory_budget):
    def scores(interval):
        config = InnerLoopConfig(
            optimizer=optimizer,
            learning_rate=1e-3,
            eps_root=EPS_ROOT,
            momentum=0.9,
            batch_size=3,
            checkpoint_interval=interval,
            memory_budget=memory_budget,
        )
        out = metagradient(Student(make_model(scale=1.0)), SAMPLES, METRIC, config, RANDOM_WEIGHTS)
        assert len(out.losses) == 6
        return out.scores

    every_state_kept = scores(1)
    for interval in (2, 4, 5, 6, 100):
        assert relative_error(scores(interval), every_state_kept) <= 5e-5, interval


@pytest.mark.parametrize(("free", "kept"), [(10**12, [9]), (10**5, [3, 3, 3])], ids=["plenty", "scarce"])
def test_scarce_memory_holds_the_square_root_of_the_states(free, kept, monkeypatch):
    monkeypatch.setattr(trajectory, "free_memory", lambda device: free)
    student = Student(make_model(scale=1.0))
    config = InnerLoopConfig(batch_size=2)
    steps = plan_steps(student, student.tokenize(make_samples(18), 64), config)
    forwards = forward_sweep(student, steps, torch.ones(18), config)
    assert [len(stretch.steps) for stretch in forwards.stretches_backwards()] == kept


@pytest.mark.parametrize("memory_budget", [1, "auto"])
def test_no_graph_outlives_its_call(memory_budget, monkeypatch):
    saved = []
    count = memory.GraphSize._count

    def record(self, tensor):
        saved.append(StorageWeakRef(tensor.untyped_storage()))
        return count(self, tensor)

    monkeypatch.setattr(memory.GraphSize, "_count", record)
    model = make_model("gpt2", scale=1.0)  # its activation saves what tanh returns
    metagradient(Student(model), SAMPLES, METRIC, InnerLoopConfig(memory_budget=memory_budget))
    weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
    assert len(saved) > 50 and not [ref for ref in saved if not ref.expired() and ref not in weights]


def test_a_checkpoint_interval_below_one_raises():
    with pytest.raises(ValueError, match="checkpoint_interval must be 'auto' or at least 1, got 0"):
        InnerLoopConfig(checkpoint_interval=0)


def test_a_bfloat16_base_with_float32_adapters_agrees_with_float32():
    """The bar of the number formats: Pearson 0.995 with the scores of the float32 model."""
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        model = with_lora(make_model(scale=1.0).to(torch.bfloat16).to(dtype))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        config = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-5, batch_size=4)
        scores.append(metagradient(Student(model), SAMPLES, METRIC, config).scores)
    assert torch.corrcoef(torch.stack(scores))[0, 1] >= 0.995


def test_a_budget_and_micro_batches_bound_what_is_kept():
    def kept(budget, samples):
        student = Student(make_model(scale=1.0), make_tokenizer())
        config = InnerLoopConfig(batch_size=8, micro_batch_size=1, memory_budget=budget)
        steps = plan_steps(student, student.tokenize(samples, 64), config)
        forwards = forward_sweep(student, steps, torch.ones(len(samples)), config)
        retained = [step.retained for step in next(forwards.stretches_backwards()).steps]
        return [sum(part is not None for part in parts) for parts in retained]

    assert kept(1, SAMPLES) == [0, 0]  # not one graph fits
    assert kept(10**9, SAMPLES) == [8, 8]
    empty_first = ["", ""] * 4 + ["w1 w2 w3"] * 8
    assert kept(1, empty_first) == [0, 0] and kept(10**9, empty_first) == [0, 8]


LONG_FIRST, SHORT_FIRST, MIXED = [60, *[6] * 23], [*[6] * 23, 60], [6, 60] * 12


@pytest.mark.parametrize(
    ("lengths", "blocks"),
    [
        (LONG_FIRST, False),
        (SHORT_FIRST, False),
        (MIXED, False),
        (MIXED, True),
        pytest.param(LONG_FIRST, True, marks=pytest.mark.faults),
        pytest.param(SHORT_FIRST, True, marks=pytest.mark.faults),
    ],
)
def test_a_budget_bounds_the_graphs_of_ragged_batches(lengths, blocks):
    generator = torch.Generator().manual_seed(0)
    samples = [{"input_ids": torch.randint(0, VOCAB, (length,), generator=generator).tolist()} for length in lengths]
    student = Student(make_model(scale=1.0))

    def live(budget):
        config = InnerLoopConfig(batch_size=1, memory_budget=budget, gradient_checkpointing=blocks)
        steps = plan_steps(student, student.tokenize(samples, 64), config)
        with LiveStorages() as storages:
            forwards = forward_sweep(student, steps, torch.ones(len(samples)), config)
        assert len(forwards.losses) == len(lengths)
        return storages.live()

    states = live(0)
    everything = live(10**9) - states
    for share in (0.1, 0.4, 0.8):
        kept = live(int(share * everything)) - states
        assert 0.5 * share * everything < kept < share * everything, share


def test_a_fine_tuning_that_is_not_reversed_keeps_no_states():
    student = Student(make_model(scale=1.0))
    size = student.initial_theta().nbytes
    config = InnerLoopConfig(batch_size=1)

    def peak(num_samples):
        fine_tuning = FineTuning(student, SAMPLES[:1] * num_samples, config)
        with LiveStorages() as storages:
            fine_tuning.theta(torch.ones(num_samples))
        return storages.peak

    assert peak(16) - peak(4) < 2 * size
    naive = InnerLoopConfig(batch_size=1, attribution="dataset")
    with LiveStorages() as storages:
        metagradient(student, SAMPLES[:1] * 16, METRIC, naive)
    assert storages.peak - peak(4) < 8 * size


def test_finite_differences_of_half_precision_parameters_raise():
    with pytest.raises(ValueError, match="half precision"):
        metagradient(
            Student(make_model(dtype=torch.bfloat16)), SAMPLES, METRIC, InnerLoopConfig(hvp="finite_difference")
        )


def test_finite_differences_at_a_learning_rate_of_zero_are_zero():
    config = InnerLoopConfig(
        optimizer="sgd",
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        batch_size=16,
        hvp="finite_difference",
    )
    assert (metagradient(Student(make_model(scale=50.0)), SAMPLES, WeightNormMetric(), config).scores == 0).all()


def test_the_callers_modes_do_not_change_the_numbers():
    student, config = Student(make_model(scale=1.0)), InnerLoopConfig(batch_size=4)
    expected = metagradient(student, SAMPLES, METRIC, config).scores
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert torch.equal(metagradient(student, SAMPLES, METRIC, config).scores, expected)


def test_finite_differences_agree_with_double_backward():
    def scores(hvp):
        config = InnerLoopConfig(learning_rate=1e-3, eps_root=EPS_ROOT, batch_size=4, hvp=hvp)
        return metagradient(Student(make_model("gpt2", scale=1.0).double()), SAMPLES, METRIC, config).scores

    exact, differences = scores("double_backward"), scores("finite_difference")
    assert 0 < relative_error(differences, exact) <= 1e-4


def test_shuffled_epochs_score_as_the_same_order_given_by_hand():
    student = Student(make_model(scale=1.0))
    config = InnerLoopConfig(shuffle=True, num_epochs=2, seed=3, batch_size=8, learning_rate=1e-3, eps_root=EPS_ROOT)
    generator = torch.Generator().manual_seed(3)
    order = [i for _ in range(2) for i in torch.randperm(16, generator=generator).tolist()]
    by_hand = InnerLoopConfig(batch_size=8, learning_rate=1e-3, eps_root=EPS_ROOT)
    separate = metagradient(student, [SAMPLES[i] for i in order], METRIC, by_hand).scores
    summed = torch.zeros(16).index_add_(0, torch.tensor(order), separate)
    assert relative_error(metagradient(student, SAMPLES, METRIC, config).scores, summed) <= 5e-5


def test_a_ragged_last_batch_is_scored():
    model = make_model("gpt2", scale=1.0)
    kwargs = dict(batch_size=6, lr=1e-3, eps_root=EPS_ROOT)
    exact = unroll(model, SAMPLES, log_likelihood(BENCHMARK), torch.ones(16), **kwargs)[0]
    out = metagradient(
        Student(model), SAMPLES, METRIC, InnerLoopConfig(batch_size=6, learning_rate=1e-3, eps_root=EPS_ROOT)
    )
    assert len(out.losses) == 3
    assert relative_error(out.scores, exact) <= 2e-4


def test_a_sample_with_weight_zero_still_has_a_score():
    weights = torch.ones(16)
    weights[0] = 0.0
    config = InnerLoopConfig(optimizer="sgd", learning_rate=0.1)
    assert metagradient(Student(make_model()), SAMPLES, METRIC, config, weights=weights).scores[0] != 0


def test_predicted_changes_match_actual_ones():
    torch.manual_seed(0)
    student = Student(make_model("llama", scale=1.0))
    config = InnerLoopConfig(learning_rate=1e-3, batch_size=4, eps_root=1e-6)
    out = metagradient(student, SAMPLES, METRIC, config)
    predicted, actual = [], []
    for _ in range(20):
        direction = torch.randn(16)
        direction *= 0.1 / direction.norm()
        predicted.append((out.scores @ direction).item())
        moved = metagradient(student, SAMPLES, METRIC, config, weights=1 + direction)
        actual.append(moved.metric_after - out.metric_after)
    assert torch.corrcoef(torch.tensor([predicted, actual]))[0, 1] >= 0.99


def test_zero_adapters_and_eps_root_zero_give_finite_scores():
    # LoRA's B = 0 makes A's first gradient exactly 0, where Adam's step with eps_root = 0 has no derivative.
    out = metagradient(Student(with_lora(make_model())), SAMPLES, METRIC, InnerLoopConfig(eps_root=0.0))
    assert out.scores.isfinite().all()


def test_dataset_attribution_gives_every_sample_the_metric():
    out = metagradient(Student(make_model()), SAMPLES, METRIC, InnerLoopConfig(attribution="dataset", per_token=True))
    assert (out.scores == torch.tensor(out.metric_after)).all()
    assert out.token_scores is None


def test_empty_samples_score_zero_and_train_nothing():
    student = Student(make_model(), processing_class=make_tokenizer())
    texts = ["w1 w2 w3", "", "w4 w5"]
    config = InnerLoopConfig(batch_size=3, per_token=True)
    out = metagradient(student, texts, METRIC, config)
    assert out.scores[1] == 0 and out.num_empty == 1 and (out.scores[[0, 2]] != 0).all()
    assert (metagradient(student, texts, METRIC, config, weights=[1.0, 5.0, 1.0]).scores == out.scores).all()


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before, modes):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_students_weights_are_bit_identical_afterwards(error):
    model = with_lora(make_model()).eval()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    calls = []

    def metric(student):
        value = METRIC(student)
        calls.append(value)
        if error is not None and len(calls) == 2:
            raise error("stop")
        return value

    if error is None:
        metagradient(Student(model), SAMPLES, metric)
    else:
        with pytest.raises(error):
            metagradient(Student(model), SAMPLES, metric)
    assert len(calls) == 2
    assert_untouched(model, before, modes)


@pytest.mark.parametrize("forward", [2, 6], ids=["forward", "reverse"])
def test_an_interrupt_in_the_middle_of_a_sweep_leaves_the_weights_alone(forward):
    model = make_model()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    calls = []

    def interrupt(module, args):
        calls.append(1)
        if len(calls) == forward:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        metagradient(Student(model), SAMPLES, WeightNormMetric(), InnerLoopConfig(batch_size=4, memory_budget=0))
    handle.remove()
    assert_untouched(model, before, modes)


def test_half_precision_parameters_are_trained_as_float32_copies():
    model = make_model(scale=1.0, dtype=torch.bfloat16)
    config = InnerLoopConfig(batch_size=4, learning_rate=1e-3, eps_root=1e-6)
    out = metagradient(Student(model), SAMPLES, METRIC, config)
    exact = unroll(model, SAMPLES, log_likelihood(BENCHMARK), torch.ones(16), lr=1e-3, batch_size=4, eps_root=1e-6)[0]
    assert torch.corrcoef(torch.stack([out.scores.double(), exact]))[0, 1] >= 0.95


def test_the_inner_loop_is_what_sft_trainer_does(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer, texts = make_tokenizer(), ["w1 w2 w3 w4", "w5 w6", "w7 w8 w9", "w1 w3 w5 w7 w9 w11"]
    config = InnerLoopConfig(
        learning_rate=1e-3,
        betas=(0.9, 0.95),
        eps_root=0.0,
        weight_decay=0.1,
        batch_size=4,
        num_epochs=5,
        loss_normalization="batch_tokens",
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        warmup_steps=2,
    )
    student = Student(make_model(scale=1.0), tokenizer)
    ours = metagradient(student, texts, METRIC, config)
    trainer = SFTTrainer(
        make_model(scale=1.0),
        args=SFTConfig(
            output_dir=str(tmp_path),
            learning_rate=1e-3,
            adam_beta2=0.95,
            weight_decay=0.1,
            per_device_train_batch_size=4,
            num_train_epochs=5,
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            warmup_steps=2,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert ours.losses.tolist() == pytest.approx(losses, abs=2e-4)
    theta = Student(trainer.model, tokenizer).initial_theta()
    with torch.no_grad():
        metric_after = METRIC(FinetunedStudent(student, theta, student.initial_theta())).item()
    assert ours.metric_after == pytest.approx(metric_after, abs=2e-4)


# -- bad input ------------------------------------------------------------------------------------------------------


def detached(student):
    return METRIC(student).detach()


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda student: 1.0, "scalar tensor"),
        (lambda student: student.weight("lm_head.weight")[0, :2], r"shape \(2,\)"),
        (detached, "not differentiable"),
        (lambda student: torch.ones((), requires_grad=True), "does not depend"),
        (lambda student: METRIC(student) * torch.nan, "is nan"),
        (lambda student: METRIC(student) * torch.inf, "is -inf"),
        (lambda student: student.weight("lm_head.wieght").norm(), "Near names: lm_head.weight"),
    ],
)
def test_a_bad_metric_raises_before_any_training(metric, message):
    model = make_model()
    forwards = []
    model.register_forward_pre_hook(lambda module, args: forwards.append(1))
    with pytest.raises(ValueError, match=message):
        metagradient(Student(model), SAMPLES, metric)
    assert len(forwards) <= 1  # the metric's own


def test_a_metric_without_a_gradient_raises_also_when_its_start_is_known():
    with pytest.raises(ValueError, match="not differentiable"):
        metagradient(Student(make_model()), SAMPLES, detached, metric_before=-4.0)


def test_a_metric_of_a_frozen_weight_does_not_depend_on_the_student():
    with pytest.raises(ValueError, match="does not depend"):
        metagradient(Student(with_lora(make_model())), SAMPLES, WeightNormMetric("model.norm.weight"))


@pytest.mark.parametrize(
    ("weights", "message"), [([1.0] * 15, r"\(15,\)"), ([1.0] * 15 + [float("nan")], "not finite")]
)
def test_bad_weights_raise(weights, message):
    with pytest.raises(ValueError, match=message):
        metagradient(Student(make_model()), SAMPLES, METRIC, weights=weights)


def test_all_empty_samples_raise():
    with pytest.raises(ValueError, match="None of the 2 samples"):
        metagradient(Student(make_model(), processing_class=make_tokenizer()), ["", ""], METRIC)


def test_truncated_samples_are_counted_and_warned_about_once(monkeypatch):
    warnings = []
    monkeypatch.setattr(metagradient.__globals__["logger"], "warning", warnings.append)
    student = Student(make_model(), processing_class=make_tokenizer())
    texts = ["w1 " * 30, "w2 w3", "w4 " * 40]
    for _ in range(2):
        assert metagradient(student, texts, METRIC, InnerLoopConfig(max_length=21)).num_truncated == 2
    assert len(warnings) == 1 and "max_length = 21" in warnings[0]


def test_attention_without_a_second_derivative_raises():
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2'.*attn_implementation='sdpa'.*finite_difference"):
        metagradient(Student(model), SAMPLES, METRIC)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(optimizer="lion"), "'lion'.*'adamw', 'sgd'"),
        (dict(loss_normalization="mean"), "loss_normalization 'mean'"),
        (dict(attribution="shapley"), "attribution 'shapley'"),
        (dict(lr_scheduler_type="warmup_stable_decay"), "lr_scheduler_type 'warmup_stable_decay'"),
        (dict(lr_scheduler_type="zigzag"), "lr_scheduler_type 'zigzag'"),
        (dict(warmup_steps=5), "constant_with_warmup"),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(micro_batch_size=0), "micro_batch_size"),
        (dict(learning_rate=-1.0), "learning_rate must not be negative"),
        (dict(eps=0.0, eps_root=0.0), "divides by zero"),
        (dict(hvp="hessian"), "hvp 'hessian'"),
        (dict(memory_budget="all"), "memory_budget 'all'"),
        (dict(memory_budget=-1), "memory_budget"),
        (dict(betas=(0.9, 1.0)), "betas"),
        (dict(max_grad_norm=0.0), "max_grad_norm"),
    ],
)
def test_a_bad_config_raises(kwargs, message):
    with pytest.raises(ValueError, match=message):
        InnerLoopConfig(**kwargs)


def test_a_diverging_student_stops_with_the_step_and_the_cause():
    with pytest.raises(FloatingPointError, match=r"step \d+ of 8.*learning rate \(1e\+30\)"):
        config = InnerLoopConfig(optimizer="sgd", learning_rate=1e30, batch_size=2)
        metagradient(Student(make_model()), SAMPLES, METRIC, config)


def test_scores_that_are_not_finite_stop_with_the_likely_cause():
    def metric(student):
        return _ExplodingGradient.apply(student.weight("lm_head.weight").sum())

    metagradient(
        Student(make_model()), SAMPLES, metric, metric_before=0.0, config=InnerLoopConfig(attribution="dataset")
    )
    with pytest.raises(FloatingPointError, match=r"first in step 1 of 2.*eps_root"):
        metagradient(Student(make_model()), SAMPLES, metric, metric_before=0.0)


class _ExplodingGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, x_bar):
        return x_bar * torch.inf


# -- samples that are the same ---------------------------------------------------------------------------------------


SYSTEM = "w20 w21 w22 w23 w24 w25"


def chat_student():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = f"{SYSTEM} {{% for message in messages %}}{{{{ message.content }}}} {{% endfor %}}"
    return Student(make_model(), tokenizer)


def test_samples_that_the_chat_templates_header_makes_the_same_raise():
    rows = [{"messages": [{"role": "user", "content": f"w{k} w{k + 1}"}]} for k in range(4)]
    config = InnerLoopConfig(batch_size=4, max_length=6)
    with pytest.raises(ValueError, match=r"same 6 tokens within `max_length` = 6 .*chat template"):
        metagradient(chat_student(), rows, METRIC, config)
    assert metagradient(chat_student(), rows, METRIC, replace(config, max_length=8)).num_truncated == 0


def test_prompts_that_fill_max_length_raise():
    rows = [{"prompt": f"w1 w2 w3 w4 w{k}", "completion": " w5 w6"} for k in range(4)]
    with pytest.raises(ValueError, match=r"token to learn from within `max_length` = 4 "):
        metagradient(chat_student(), rows, METRIC, InnerLoopConfig(batch_size=4, max_length=4))


def test_equal_texts_are_no_error_cut_off_or_not(monkeypatch):
    said = []
    logger = SimpleNamespace(warning_once=said.append)
    monkeypatch.setattr(sys.modules["trl_dpg.metagradients.metagradient"], "logger", logger)
    for max_length in (3, 1024):
        out = metagradient(chat_student(), ["w1 w2 w3 w4"] * 4, METRIC, InnerLoopConfig(max_length=max_length))
        assert torch.allclose(out.scores, out.scores[:1])
        assert said.pop().startswith("All 4 samples are the same tokens")


def test_equal_tokens_with_other_labels_are_not_identical_samples():
    ids = list(range(5, 15))
    rows = [{"input_ids": ids, "labels": [-100] * k + ids[k:]} for k in (2, 5)]
    out = metagradient(Student(make_model(scale=1.0)), rows, METRIC, InnerLoopConfig(max_length=8))
    assert out.scores[0] != out.scores[1]


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_arrays_that_are_cut_to_the_same_tokens_are_refused(kind):
    rows = [{"input_ids": kind([5, 6, 7, 8, 9, last])} for last in (10, 11)]
    with pytest.raises(ValueError, match=r"are the same 4 tokens within `max_length` = 4"):
        metagradient(Student(make_model(scale=1.0)), rows, METRIC, InnerLoopConfig(max_length=4))
