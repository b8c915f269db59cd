"""`trl_dpg.verification`, `trl-dpg verify`, and `verify_steps` in training."""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from tests import small_runs
from tests.small_runs import PROMPTS, TEXTS, dpg_config, make_student, make_trainer
from tests.tiny import make_model, make_samples, make_tokenizer
from tests.unroll import log_likelihood, unroll
from trl_dpg import DPGReward, InnerLoopConfig, Student, cli, metagradient
from trl_dpg.metrics import LanguageModelingMetric
from trl_dpg.scripts.flags import in_flags
from trl_dpg.verification import (
    Agreement,
    FineTuning,
    compute_dtype,
    gradient_noise,
    in_precision,
    measurements,
    metasmoothness,
    predicted_and_actual,
    random_signs,
    verdict,
    verify,
)


RECIPE = Path(__file__).parents[1] / "recipes" / "pattern_67" / "mini.yaml"
SAMPLES = make_samples(16)
BENCHMARK = make_samples(4, seed=5)
METRIC = LanguageModelingMetric(BENCHMARK)
SMOOTH = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-4, batch_size=4)
ROUGH = InnerLoopConfig(learning_rate=1e-2, eps_root=0.0, batch_size=4)


# -- the figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules="all-linear")], ids=["full", "lora"])
def test_at_weight_one_the_fine_tuning_ends_where_the_metagradients_did(peft_config):
    student = Student(make_model(), peft_config=peft_config)
    out = metagradient(student, SAMPLES, METRIC, SMOOTH)
    assert FineTuning(student, SAMPLES, SMOOTH).metric(torch.ones(16), METRIC) == out.metric_after


def test_predicted_and_actual_changes_are_those_of_the_float64_unroll():
    model = make_model("gpt2", scale=1.0).double()
    plain = dict(lr=1e-3, batch_size=4, eps_root=1e-7)
    config = InnerLoopConfig(learning_rate=1e-3, batch_size=4, eps_root=1e-7)
    student, h = Student(model), 0.05
    (d,) = directions = random_signs(1, 16, seed=3)
    exact = unroll(model, SAMPLES, log_likelihood(BENCHMARK), torch.ones(16), **plain)[0]
    ahead, behind = (
        unroll(model, SAMPLES, log_likelihood(BENCHMARK), 1 + s * d.double(), **plain)[2] for s in (h, -h)
    )
    scores = metagradient(student, SAMPLES, METRIC, config).scores
    agreement = predicted_and_actual(FineTuning(student, SAMPLES, config), METRIC, scores, directions, h)
    assert agreement.predicted.item() == pytest.approx(2 * h * (exact @ d.double()).item(), rel=1e-5)
    assert agreement.actual.item() == pytest.approx(ahead - behind, rel=1e-6)


def test_correlations_are_those_of_numpy_and_ties_share_their_rank():
    a, b = torch.randn(2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    agreement = Agreement(a, a + b)
    assert agreement.pearson == pytest.approx(np.corrcoef(a, a + b)[0, 1], abs=1e-12)
    ranks = [np.argsort(np.argsort(values.numpy())) for values in agreement]
    assert agreement.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)
    tied = Agreement(torch.tensor([1.0, 2.0, 2.0, 9.0]), torch.tensor([1.0, 3.0, 2.0, 4.0]))
    assert tied.spearman == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1], abs=1e-12)
    assert Agreement(a, 3 * a).slope == pytest.approx(3)


class Thetas:
    """A fine-tuning whose parameters are a given function of the first weight."""

    steps = [None, None]  # more than one

    def __init__(self, function):
        self.function = function

    def theta(self, weights):
        return torch.tensor(self.function(weights[0].item()))


def test_metasmoothness_weighs_agreeing_signs_by_the_whole_movement():
    # To 1 and on, in steps of 0.1: one parameter moves by 3 and by 1, one by 2 and by -5, one by -1 and by -1
    path = {0.9: [0.0, 0.0, 0.0], 1.0: [3.0, 2.0, -1.0], 1.1: [4.0, -3.0, -2.0]}
    # From beginning to end they move by 4, 3 and 2; the second turned back
    v = torch.tensor([[1.0]])
    assert metasmoothness(Thetas(lambda w: path[round(w, 3)]), v, 0.1) == pytest.approx((4 - 3 + 2) / 9)
    assert metasmoothness(Thetas(lambda w: [w**2]), v, 0.1) == 1
    assert np.isnan(metasmoothness(Thetas(lambda w: [0.0]), v, 0.1))


