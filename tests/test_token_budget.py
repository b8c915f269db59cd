"""Datasets compared at equal numbers of tokens."""

import pytest
from datasets import Dataset

from tests.small_runs import CONFIG, METRIC, make_student
from trl_dpg.evaluation import compare_datasets


SHORT = [f"w{k} w{k + 1}" for k in range(16)]  # two tokens and eos, of which two are predicted
LONG = [" ".join(f"w{k + j}" for j in range(8)) for k in range(16)]  # eight


def compare(seeds=(0, 1), **kwargs):
    datasets = {"short": Dataset.from_dict({"text": SHORT}), "long": Dataset.from_dict({"text": LONG})}
    *_, last = compare_datasets(lambda seed: make_student(), datasets, METRIC, CONFIG, seeds, **kwargs)
    return last["datasets"]["short"], last["datasets"]["long"]


def test_each_dataset_gets_the_budget():
    short, long = compare(max_tokens=18)
    assert (short["samples"], short["tokens"]) == (9, [18, 18])
    assert (long["samples"], long["tokens"]) == (2, [16, 16])  # a third would not fit
    assert long["metric"][0] != long["metric"][1]  # each seed draws others


def test_a_budget_of_zero_is_that_of_the_smallest_dataset():
    short, long = compare(max_tokens=0)
    assert (short["samples"], short["tokens"]) == (16, [32, 32])
    assert (long["samples"], long["tokens"]) == (4, [32, 32])


def test_without_a_budget_tokens_are_not_counted():
    short, long = compare(seeds=[0])
    assert (short["samples"], long["samples"]) == (16, 16) and "tokens" not in short


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_tokens": 33}, "`max_tokens` is 33, but 'short' has 32 tokens to learn from"),
        ({"max_tokens": 7}, "a sample of 'long' has 8 tokens, but the budget is 7"),
        ({"max_tokens": 8, "num_samples": 4}, "`num_samples` and `max_tokens`"),
    ],
)
def test_budgets_that_cannot_be_kept_raise_before_any_student(kwargs, message):
    datasets = {"short": Dataset.from_dict({"text": SHORT}), "long": Dataset.from_dict({"text": LONG})}
    with pytest.raises(ValueError, match=message):
        compare_datasets(lambda seed: make_student(), datasets, METRIC, CONFIG, **kwargs)
