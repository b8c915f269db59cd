"""The task of sums in prefix notation: its data, its metric, and that a small model learns it."""

import json
import math

import numpy as np
import pytest
import torch

from trl_dpg import Student
from trl_dpg.evaluation import metric_before
from trl_dpg.practice.prefix_sums import (
    BASE,
    STEP_SIZES,
    UNIFORM,
    RightAnswerMetric,
    answer,
    as_row,
    draw_samples,
    prefix_sums_model,
    prefix_sums_tokenizer,
    prefix_sums_world,
    train,
    with_reasoning,
)


def digits(number, operators, seed=0):
    return np.random.default_rng(seed).integers(BASE, size=(number, operators + 1))


@pytest.mark.parametrize("step_size", STEP_SIZES)
@pytest.mark.parametrize("operators", [1, 5, 12])
def test_each_step_copies_its_operators_and_ends_with_the_sum_so_far(operators, step_size):
    for sample, own in zip(with_reasoning(digits(4, operators), step_size), digits(4, operators), strict=True):
        row = as_row(sample)
        control, *steps = row["completion"].split()
        assert control == f"t{step_size}" and row["prompt"].split() == [
            str(own[0]),
            *(f"+{d}" for d in own[1:]),
            "<begin>",
        ]
        copied, so_far, sums = [steps[0]], int(steps[0]), []
        for word, following in zip(steps[1:], [*steps[2:], None], strict=True):
            if word.startswith("+"):
                copied.append(word)
                so_far = (so_far + int(word)) % BASE
            elif word == "=":
                assert following == str(so_far)
                sums.append(len(copied) - 1)
        assert copied == row["prompt"].split()[:-1]
        assert sums == [*range(step_size, operators, step_size), operators] and len(sums) == row["num_steps"]
        assert int(steps[-1]) == own.sum() % BASE


def test_a_row_is_read_as_the_tokens_that_it_was_made_from():
    student = Student(prefix_sums_model(1), prefix_sums_tokenizer())
    for sample in with_reasoning(digits(3, 7), 2):
        (example,) = student.tokenize([as_row(sample)], max_length=100)
        assert example.input_ids == sample.tolist()
        assert example.labels == [-100] * 9 + sample[9:].tolist()


def test_samples_are_drawn_from_the_mixture_until_there_are_enough_tokens():
    samples = draw_samples({3: [1, 3], 8: [2]}, 2000, np.random.default_rng(0))
    kinds = [(row["operators"], row["step_size"]) for row in map(as_row, samples)]
    assert set(kinds) == {(3, 1), (3, 3), (8, 2)}
    assert 0.35 < sum(operators == 8 for operators, _ in kinds) / len(kinds) < 0.65
    assert 2000 <= sum(map(len, samples)) < 2000 + max(map(len, samples))


def test_a_small_model_learns_sums_of_two_digits():
    model = prefix_sums_model(1)
    expressions = digits(100, 1, seed=1)
    before = answer(model, expressions, 1).right.mean()
    train(model, {1: [1]}, 150, tokens_per_step=256, learning_rate=5e-3)
    after = answer(model, expressions, 1)
    assert before < 0.5 and after.right.mean() > 0.95
    assert set(after.control) == {1} and set(after.num_tokens) == {6}  # t1 a +b = c <eos>
    free = answer(model, expressions, temperature=1.0)  # it knows one control token only
    assert (free.control == 1).mean() > 0.95 and free.right.mean() > 0.9


def test_an_answer_without_an_end_or_with_another_digit_is_wrong():
    model = prefix_sums_model(1)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is <pad>: no end
    result = answer(model, digits(5, 3), 2)
    assert not result.right.any() and set(result.control) == {2}
    assert answer(model, digits(5, 3)).control.tolist() == [0] * 5


def test_the_metric_is_the_log_probability_of_all_right_chains_together():
    model, expressions = prefix_sums_model(2), [digits(3, 2), digits(2, 4)]
    student = Student(model, prefix_sums_tokenizer())
    logs = []
    for part in expressions:
        for row in part:
            chains = []
            for t in UNIFORM[len(row) - 1]:
                ids = torch.from_numpy(with_reasoning(row[None], t))
                log_probs = model(ids).logits[0].log_softmax(-1)
                start = len(row)
                chains.append(sum(log_probs[k, ids[0, k + 1]].item() for k in range(start, ids.shape[1] - 1)))
            logs.append(math.log(sum(map(math.exp, chains))))
    for batch_size in (2, 16):
        metric = RightAnswerMetric(expressions, batch_size)
        assert metric_before(student, metric) == pytest.approx(np.mean(logs), rel=1e-5)
    # 3 expressions of 3 digits, `<begin>`, control token, 3 copies, 2 tokens for each of 2 or 1 steps, `<eos>`
    assert RightAnswerMetric([digits(3, 2)]).num_tokens(student) == 3 * (13 + 11)


def test_what_is_not_of_the_task_is_refused():
    with pytest.raises(ValueError, match=r"`step_size` must be one of \(1, 2, 3, 4, 6\), got 5"):
        with_reasoning(digits(1, 8), 5)
    with pytest.raises(ValueError, match="1 to 24 operators, got 25"):
        with_reasoning(digits(1, 25), 2)


def test_a_world_has_a_generator_a_student_and_prompts(tmp_path):
    prefix_sums_world(tmp_path, operators=(2, 3), num_steps=2, num_layers=1)
    prompts = [json.loads(line) for line in (tmp_path / "prompts.jsonl").open()]
    assert len(prompts) == 1024 and all(row["prompt"].endswith(" <begin> ") for row in prompts)
    assert {len(row["prompt"].split()) for row in prompts} == {4, 5}  # T + 1 digits and `<begin>`
    student = Student(str(tmp_path / "student"))
    assert student.processing_class("t3 +4 = 0 <eos>")["input_ids"][-1] == student.processing_class.eos_token_id