def test_one_step_is_smooth_and_four_of_adam_without_eps_root_are_not():
    student, directions = Student(make_model()), random_signs(2, 16, seed=0)
    for optimizer in ("sgd", "adamw"):  # monotone in w
        one = InnerLoopConfig(optimizer=optimizer, learning_rate=0.1, eps_root=0.0, batch_size=16)
        assert metasmoothness(FineTuning(student, SAMPLES, one), directions) > 0.99
    assert metasmoothness(FineTuning(student, SAMPLES, ROUGH), directions) < 0.7


def test_gradient_noise_is_that_of_the_samples_own_gradients():
    model, samples = make_model(scale=1.0), SAMPLES[:12]
    gradients = []
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        loss = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    gradients = torch.stack(gradients).double()
    variance = gradients.var(dim=0, correction=1).sum().item()
    signal = gradients.mean(dim=0).square().sum().item() - variance / 12
    noise = gradient_noise(FineTuning(Student(model), samples, InnerLoopConfig(batch_size=3)))
    assert noise.noise_scale == pytest.approx(variance / signal, rel=1e-3)
    assert noise.noise_share == pytest.approx(variance / 3 / (signal + variance / 3), rel=1e-3)
    nonzero = gradients.mean(dim=0).count_nonzero().item()
    assert noise.mean_square == pytest.approx((signal + variance / 3) / nonzero, rel=1e-3)


def test_grouped_samples_give_the_same_gradient_noise_in_the_mean(monkeypatch):
    samples = make_samples(48, seed=2)
    fine_tuning = FineTuning(Student(make_model(scale=1.0)), samples, InnerLoopConfig(batch_size=8))
    grouped = gradient_noise(fine_tuning)
    monkeypatch.setattr(measurements, "NUM_GROUPS", 48)
    assert grouped.noise_share == pytest.approx(gradient_noise(fine_tuning).noise_share, rel=0.2)


# -- the verdict -----------------------------------------------------------------------------------------------------


def test_a_smooth_set_up_is_trustworthy_and_nothing_is_changed():
    student = Student(make_model())
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    result = verify(student, SAMPLES, METRIC, SMOOTH, num_directions=8)
    assert result.trustworthy and not result.remedies
    assert result["pearson"].value >= 0.99 and result["pearson"].status == "pass"
    assert result["pearson"].value == pytest.approx(np.corrcoef(result.predicted, result.actual)[0, 1])
    assert "This set-up is trustworthy" in result.render()
    assert all(torch.equal(p, before[name]) for name, p in student.model.named_parameters())


def test_without_eps_root_it_says_so_and_finds_what_helps():
    result = verify(Student(make_model()), SAMPLES, METRIC, ROUGH, num_directions=8, compare_precision=False)
    assert not result.trustworthy and result["metasmoothness"].status == "fail"
    for name in ("pearson", "metasmoothness"):
        assert result[name].advice.startswith("raise `eps_root` to 1e-")
    assert result.remedies[-1].helps and "eps_root" in result.remedies[-1].changes
    fitting = f"1e{round(np.log10(result.remedies[-1].changes['eps_root']))}"
    assert "NOT trustworthy" in result.render() and f"Change: `eps_root` {fitting}" in result.render()
    shown = in_flags(result.render())
    assert f"-> raise --student_eps_root to {fitting}" in shown and f"Change: --student_eps_root {fitting}" in shown


def test_a_large_learning_rate_is_said_to_be_the_cause():
    rate = InnerLoopConfig(learning_rate=0.5, eps_root=1e-4, batch_size=4)
    result = verify(Student(make_model()), SAMPLES, METRIC, rate, num_directions=8, compare_precision=False)
    assert not result.trustworthy
    assert "lower `learning_rate` (now 0.5)" in result["pearson"].advice
    assert result.remedies[-1].helps and "learning_rate" in result.remedies[-1].changes


