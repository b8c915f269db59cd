"""Out of memory in a fine-tuning: the micro-batch halves, the numbers stay."""

import pytest
import torch

from tests.tiny import make_model, make_samples, make_tokenizer
from trl_dpg import DPGReward, InnerLoopConfig, Student, attribute, metagradient
from trl_dpg.metagradients.fine_tuning import FineTuning
from trl_dpg.metagradients.out_of_memory import NotEnoughMemory, within_memory
from trl_dpg.metrics import LanguageModelingMetric
from trl_dpg.scripts.errors import explain
from trl_dpg.tuning import tune
from trl_dpg.verification import gradient_noise


SAMPLES = make_samples(16)
METRIC = LanguageModelingMetric(make_samples(2, seed=2), batch_size=1)
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you ...")


def make_student(tokenizer=None):
    return Student(make_model(dtype=torch.float64), tokenizer)


def student_with(room, error=CUDA, tokenizer=None):
    """A student that runs out of memory with more than `room` samples at a time. And the sizes that it saw."""
    student, sizes = make_student(tokenizer), []

    def look(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > room:
            raise error

    student.model.register_forward_pre_hook(look, with_kwargs=True)
    return student, sizes


@pytest.mark.parametrize("error", [CUDA, CPU], ids=["cuda", "cpu"])
@pytest.mark.parametrize(
    "settings",
    [dict(batch_size=16), dict(batch_size=8), dict(batch_size=8, memory_budget=0), dict(attribution="dataset")],
    ids=["one step", "two steps", "recomputed", "naive"],
)
def test_micro_batches_halve_until_they_fit_and_the_scores_stay(settings, error):
    config = InnerLoopConfig(**settings)
    expected = metagradient(make_student(), SAMPLES, METRIC, config)
    student, sizes = student_with(3, error)
    scores = metagradient(student, SAMPLES, METRIC, config).scores
    torch.testing.assert_close(scores, expected.scores, rtol=1e-5, atol=1e-12)
    assert student.micro_batch_size == 2 and max(sizes) == config.batch_size
    sizes.clear()
    assert torch.equal(metagradient(student, SAMPLES, METRIC, config).scores, scores)
    assert max(sizes) == 2  # the size that fits is kept


def test_other_errors_are_raised_at_once():
    student, sizes = student_with(4, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        metagradient(student, SAMPLES, METRIC, InnerLoopConfig())
    assert student.micro_batch_size is None and max(sizes) == 8


def test_too_little_memory_for_one_sample_names_what_to_set():
    student, _ = student_with(0)
    with pytest.raises(NotEnoughMemory, match=r"`memory_budget` to 0.*`trl-dpg memory`") as caught:
        metagradient(student, SAMPLES, METRIC, InnerLoopConfig(), metric_before=0.0)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    status, text = explain(caught.value)
    assert status == 1 and "--student_memory_budget" in text and "--student_load_in_4bit" in text
    parameters = [p.requires_grad for p in student.model.parameters()]
    assert all(parameters)


def test_a_reward_logs_the_size_and_keeps_it():
    texts = [f"w{k} w{k + 1} w3" for k in range(8)]
    metric = LanguageModelingMetric(["w5 w6"], batch_size=1)
    logs = {}
    student, sizes = student_with(2, tokenizer=make_tokenizer())
    reward = DPGReward(student, metric, InnerLoopConfig())
    rewards = reward(["p"] * 8, texts, log_metric=logs.__setitem__)
    assert logs["dpg/student_micro_batch_size"] == 2.0
    plain = DPGReward(make_student(make_tokenizer()), metric, InnerLoopConfig())
    others = {}
    torch.testing.assert_close(
        torch.tensor(rewards),
        torch.tensor(plain(["p"] * 8, texts, log_metric=others.__setitem__)),
        rtol=1e-5,
        atol=1e-5,
    )
    assert "dpg/student_micro_batch_size" not in others
    sizes.clear()
    reward(["p"] * 8, texts)
    assert max(sizes) == 2


def test_chunks_after_the_first_begin_with_the_size_that_fits():
    student, sizes = student_with(4)
    attribute(student, SAMPLES, METRIC, InnerLoopConfig(), size=8)
    assert sizes.count(8) == 1  # the very first forward pass


def test_changed_data_weights_find_the_size_as_well():
    student, _ = student_with(2)
    fine_tuning = FineTuning(student, SAMPLES, InnerLoopConfig())
    theta = fine_tuning.theta(torch.ones(16))
    whole = FineTuning(make_student(), SAMPLES, InnerLoopConfig()).theta(torch.ones(16))
    torch.testing.assert_close(theta, whole)
    assert fine_tuning.config.micro_batch_size == 2


def test_the_memory_of_a_failed_attempt_is_freed():
    class Held:
        alive = 0

        def __init__(self):
            Held.alive += 1

        def __del__(self):
            Held.alive -= 1

    student, _ = student_with(8)
    fine_tuning = FineTuning(student, SAMPLES, InnerLoopConfig())
    seen = []

    def run():
        seen.append(Held.alive)
        held = Held()  # noqa: F841
        if len(seen) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    within_memory(fine_tuning, run, "The test")
    assert seen == [0, 0, 0]


class Short:
    """A metric for which the memory does not suffice in some of its calls."""

    def __init__(self, *short):
        self.short, self.calls = short, 0

    def __call__(self, student):
        self.calls += 1
        value = METRIC(student)
        if self.calls in self.short:
            value.register_hook(self.fail) if value.requires_grad else self.fail()
        return value

    def fail(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_metric_in_a_verification_during_training_is_computed_again():
    texts = [f"w{k} w{k + 1} w3" for k in range(8)]

    def figures(*short):
        metric, logs = Short(*short), {}
        student = make_student(make_tokenizer())
        reward = DPGReward(student, metric, InnerLoopConfig(batch_size=4), verify_steps=1)
        reward(["p"] * 8, texts, log_metric=logs.__setitem__)
        return logs["dpg/verify/pearson"], student.micro_batch_size, metric.calls

    whole, none, calls = figures()
    again, size, more = figures(5, 9)  # after those before and after the fine-tuning
    assert again == pytest.approx(whole, rel=1e-6) and none is None
    assert size == 1 and more == calls + 2


def test_the_gradient_noise_finds_the_size_as_well():
    student, sizes = student_with(1)
    config = InnerLoopConfig(batch_size=4)
    found = gradient_noise(FineTuning(student, SAMPLES, config))
    assert found == pytest.approx(gradient_noise(FineTuning(make_student(), SAMPLES, config)), rel=1e-6)
    assert sizes[0] == 2 and student.micro_batch_size == 1


def test_a_search_finds_the_size_as_well():
    config = InnerLoopConfig(learning_rate="auto", eps_root=1e-6, batch_size=16)
    whole = tune(make_student(), SAMPLES, METRIC, config)
    student, _ = student_with(4)
    found = tune(student, SAMPLES, Short(1, 3), config)  # at the start, and when a trial differentiates it
    assert found.chosen == pytest.approx(whole.chosen, rel=1e-6) and student.micro_batch_size == 2
