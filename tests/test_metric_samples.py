"""Random subsets of a metric's texts: unbiased, the same before and after, and a new one for each step."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.small_runs import CONFIG, PROMPTS, TEXTS, dpg_config, make_student
from tests.tiny import make_samples
from trl_dpg import DPGConfig, DPGReward, FinetunedStudent, attribute, metagradient
from trl_dpg.metrics import CombinedMetric, LanguageModelingMetric, WeightNormMetric
from trl_dpg.metrics.draw import drawn, standard_error, systematic_draw
from trl_dpg.scripts.attribute import make_parser
from trl_dpg.scripts.usage import UsageError


SAMPLES = make_samples(11, seed=4, low=3, high=14)  # of 2 to 12 tokens to predict
SIZES = np.array([len(sample["input_ids"]) - 1 for sample in SAMPLES])
SAME = [{"input_ids": [5, k, 7, k + 20, 9]} for k in range(12)]


def finetuned(change=0.05, student=None):
    student = student or make_student()
    theta = student.initial_theta()
    torch.manual_seed(1)
    return FinetunedStudent(student, (theta + change * torch.randn_like(theta)).requires_grad_(), theta)


def log_likelihoods(student, samples=SAMPLES):
    """The mean log-likelihood of each sample's tokens."""
    ids = [torch.tensor([sample["input_ids"]]) for sample in samples]
    return -torch.stack([F.cross_entropy(student(input_ids=x).logits[0, :-1], x[0, 1:]) for x in ids])


@pytest.mark.parametrize("number", [1, 3, 7, 30])
def test_each_text_is_drawn_in_proportion_to_its_size(number):
    draws = np.array([systematic_draw(SIZES, number, [3, k]) for k in range(4000)])
    expected = number * SIZES / SIZES.sum()
    assert (draws.sum(axis=1) == number).all() and (np.abs(draws - expected) < 1).all()
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - expected) <= 5 * error + 1e-12).all()
    assert not (draws == draws[0]).all() or number == 30


def test_texts_of_one_size_are_drawn_without_replacement():
    draws = [systematic_draw([4] * 10, 6, [k]) for k in range(50)]
    assert all(set(draw) == {0, 1} for draw in draws) and len({tuple(draw) for draw in draws}) > 40
    assert (systematic_draw([4] * 10, 10, [0]) == 1).all()


def test_the_mean_over_draws_is_the_whole_metric_and_its_gradient():
    """Against the plain mean of the drawn texts' log-likelihoods, and numpy's mean over 2000 draws."""
    student, metric = finetuned(), LanguageModelingMetric(SAMPLES, batch_size=2)
    own = log_likelihoods(student)
    order = np.argsort(SIZES, kind="stable")  # the metric sorts its texts by length
    with torch.no_grad():
        whole = metric(student).item()
    for seed in range(3):
        counts = np.zeros(11)
        counts[order] = systematic_draw(SIZES[order], 4, [seed])
        expected = (own * torch.tensor(counts, dtype=own.dtype)).sum() / 4
        (gradient,) = torch.autograd.grad(expected, student.theta, retain_graph=True)
        with drawn(metric, 4, [seed]):
            value = metric(student)
            (found,) = torch.autograd.grad(value, student.theta)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-6)
    means = own.detach().double().numpy()[order]
    estimates = np.array([systematic_draw(SIZES[order], 4, [seed]) @ means / 4 for seed in range(2000)])
    assert np.abs(estimates.mean() - whole) <= 5 * estimates.std() / np.sqrt(2000) < 0.02 * abs(whole)
    with torch.no_grad():
        assert metric(student).item() == whole  # after the draws: all texts


def test_the_noise_is_the_standard_error_of_the_change():
    before = finetuned(0.0)
    after = finetuned(0.05, before.student)
    metric, number = LanguageModelingMetric(SAME, batch_size=5), 7
    assert set(metric.proxies(after, -1.0)) == {"perplexity"}
    with drawn(metric, number, [0]):
        value_before, value = metric(before).item(), metric(after).item()
        noise = metric.proxies(after, value)["metric_noise"]
    with drawn(metric, 1, [0]):
        metric(before), metric(after)
        assert "metric_noise" not in metric.proxies(after, value)  # one text has no spread
    rows = systematic_draw([4] * 12, number, [0]).nonzero()[0]
    changes = (log_likelihoods(after, SAME) - log_likelihoods(before, SAME)).detach().numpy()[rows]
    assert value - value_before == pytest.approx(changes.mean(), rel=1e-4)
    assert noise == pytest.approx(changes.std(ddof=1) / np.sqrt(number) * np.sqrt(1 - number / 12), rel=1e-4)


def test_the_noise_is_the_spread_over_draws():
    rng = np.random.default_rng(0)
    changes = rng.normal(size=40)
    errors, means = [], []
    for seed in range(2000):
        counts = systematic_draw([3] * 40, 10, [seed])
        rows = counts.nonzero()[0]
        errors.append(standard_error(np.zeros(10), changes[rows], counts[rows], 40))
        means.append(changes[rows].mean())
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.06)


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_each_step_has_a_draw_of_its_own_before_and_after():
    metric, reward_metric = LanguageModelingMetric(SAME), LanguageModelingMetric(SAME)
    reward = DPGReward(make_student(), reward_metric, CONFIG, metric_samples=5)
    order = []
    for step in range(3):
        logged, columns = {}, {}
        reward(PROMPTS, TEXTS, log_metric=logged.__setitem__, log_extra=columns.__setitem__)
        rows = systematic_draw([4] * 12, 5, [CONFIG.seed, step]).nonzero()[0]
        order.append(tuple(rows))
        out = metagradient(make_student(), TEXTS, LanguageModelingMetric([SAME[row] for row in rows]), CONFIG)
        assert logged["dpg/metric_before"] == pytest.approx(out.metric_before, rel=1e-5)
        assert logged["dpg/metric_after"] == pytest.approx(out.metric_after, rel=1e-5)
        assert columns["dpg_score"] == pytest.approx(out.scores.tolist(), rel=1e-3, abs=1e-9)
        assert 0 < logged["dpg/metric_noise"] < 1
    assert len(set(order)) == 3
    reward.choice.training = False  # an evaluation: all texts, and no draw
    logged = {}
    reward(PROMPTS, TEXTS, log_metric=logged.__setitem__)
    whole = metagradient(make_student(), TEXTS, metric, CONFIG)
    assert logged["dpg/metric_before"] == whole.metric_before and "dpg/metric_noise" not in logged
    assert reward.metric_state.num_draws == 3
    assert reward_metric(finetuned()).item() == metric(finetuned()).item()