def test_a_diverging_student_fails_without_raising():
    rate = InnerLoopConfig(optimizer="sgd", learning_rate=1e30, batch_size=4)
    result = verify(Student(make_model()), SAMPLES, METRIC, rate, num_directions=3)
    assert result["finite"].status == "fail" and "learning rate" in result["finite"].meaning
    assert "`learning_rate`" in result["finite"].advice and "eps_root" not in result["finite"].advice


def test_small_batches_of_noisy_samples_get_a_warning(monkeypatch):
    monkeypatch.setattr(verdict, "NOISY", 0.0)
    result = verify(Student(make_model()), SAMPLES, METRIC, SMOOTH, num_directions=3, compare_precision=False)
    assert result["gradient_noise"].status == "warn" and result.trustworthy
    assert "`batch_size`" in result["gradient_noise"].advice


def test_it_stops_when_the_interval_decides_and_measures_all_directions_when_not(monkeypatch):
    clear = verify(Student(make_model()), SAMPLES, METRIC, SMOOTH, num_directions=12, compare_precision=False)
    assert len(clear.actual) == len(clear.predicted) == verdict.FEWEST and clear.pearson_interval[0] >= verdict.PASS
    monkeypatch.setattr(verdict, "PASS", 1.0)
    unclear = verify(
        Student(make_model()), SAMPLES, METRIC, SMOOTH, num_directions=10, compare_precision=False, try_remedies=False
    )
    assert len(unclear.actual) == 10 and unclear.actual[: verdict.FEWEST] == clear.actual


def test_the_interval_of_a_correlation_is_fishers():
    a, b = torch.randn(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    agreement = Agreement(a, a + b)
    interval = scipy.stats.pearsonr(agreement.predicted, agreement.actual).confidence_interval(0.95)
    assert agreement.interval == pytest.approx(interval, abs=1e-9)
    assert Agreement(a[:3], b[:3]).interval == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("slope", "status", "words"),
    [
        (1.0, "pass", ""),
        (
            0.74,
            "warn",
            "1.35 x too large: ranks of samples, and so rewards, are unaffected; total effects are over",
        ),
        (1.5, "warn", "1.50 x too small: ranks of samples, and so rewards, are unaffected; total effects are under"),
        (-0.2, "warn", "wrong sign"),
        (float("nan"), "warn", "all scores are zero"),
    ],
)
def test_a_slope_far_from_one_is_a_warning_that_says_what_it_costs(slope, status, words):
    check = verdict._slope_check(slope)
    assert check.status == status and words in check.advice


@pytest.mark.parametrize("metric", [lambda student: 0 * METRIC(student), lambda student: METRIC(student).floor()])
def test_a_metric_that_does_not_move_is_said_and_no_remedy_is_tried(metric):
    result = verify(Student(make_model()), SAMPLES, metric, SMOOTH, 20, compare_precision=False)
    assert not result.trustworthy and result.remedies == [] and len(result.actual) == verdict.FEWEST
    for name in ("pearson", "slope"):
        assert "does not change in any direction" in result[name].advice and "`learning_rate`" in result[name].advice
    assert "wrong sign" not in result.render()


def test_predictions_that_are_too_large_get_a_warning():
    flat = InnerLoopConfig(learning_rate=0.05, eps_root=1e-4, batch_size=4)
    torch.manual_seed(0)  # of the adapters
    student = Student(make_model(), peft_config=LoraConfig(r=2, target_modules="all-linear"))
    result = verify(student, SAMPLES, METRIC, flat, 8, compare_precision=False, try_remedies=False)
    slope = np.dot(result.predicted, result.actual) / np.dot(result.predicted, result.predicted)
    assert result["slope"].value == result.slope == pytest.approx(slope) and slope < 0.75
    assert result["slope"].status == "warn" and "too large" in result["slope"].advice


def test_with_one_step_metasmoothness_is_not_measured(monkeypatch):
    monkeypatch.setattr(measurements, "_smoothness", None)
    one = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-4, batch_size=16)
    result = verify(Student(make_model()), SAMPLES, METRIC, one, num_directions=4, compare_precision=False)
    assert result["metasmoothness"].value == 1 and "by definition, not measured" in result["metasmoothness"].meaning


