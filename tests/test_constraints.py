"""Constraints: the multipliers, what a reward does with them, and what commands say of them."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.small_runs import CONFIG, PROMPTS, TEXTS, TOKENIZER, make_student
from tests.tiny import make_model
from trl_dpg import DPGReward, InnerLoopConfig, Student, metagradient
from trl_dpg.evaluation import compare_datasets
from trl_dpg.metric_state import MetricState
from trl_dpg.metrics import CombinedMetric, Constraint, LanguageModelingMetric, WeightNormMetric
from trl_dpg.metrics.combine import compared
from trl_dpg.metrics.constraints import Multiplier
from trl_dpg.scripts import evaluate
from trl_dpg.scripts.registry import named_metric
from trl_dpg.scripts.toy_world import set_texts
from trl_dpg.scripts.usage import UsageError


TARGET, KNOWN = LanguageModelingMetric(["w1 w2 w3 w4"]), LanguageModelingMetric(["w40 w41 w42", "w43 w44"])
NAMES = ["target", "known"]


ENDS = ("before", "after")


def constrained(**constraint):
    own = dict(eps=0.1, step_size=0.2, damping=0.5, multiplier=3.0) | constraint
    return CombinedMetric([TARGET, KNOWN], names=NAMES, constraints={"known": Constraint(**own)})


def test_the_multiplier_follows_the_violations_of_its_limit():
    constraint, own = Constraint(eps=0.1, step_size=0.2, damping=0.5, multiplier=0.3), Multiplier(0.3)
    weights, values = [], []
    for change in (-0.05, -0.15, -0.5, 0.0, 0.1):  # g = -0.5, 0.5, 4 (counts as 1), -1, -2
        weights.append(own.weight(constraint))
        own = own.react(constraint, change)
        values.append(own.value)
    assert values == pytest.approx([0.2, 0.3, 0.5, 0.3, 0.0], abs=1e-12)
    assert weights == pytest.approx([0.3, 0.0, 0.55, 1.0, 0.0], abs=1e-12)
    assert own.weight(constraint) == 0.0


def by_hand(changes, eps, step_size, damping, multiplier):
    """The weights before each of the changes, in numpy."""
    weights, violation = [], 0.0
    for change in changes:
        weights.append(max(0.0, multiplier + damping * violation))
        violation = min(-change / eps - 1, 1.0)
        multiplier = max(0.0, multiplier + step_size * violation)
    return np.array(weights)


BATCHES = [TEXTS, ["w40 w41", *TEXTS[1:]], ["w9 w8 w40 w41 w42", *TEXTS[1:]], TEXTS[::-1]]


@pytest.mark.parametrize(("batch_size", "groups"), [(2, True), (4, False)], ids=["four steps", "two datasets"])
def test_a_rewards_scores_are_those_of_the_lagrangian(batch_size, groups):
    """Against the scores and changes of each part alone, with multipliers that are computed here."""
    config = InnerLoopConfig(learning_rate=1e-2, eps_root=1e-6, batch_size=batch_size)
    settings = dict() if groups else dict(cross_group_batching=False, num_generations=2)
    reward = DPGReward(make_student(), constrained(), config, **settings)
    logs, raw = [], []
    for texts in BATCHES:
        columns, logged = {}, {}
        reward(PROMPTS, texts, log_metric=logged.__setitem__, log_extra=columns.__setitem__)
        logs.append(logged)
        raw.append(np.array(columns["dpg_score"]))
    datasets = [[texts] if groups else [texts[0::2], texts[1::2]] for texts in BATCHES]
    alone = [
        [metagradient(make_student(), own, {"a": TARGET, "b": KNOWN}, config) for own in each] for each in datasets
    ]
    changes = [np.mean([out["b"].metric_after - out["b"].metric_before for out in each]) for each in alone]
    weights = by_hand(changes, 0.1, 0.2, 0.5, 3.0)
    assert (weights[:3] > 0).all() and len(set(weights)) == len(weights)  # they move
    for logged, scores, each, change, weight in zip(logs, raw, alone, changes, weights, strict=True):
        assert logged["dpg/multiplier/known"] == pytest.approx(weight, rel=1e-3)
        assert logged["dpg/violation/known"] == pytest.approx(-change / 0.1 - 1, rel=1e-3, abs=1e-3)
        assert logged["dpg/metric_change/known"] == pytest.approx(change, rel=1e-3, abs=1e-6)
        expected = torch.stack([out["a"].scores + weight * out["b"].scores for out in each], dim=1).flatten().numpy()
        np.testing.assert_allclose(scores, expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())
        before, after = (np.mean([weight * getattr(out["b"], f"metric_{end}") for out in each]) for end in ENDS)
        own = [np.mean([getattr(out["a"], f"metric_{end}") for out in each]) for end in ENDS]
        found = [logged[f"dpg/metric_{end}"] for end in ENDS]
        assert found == pytest.approx([own[0] + before, own[1] + after], rel=1e-5)


def test_an_evaluation_leaves_the_multipliers_alone():
    reward, logged = DPGReward(make_student(), constrained(), CONFIG), {}
    reward.choice.training = False
    reward(PROMPTS, TEXTS, log_metric=logged.__setitem__)
    assert logged["dpg/multiplier/known"] == 3.0 and math.isfinite(logged["dpg/violation/known"])
    assert reward.metric.multipliers == {"known": Multiplier(3.0)}
    reward.choice.training = True
    reward(PROMPTS, TEXTS)
    assert reward.metric.multipliers != {"known": Multiplier(3.0)}


def test_the_state_of_a_reward_is_restored_from_json():
    whole, resumed = (DPGReward(make_student(), constrained(), CONFIG, metric_samples=1) for _ in range(2))
    for texts in BATCHES[:2]:
        whole(PROMPTS, texts)
    resumed.metric_state.load(resumed.metric, json.loads(json.dumps(whole.metric_state.state(whole.metric))))
    logs = []
    for reward in (whole, resumed):
        logged = {}
        reward(PROMPTS, BATCHES[2], log_metric=logged.__setitem__)
        logs.append({name: value for name, value in logged.items() if "seconds" not in name})
    assert logs[0] == logs[1] and logs[0]["dpg/multiplier/known"] != 3.0


def test_everything_else_takes_the_multipliers_as_they_are():
    metric = constrained()
    config = InnerLoopConfig(learning_rate=1e-2, eps_root=1e-6, batch_size=8)
    for _ in range(2):
        out = metagradient(make_student(), TEXTS, metric, config)
        parts = [out.part_scores[name] for name in NAMES]
        torch.testing.assert_close(out.scores, parts[0] + 3.0 * parts[1], rtol=1e-4, atol=1e-9)
        expected = out.parts_after["target"] + 3.0 * out.parts_after["known"]
        assert out.metric_after == pytest.approx(expected, rel=1e-6)
    objective = metric.objective()
    out = metagradient(make_student(), TEXTS, objective, config)
    assert out.metric_after == pytest.approx(out.parts_after["target"]) and objective.weights == [1.0, 0.0]


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_an_evaluation_says_whether_the_limit_is_kept():
    learned = LanguageModelingMetric(["w1 w2 w3"])
    limits = {"strict": 1e-6, "lenient": 10.0}
    metric = CombinedMetric(
        [TARGET, *[lambda student: -learned(student)] * 2], names=["target", *limits], constraints=limits
    )
    config = InnerLoopConfig(learning_rate=1e-2, batch_size=4)
    texts = {"texts": Dataset.from_dict({"text": ["w1 w2 w3"] * 8})}
    *_, figures = compare_datasets(
        lambda seed: Student(make_model(scale=1.0), TOKENIZER), texts, metric, config, (0, 1)
    )
    found = figures["datasets"]["texts"]["proxies"]
    assert found["change/strict"] == found["change/lenient"] < -1e-3
    assert (found["kept/strict"], found["kept/lenient"]) == (0.0, 1.0)
    printed, change = evaluate.render(figures), f"{found['change/strict']:.3g}"
    assert f"texts: strict changed by {change}; its limit is kept with 0 of 2 seeds." in printed
    assert f"texts: lenient changed by {change}; its limit is kept with 2 of 2 seeds." in printed


def test_other_metrics_have_no_parts_to_compare():
    assert compared(TARGET, {}) == {} == compared(CombinedMetric([TARGET, KNOWN]), {"a": 1.0})


# -- recipes and wrong inputs -----------------------------------------------------------------------------------------


def test_a_recipe_names_constraints_by_number_or_by_mapping():
    entries = [
        {"metric": "language_modeling", "metric_kwargs": {"texts": ["w1 w2"]}},
        {"metric": "language_modeling", "name": "a", "metric_kwargs": {"texts": ["w3 w4"]}},
        {"metric": "weight_norm", "name": "b", "weight": 0.5},
    ]
    metric = named_metric("combined", {"metrics": entries, "constraints": {"a": 0.05, "b": {"eps": 2, "damping": 0}}})
    assert metric.constraints == {"a": Constraint(0.05), "b": Constraint(2, damping=0)}
    assert metric.weights == [1.0, 0.0, 0.5] and metric.present_weights == metric.weights


def test_a_part_without_texts_has_those_of_its_name_in_a_toy_world(tmp_path):
    entries = [{"metric": "language_modeling"}, {"metric": "language_modeling", "name": "language_A"}]
    for entry in entries:
        set_texts(entry, tmp_path)
    files = [entry["metric_kwargs"]["dataset"] for entry in entries]
    assert files == [str(tmp_path / name) for name in ("benchmark.jsonl", "language_A.jsonl")]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(eps=0.0), "`eps` must be a positive number, got 0.0"),
        (dict(eps=-1), "`eps` must be a positive number, got -1"),
        (dict(eps=math.nan), "`eps` must be a positive number, got nan"),
        (dict(eps="0.1"), "`eps` must be a positive number, got '0.1'"),
        (dict(eps=True), "`eps` must be a positive number, got True"),
        (dict(eps=0.1, step_size=0), "`step_size` must be a positive number, got 0"),
        (dict(eps=0.1, damping=-0.5), "`damping` must be a number of at least 0, got -0.5"),
        (dict(eps=0.1, multiplier=math.inf), "`multiplier` must be a number of at least 0, got inf"),
    ],
)
def test_a_wrong_constraint_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Constraint(**kwargs)


def test_a_constrained_part_without_a_name_has_the_weight_0_as_well():
    entries = [{"metric": "weight_norm", "metric_kwargs": {"weight": own}} for own in ("a", "b")]
    metric = named_metric("combined", {"metrics": entries, "constraints": {"weight_norm_1": 0.05}})
    assert metric.names == ["weight_norm", "weight_norm_1"] and metric.weights == [1.0, 0.0]


def test_a_state_of_other_constraints_leaves_the_new_ones_alone():
    """A run that goes on with `accept_changed_setup` may have other constraints."""
    old, state = constrained(), MetricState(None, 0)
    old.react({"target": 0.0, "known": -0.5})
    new = CombinedMetric([TARGET, KNOWN, KNOWN], names=[*NAMES, "more"], constraints={"known": 0.1, "more": 0.1})
    state.load(new, json.loads(json.dumps(state.state(old))))
    assert new.multipliers["known"] == old.multipliers["known"] and new.multipliers["more"] == Multiplier(0.0)
    state.load(old, state.state(new))
    assert set(old.multipliers) == {"known"}


def test_constraints_need_parts_and_something_to_raise():
    parts = [TARGET, WeightNormMetric()]
    with pytest.raises(ValueError, match=r"of 'english', but the parts are \['LanguageModelingMetric', 'Weight"):
        CombinedMetric(parts, constraints={"english": 0.1})
    with pytest.raises(ValueError, match="nothing to raise"):
        CombinedMetric(parts, names=["a", "b"], constraints={"a": 0.1, "b": 0.1})
    both = CombinedMetric(parts, [1.0, 0.1], names=["a", "b"], constraints={"a": 0.1, "b": 0.1})
    assert both.present_weights == [1.0, 0.1]


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (["a"], r"`constraints` must be a mapping from names of its metrics, got \['a'\]"),
        ({"a": {"eps": 0.1, "epsilon": 0.1}}, "does not fit 'constraints'.*epsilon"),
        ({"a": 0}, "'constraints': A constraint's `eps` must be a positive number, got 0"),
        ({"b": 0.1}, "A constraint is of 'b', but the parts are"),
    ],
)
def test_wrong_constraints_of_a_recipe_are_usage_errors(constraints, message):
    entries = [{"metric": "weight_norm"}, {"metric": "weight_norm", "name": "a"}]
    with pytest.raises(UsageError, match=f"--metric_kwargs.*{message}"):
        named_metric("combined", {"metrics": entries, "constraints": constraints})