def test_the_datasets_of_a_step_share_its_draw():
    settings = dict(cross_group_batching=False, num_generations=2, metric_samples=4)
    reward, logged = DPGReward(make_student(), LanguageModelingMetric(SAME), CONFIG, **settings), {}
    reward(PROMPTS, TEXTS, log_metric=logged.__setitem__)
    rows = systematic_draw([4] * 12, 4, [CONFIG.seed, 0]).nonzero()[0]
    own = LanguageModelingMetric([SAME[row] for row in rows])
    outs = [metagradient(make_student(), texts, own, CONFIG) for texts in (TEXTS[0::2], TEXTS[1::2])]
    assert logged["dpg/metric_before"] == pytest.approx(outs[0].metric_before, rel=1e-5)
    assert logged["dpg/metric_after"] == pytest.approx(np.mean([out.metric_after for out in outs]), rel=1e-5)


def test_the_parts_of_a_combination_have_draws_of_their_own():
    parts = [LanguageModelingMetric(SAME), LanguageModelingMetric(SAME), WeightNormMetric()]
    metric, student = CombinedMetric(parts, [1.0, 1.0, 0.0]), finetuned()
    with drawn(metric, 4, [0]), torch.no_grad():
        metric(student)
        first, second, _ = metric.values.values()
    own = log_likelihoods(student, SAME).detach().numpy()
    for index, found in enumerate((first, second)):
        rows = systematic_draw([4] * 12, 4, [0, index]).nonzero()[0]
        assert found == pytest.approx(own[rows].mean(), rel=1e-5)
    assert first != second


def test_as_many_texts_as_there_are_are_all_of_them():
    metric, student = LanguageModelingMetric(SAMPLES), finetuned()
    whole = metric(student).item()
    for number in (11, 100):
        with drawn(metric, number, [0]):
            assert metric(student).item() == whole


# -- attribute --------------------------------------------------------------------------------------------------------


def test_attribute_scores_all_chunks_by_one_draw(tmp_path):
    metric, path = LanguageModelingMetric(SAME), tmp_path / "journal.jsonl"
    arguments = dict(config=CONFIG, size=4, journal=path)
    found = attribute(make_student(), TEXTS, metric, metric_samples=5, **arguments)
    rows = systematic_draw([4] * 12, 5, [CONFIG.seed]).nonzero()[0]
    own = LanguageModelingMetric([SAME[row] for row in rows])
    expected = attribute(make_student(), TEXTS, own, CONFIG, 4)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=1e-9)
    assert found.metric_before == pytest.approx(expected.metric_before, rel=1e-5)
    for other in (None, 6):
        with pytest.raises(ValueError, match="scores of other settings: metric_samples"):
            attribute(make_student(), TEXTS, metric, metric_samples=other, **arguments)
    assert json.loads(path.read_text().splitlines()[0])["metric_samples"] == 5


# -- wrong inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, -1, 2.5, True, "3"])
def test_a_number_of_texts_must_be_whole_and_positive(number, tmp_path):
    with pytest.raises(ValueError, match="`metric_samples` must be a whole number of at least 1"):
        DPGReward(make_student(), LanguageModelingMetric(SAME), CONFIG, metric_samples=number)
    with pytest.raises(ValueError, match="`metric_samples` must be a whole number of at least 1"):
        attribute(make_student(), TEXTS, LanguageModelingMetric(SAME), CONFIG, metric_samples=number)


@pytest.mark.parametrize(
    "metric",
    [WeightNormMetric(), CombinedMetric([WeightNormMetric()]), lambda student: student.theta.sum()],
    ids=["norm", "combined", "callable"],
)
def test_a_metric_without_texts_has_nothing_to_draw_from(metric):
    with pytest.raises(ValueError, match="has no texts to draw from"):
        DPGReward(make_student(), metric, CONFIG, metric_samples=3)
    with pytest.raises(ValueError, match="the metric 'b' has no texts to draw from"):
        attribute(make_student(), TEXTS, {"a": LanguageModelingMetric(SAME), "b": metric}, CONFIG, metric_samples=3)


def test_the_configuration_and_the_command_refuse_it_early(tmp_path):
    assert dpg_config(tmp_path, metric_samples=3).metric_samples == 3
    with pytest.raises(ValueError, match="metric_samples must be at least 1, got 0"):
        DPGConfig(output_dir=str(tmp_path), metric_samples=0)
    with pytest.raises(ValueError, match="`metric_samples` would have no effect"):
        DPGReward(server="http://127.0.0.1:1", metric_samples=3)
    flags = "--metric weight_norm --dataset_name d.jsonl --student_model_name_or_path s --metric_samples 0".split()
    with pytest.raises(UsageError, match="--metric_samples must be at least 1, got 0"):
        make_parser().parse_args_and_config(args=flags)