def test_with_several_steps_metasmoothness_comes_from_the_same_fine_tunings():
    student, directions = Student(make_model()), random_signs(4, 16, seed=0)
    result = verify(student, SAMPLES, METRIC, SMOOTH, num_directions=4, compare_precision=False)
    fine_tuning = FineTuning(student, SAMPLES, SMOOTH)
    assert result["metasmoothness"].value == pytest.approx(metasmoothness(fine_tuning, directions), abs=1e-9)


def test_a_copy_that_does_not_fit_into_memory_is_not_compared():
    def metric(student):
        if student.parameters["model.norm.weight"].dtype == torch.bfloat16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return METRIC(student)

    one = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-4, batch_size=16)
    result = verify(Student(make_model()), SAMPLES, metric, one, num_directions=6, try_remedies=False)
    check = result["bf16_agreement"]
    assert check.status == "skip" and "not enough memory for a copy" in check.meaning and result.complete


def test_each_figure_is_told_as_soon_as_it_is_known():
    told = []

    def on_figure(result):
        told.append((len(result.actual), [check.name for check in result.checks], result.complete))

    verify(Student(make_model()), SAMPLES, METRIC, SMOOTH, num_directions=4, on_figure=on_figure)
    names = ["gradient_noise", "pearson", "spearman", "slope", "metasmoothness", "bf16_agreement", "first_order"]
    assert told[0] == (0, names[:1], False)
    assert told[1:5] == [(k, names[:1], False) for k in (1, 2, 3, 4)]
    assert told[5:] == [(4, names[:5], False), (4, names[:6], False), (4, names, False), (4, names, True)]


# -- precision -------------------------------------------------------------------------------------------------------


def test_a_half_precision_student_is_held_against_its_float32_copy():
    student = Student(make_model(dtype=torch.bfloat16))
    rough = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-12, batch_size=4)
    result = verify(student, SAMPLES, METRIC, rough, num_directions=3, try_remedies=False)
    other = metagradient(Student(make_model(dtype=torch.bfloat16).float()), SAMPLES, METRIC, rough).scores
    own = metagradient(student, SAMPLES, METRIC, rough).scores
    assert result["bf16_agreement"].value == pytest.approx(np.corrcoef(own, other)[0, 1], abs=1e-6)
    assert result["bf16_agreement"].status == "fail"
    assert '`model_init_kwargs` \'{"dtype": "float32"}\'' in result["bf16_agreement"].advice
    assert compute_dtype(student) == torch.bfloat16


def test_a_float32_student_is_only_warned_of_bfloat16(monkeypatch):
    monkeypatch.setattr(verdict, "PASS", 1.1)  # no correlation is good enough
    monkeypatch.setattr(verdict, "WARN", 1.1)
    result = verify(Student(make_model()), SAMPLES, METRIC, SMOOTH, num_directions=3, try_remedies=False)
    assert result["pearson"].status == "fail" and result["bf16_agreement"].status == "warn"
    assert "float32" in result["bf16_agreement"].advice


def test_a_4bit_copy_computes_in_bfloat16_and_the_student_in_float32(tmp_path):
    make_model(scale=2.0, vocab_size=64, hidden_size=64).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    student = Student(
        str(tmp_path),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float32"),
    )
    copy = in_precision(student, torch.bfloat16)
    assert (compute_dtype(student), compute_dtype(copy)) == (torch.float32, torch.bfloat16)
    own, other = (metagradient(s, SAMPLES, METRIC, SMOOTH).scores for s in (student, copy))
    assert not torch.equal(own, other) and np.corrcoef(own, other)[0, 1] > 0.9


def test_finite_differences_skip_bfloat16_and_say_why():
    config = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-4, batch_size=4, hvp="finite_difference")
    result = verify(Student(make_model()), SAMPLES, METRIC, config, num_directions=3)
    assert result["bf16_agreement"].status == "skip" and "finite_difference" in result["bf16_agreement"].meaning
    assert result.trustworthy


# -- the command -----------------------------------------------------------------------------------------------------


