"""The rewards of length: their formulas, all ranks, gating by correctness, TRL's trainer, and what they refuse."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from datasets import Dataset
from scipy.optimize import linprog
from scipy.stats import wasserstein_distance
from trl import GRPOConfig, GRPOTrainer

from tests.tiny import QUIET, make_model, make_tokenizer, on_two_processes
from trl_dpg.length_target import LengthTargets, LogNormal
from trl_dpg.rewards import (
    AdaptiveLengthPenaltyReward,
    LengthBudgetReward,
    LengthDistributionReward,
    ShorterBetterReward,
)
from trl_dpg.rewards.length_distribution import matched, potential
from trl_dpg.scripts.arguments import UsageError
from trl_dpg.scripts.registry import make_rewards


def score(reward, lengths, prompts=None, **columns):
    ids = [[7] * length for length in lengths]
    prompts = prompts or ["p"] * len(lengths)
    return reward(prompts=prompts, completions=["w1"] * len(lengths), completion_ids=ids, **columns)


def answers(completions, right, **kwargs):
    """A check that reads the column `right`."""
    return right


# -- the distribution -------------------------------------------------------------------------------------------------


def test_the_distance_is_that_to_the_quantile_of_the_same_rank():
    reward = LengthDistributionReward("empirical:4,8,16,32", form="distance")
    assert score(reward, [32, 4, 16, 8]) == pytest.approx([0, 0, 0, 0], abs=1e-12)
    assert score(reward, [64, 2, 16, 8]) == pytest.approx([-np.log(2), -np.log(2), 0, 0], abs=1e-12)
    logged = {}
    score(reward, [64, 2, 16, 8], log_metric=logged.__setitem__)
    expected = wasserstein_distance(np.log([64, 2, 16, 8]), np.log([4, 8, 16, 32]))
    assert logged == {"length_distribution/wasserstein": pytest.approx(expected)}


def test_equal_lengths_have_equal_rewards_in_any_order():
    for form in ("potential", "distance"):
        reward = LengthDistributionReward("lognormal:12,0.7", form=form)
        first = score(reward, [5, 9, 5, 9, 9, 30])
        assert first[0] == first[2] and first[1] == first[3] == first[4]
        assert score(reward, [30, 9, 9, 5, 5, 9]) == pytest.approx([first[k] for k in (5, 1, 1, 0, 0, 1)])
    assert matched(np.array([2.0, 1.0, 2.0]), np.array([1.0, 3.0, 5.0])).tolist() == [4, 1, 4]


def test_the_potential_is_that_of_the_transport_problem():
    """Of all u and v with u_i + v_j <= c_ij, the potentials have the largest mean of u plus mean of v: the cost."""
    rng = np.random.default_rng(0)
    x = np.sort(rng.normal(3.0, 0.6, 40))
    y = np.sort(rng.normal(3.4, 0.3, 40))
    u = -potential(x, y)
    cost = 0.5 * (x[:, None] - y[None, :]) ** 2
    v = (cost - u[:, None]).min(axis=0)  # the best partner of u
    dual = u.mean() + v.mean()
    marginals = np.concatenate([np.kron(np.eye(40), np.ones(40)), np.kron(np.ones(40), np.eye(40))])
    best = linprog(cost.ravel(), A_eq=marginals, b_eq=np.full(80, 1 / 40)).fun
    assert dual == pytest.approx(best, rel=1e-6) and best == pytest.approx(0.5 * ((x - y) ** 2).mean(), rel=1e-6)


def test_the_potential_says_in_which_direction_lengths_are_to_change():
    """All lengths too short by one factor: the distance form is equal for all, the potential rises with the length."""
    target = LogNormal(40.0, 0.5)
    lengths = np.round(target.spread(50) / 2).astype(int).tolist()
    distance = score(LengthDistributionReward(target, form="distance"), lengths)
    rewards = score(LengthDistributionReward(target), lengths)
    assert np.std(distance) < 0.1 * abs(np.mean(distance))
    order = np.argsort(lengths, kind="stable")
    assert (np.diff(np.array(rewards)[order]) >= 0).all() and max(rewards) == 0 and min(rewards) < -0.5
    longer = score(LengthDistributionReward(target), [4 * length for length in lengths])
    assert (np.diff(np.array(longer)[order]) <= 0).all()


def test_two_peaks_pull_the_middle_apart():
    rewards = score(LengthDistributionReward("quantiles:0=5,0.499=6,0.5=39,1=40"), list(range(8, 32)))
    lowest = int(np.argmin(rewards))
    assert 0 < lowest < 23 and rewards[0] > rewards[lowest] < rewards[-1]


def test_each_difficulty_is_matched_on_its_own():
    reward = LengthDistributionReward({"easy": "empirical:4,8", "hard": "empirical:40,80"}, form="distance")
    lengths, names = [8, 80, 4, 20], ["easy", "hard", "easy", "hard"]
    assert score(reward, lengths, difficulty=names) == pytest.approx([0, 0, 0, -np.log(2)], abs=1e-12)
    with pytest.raises(ValueError, match="no lengths for the difficulty 'odd'"):
        score(reward, lengths, difficulty=["odd"] * 4)
    with pytest.raises(ValueError, match="the dataset has no column 'difficulty'"):
        score(reward, lengths)


def test_only_correct_completions_are_matched_and_no_wrong_one_is_better():
    for form in ("potential", "distance"):
        reward = LengthDistributionReward("empirical:4,8,16", check=answers, form=form)
        rewards = score(reward, [4, 8, 8, 16, 500, 2], right=[1.0, 0.0, 1.0, 1.0, None, 0.0])
        assert rewards[4] is None and rewards[1] == rewards[5] == 0
        assert [rewards[k] for k in (0, 2, 3)] == pytest.approx([1, 1, 1])
        far = score(reward, [4000, 9000, 20000], right=[1.0, 1.0, 0.0])
        assert min(far[:2]) >= far[2] == 0


def test_reasoning_is_counted_by_the_tokenizer():
    reward = LengthDistributionReward(
        "empirical:2,4", measure="reasoning", tokenizer=make_tokenizer(), form="distance"
    )
    texts = ["<think>w1 w2</think> w3 w4 w5", "<think>w1 w2 w3 w4</think> w1"]
    assert reward(prompts=["p", "p"], completions=texts) == pytest.approx([0, 0], abs=1e-12)
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(prompts=["p", "p"], completions=messages) == pytest.approx([0, 0], abs=1e-12)
    empty = reward(prompts=["p", "p"], completions=["w1", texts[1]])
    assert empty == pytest.approx([-np.log(2), 0])  # no reasoning counts as one token


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthDistributionReward("nothing"), "neither a file nor a target"),
        (lambda: LengthDistributionReward("lognormal:9,1", form="cost"), "Unknown `form` 'cost'"),
        (lambda: LengthDistributionReward("lognormal:9,1", measure="answer"), "Unknown `measure` 'answer'"),
        (lambda: LengthDistributionReward("lognormal:9,1", measure="reasoning"), "needs a `tokenizer`"),
        (lambda: LengthDistributionReward("lognormal:9,1", check="no.such.check"), "could not be imported"),
        (lambda: LengthDistributionReward("lognormal:9,1", check=3), "must be a TRL reward function"),
        (lambda: LengthBudgetReward(answers, form="least"), "Unknown `form` 'least'"),
        (lambda: score(LengthBudgetReward(answers), [3], right=[1.0]), "no column 'num_tokens'"),
        (lambda: LengthDistributionReward("lognormal:9,1")(["p"], ["w1"]), "of their `completion_ids`"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_recipe_names_target_and_check():
    (reward,) = make_rewards(
        ["length_distribution"],
        {"length_distribution": {"target": {"easy": "lognormal:9,1"}, "check": "trl.rewards.accuracy_reward"}},
    )
    assert reward.target == LengthTargets({"easy": LogNormal(9, 1)})
    with pytest.raises(UsageError, match="--reward_kwargs of 'length_distribution': 'x' is neither a file"):
        make_rewards(["length_distribution"], {"length_distribution": {"target": "x"}})


# -- rewards to compare with ------------------------------------------------------------------------------------------

LENGTHS, RIGHT, PROMPTS = [100, 200, 50, 300], [1.0, 1.0, 0.0, 0.0], ["a", "a", "a", "b"]


def test_a_budget_in_the_prompt():
    budgets = [150, 150, 150, 150]
    exact = score(LengthBudgetReward(answers, alpha=0.001), LENGTHS, PROMPTS, right=RIGHT, num_tokens=budgets)
    assert exact == pytest.approx([1 - 0.05, 1 - 0.05, -0.1, -0.15])
    most = LengthBudgetReward(answers, form="max", alpha=0.001, delta=0.5)
    assert score(most, LENGTHS, PROMPTS, right=RIGHT, num_tokens=budgets) == pytest.approx([0.55, 0.45, 0, 0])
    assert score(most, [9000, 1], right=[1.0, 1.0], num_tokens=[1, 9000]) == [0, 1]


def test_shorter_better_measures_from_the_shortest_correct_one_of_the_prompt():
    rewards = score(ShorterBetterReward(answers, beta=0.01), LENGTHS, PROMPTS, right=RIGHT)
    assert rewards == pytest.approx([2, 2 - 1, -0.5, 0])  # of b, none is correct: the mean length
    assert score(ShorterBetterReward(answers), [3, 5], right=[None, 1.0]) == [None, 2]


def test_the_adaptive_penalty_grows_with_the_share_that_is_solved():
    rewards = score(AdaptiveLengthPenaltyReward(answers, beta=0.001), LENGTHS, PROMPTS, right=RIGHT)
    assert rewards == pytest.approx([1 - 0.1 * 2 / 3, 1 - 0.2 * 2 / 3, -0.05 * 2 / 3, -0.3])


# -- TRL and several processes ----------------------------------------------------------------------------------------


def test_the_rewards_train_in_trls_trainer_beside_each_other(tmp_path):
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=1,
        logging_steps=1,
        reward_weights=[1.0, 0.5],
        **QUIET,
    )
    columns = {"prompt": ["w1 w2", "w3"] * 4, "difficulty": ["easy", "hard"] * 4, "right": [1.0, 0.0] * 4}
    trainer = GRPOTrainer(
        model=make_model(scale=1.0),
        reward_funcs=[
            LengthDistributionReward({"easy": "lognormal:3,0.3", "hard": "lognormal:5,0.3"}),
            ShorterBetterReward(answers),
        ],
        args=args,
        train_dataset=Dataset.from_dict(columns),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/length_distribution/mean"] <= 0 and log["length_distribution/wasserstein"] >= 0
    assert np.isfinite(log["rewards/shorter_better/mean"])


BATCH = dict(lengths=[3, 9, 9, 4, 20, 7, 7, 1], prompts=["a", "a", "a", "a", "b", "b", "b", "b"])
COLUMNS = dict(
    difficulty=["easy"] * 4 + ["hard", "easy", "hard", "easy"], right=[1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, None]
)


def some_rewards():
    target = {"easy": "lognormal:5,0.5", "hard": "lognormal:12,0.5"}
    return [
        LengthDistributionReward(target),
        LengthDistributionReward(target, check=answers, form="distance"),
        ShorterBetterReward(answers, beta=0.1),
        AdaptiveLengthPenaltyReward(answers, beta=0.1),
    ]


@pytest.mark.faults
def test_two_processes_match_their_lengths_together(tmp_path):
    process = on_two_processes("tests.test_lengths_rewards", str(tmp_path))
    assert process.returncode == 0, process.stderr[-3000:]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for number, reward in enumerate(some_rewards()):
        together = [value for result in results for value in result["rewards"][number]]
        assert together == pytest.approx(score(reward, **BATCH, **COLUMNS))
    assert "Lengths of completions" in results[1]["error"]
    assert "The reward length_distribution failed on rank 1" in results[0]["error"]


def on_a_rank(folder):
    """What each rank of the test above does: parts of different sizes, of which a prompt's group is one; an error."""
    state = PartialState(cpu=True)
    rank = state.process_index
    mine = slice(0, 3) if rank == 0 else slice(3, 8)
    parts = {name: values[mine] for name, values in (BATCH | COLUMNS).items()}
    results = {"rewards": [score(reward, **parts) for reward in some_rewards()]}
    ids = [[7]] if rank == 0 else None
    with pytest.raises((RuntimeError, ValueError)) as raised:
        LengthDistributionReward("lognormal:5,0.5")(prompts=["p"], completions=["w1"], completion_ids=ids)
    results["error"] = str(raised.value)
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    state.wait_for_everyone()  # a rank that leaves early cuts the other off
    state.destroy_process_group()


if __name__ == "__main__":
    on_a_rank(sys.argv[1])