def run(output_dir, *arguments):
    arguments = ["--num_samples", "32", "--student_batch_size", "8", "--num_directions", "6", *arguments]
    cli.main(["verify", "--config", str(RECIPE), "--output_dir", str(output_dir), *arguments])
    return json.loads((output_dir / "verify.json").read_text())


def test_a_recipe_of_dpg_is_verified_on_texts_of_its_generator(tmp_path, capsys):
    figures = run(tmp_path)
    assert figures["trustworthy"] and figures["num_samples"] == 32
    assert {check["name"]: check["status"] for check in figures["checks"]}["pearson"] == "pass"
    assert "This set-up is trustworthy" in capsys.readouterr().out


def test_a_4bit_students_metric_is_compared_with_float32(tmp_path, capsys):
    recipe = RECIPE.parents[1] / "new_language" / "mini.yaml"
    small = ["--num_samples", "32", "--student_batch_size", "32", "--num_directions", "3"]
    quick = ["--try_remedies", "false", "--compare_precision", "false", "--student_learning_rate", "1e-4"]
    with contextlib.suppress(SystemExit):
        cli.main(["verify", "--config", str(recipe), "--output_dir", str(tmp_path), *small, *quick])
    checks = {check["name"]: check for check in json.loads((tmp_path / "verify.json").read_text())["checks"]}
    assert checks["quantization"]["status"] == "warn" and abs(checks["quantization"]["value"]) > 1e-3
    assert "--student_load_in_4bit" in capsys.readouterr().out


def test_the_command_shows_what_it_measures_and_an_interrupted_one_leaves_its_figures(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(verdict._Verifier, "_precision_check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    figures = json.loads((tmp_path / "verify.json").read_text())
    assert figures["trustworthy"] is None and not figures["complete"] and len(figures["actual"]) == 6
    assert "pearson" in [check["name"] for check in figures["checks"]]
    printed = capsys.readouterr()
    assert "pass  pearson" in printed.out and "Verifying: predictions" in printed.err


def test_a_broken_set_up_ends_with_status_1(tmp_path):
    with pytest.raises(SystemExit) as raised:
        run(tmp_path, "--student_eps_root", "0", "--try_remedies", "false", "--student_learning_rate", "0.1")
    assert raised.value.code == 1
    figures = json.loads((tmp_path / "verify.json").read_text())
    assert not figures["trustworthy"]
    assert any("--student_eps_root" in check["advice"] for check in figures["checks"])


def test_samples_of_a_file_are_taken_as_they_are(tmp_path):
    rows = [{"text": text} for text in ("ab cd", "ef", "ghi j", "kl mno p")]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    figures = run(tmp_path, "--dataset_name", str(tmp_path / "texts.jsonl"), "--student_batch_size", "2")
    assert figures["num_samples"] == 4


def test_samples_that_lack_the_columns_of_a_recipes_template_are_taken_as_they_are(tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in ("ab cd", "ef", "ghi j")))
    data = ["--dataset_name", str(tmp_path / "texts.jsonl"), "--student_batch_size", "2"]
    assert run(tmp_path, *data, "--prompt_template", "Rephrase: {article}")["num_samples"] == 3
    assert "taken as they are" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt_template", ""], "--prompt_template is empty"),
        (["--num_directions", "2"], "--num_directions must be at least 3"),
        (["--num_samples", "1"], "--num_samples must be at least 2"),
        (["--attribution", "dataset"], "--attribution dataset computes no scores"),
        (["--dataset_name", "texts.jsonl"], "there is no file 'texts.jsonl'"),
        (["--train_on", "prompt"], "--train_on must be"),
        (["--student_optimizer", "lion"], "Unknown optimizer 'lion'"),
    ],
)
def test_wrong_input_is_named_and_ends_with_status_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        run(tmp_path, *arguments)
    assert raised.value.code == 2 and message in capsys.readouterr().err


def test_a_dataset_without_samples_or_prompts_is_refused(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("id\n1\n2\n3\n")
    with pytest.raises(SystemExit) as raised:
        run(tmp_path, "--dataset_name", str(tmp_path / "rows.csv"))
    assert raised.value.code == 2 and "has the columns ['id']" in capsys.readouterr().err


def test_help_lists_the_arguments(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["verify", "--help"])
    out = capsys.readouterr().out
    assert raised.value.code == 0 and "--num_directions" in out and "--student_eps_root" in out


# -- in training -----------------------------------------------------------------------------------------------------


def test_training_logs_predictions_every_verify_steps_and_evaluation_does_not(tmp_path):
    args = dpg_config(
        tmp_path,
        max_steps=3,
        verify_steps=2,
        per_device_eval_batch_size=8,
        num_generations_eval=2,
        eval_strategy="steps",
        eval_steps=1,
        student_eps_root=1e-5,
    )
    trainer = make_trainer(args, eval_dataset=[{"prompt": "w1 w2"}] * 8)
    trainer.train()
    history = trainer.state.log_history
    logged = [log.get("dpg/verify/pearson") for log in history if "dpg/metric_after" in log]
    assert [value is not None for value in logged] == [True, False, True]
    assert logged[0] > 0.9 and "dpg/verify/spearman" in history[0]
    assert not any("eval_dpg/verify/pearson" in log for log in history)


def test_the_reward_logs_the_correlation_of_its_own_predictions():
    logged = {}
    reward = DPGReward(make_student(), small_runs.METRIC, small_runs.CONFIG, verify_steps=2)
    reward(PROMPTS, TEXTS, log_metric=logged.__setitem__)
    student, directions = make_student(), random_signs(6, 8, seed=42)
    scores = metagradient(student, TEXTS, small_runs.METRIC, small_runs.CONFIG).scores
    fine_tuning = FineTuning(student, TEXTS, small_runs.CONFIG)
    agreement = predicted_and_actual(fine_tuning, small_runs.METRIC, scores, directions)
    assert logged["dpg/verify/pearson"] == pytest.approx(np.corrcoef(*agreement)[0, 1], abs=1e-9)
    logged.clear()
    reward(PROMPTS, TEXTS, log_metric=logged.__setitem__)
    assert logged and "dpg/verify/pearson" not in logged


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(verify_steps=-1), "verify_steps must be 0"),
        (
            dict(
                verify_steps=1,
                cross_group_batching=False,
                num_generations=2,
                inner_loop_config=InnerLoopConfig(attribution="dataset"),
            ),
            "Set verify_steps=0",
        ),
    ],
)
def test_verify_steps_without_scores_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DPGReward(make_student(), small_runs.METRIC, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_directions=2), "at least 3 directions"),
        (dict(step=0.6), "between 0 and 0.5"),
        (dict(config=InnerLoopConfig(attribution="dataset")), "nothing to verify"),
        (dict(examples=SAMPLES[:1]), "two samples"),
    ],
)
def test_bad_arguments_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        verify(**dict(student=Student(make_model()), examples=SAMPLES, metric=METRIC) | kwargs)


def test_samples_that_are_all_the_same_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="all 4 samples are the same tokens"):
        verify(make_student(), ["w1 w2 w3"] * 4, small_runs.METRIC, small_runs.CONFIG, num_directions=3)
    make_student().model.save_pretrained(tmp_path)
    small_runs.TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "w1 w2 w{k}"}}\n' for k in range(4)))
    command = ["verify", "--dataset_name", str(tmp_path / "texts.jsonl"), "--student_max_length", "2"]
    command += ["--student_model_name_or_path", str(tmp_path), "--metric", "weight_norm", "--student_batch_size", "4"]
    with pytest.raises(SystemExit) as raised:
        cli.main(command)
    assert raised.value.code == 2 and "within --student_max_length = 2 tokens" in capsys.readouterr().err


def test_only_settings_become_flags():
    assert in_flags("raise `eps_root`, do not use `detach`") == "raise --student_eps_root, do not use `detach`"
    assert in_flags("`num_repeats` 3", {"num_repeats": "num_repeats"}) == "--num_repeats 3"


def test_correlations_with_a_metric_that_does_not_move_are_nan():
    still = Agreement(torch.arange(5.0).double(), torch.zeros(5).double())
    assert math.isnan(still.pearson) and math.isnan(still.spearman)
    moving = Agreement(torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([0.1, 0.1, 9.0, 4.0]).double())
    assert moving.spearman == pytest.approx(scipy.stats.spearmanr(*moving).statistic)
