"""`trl_dpg.tuning`, `trl-dpg tune`, and `"auto"` in training and in the other commands."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import yaml
from peft import LoraConfig

from tests import small_runs
from tests.small_runs import PROMPTS, TEXTS, dpg_config, make_student, make_trainer
from tests.test_reward import on_two_ranks
from tests.test_verify import METRIC, RECIPE, SAMPLES
from tests.tiny import make_model, make_samples
from trl_dpg import DPGConfig, DPGReward, InnerLoopConfig, Student, cli, metagradient, ranks
from trl_dpg import reward as reward_module
from trl_dpg.attribution import chunks
from trl_dpg.config import StudentArguments
from trl_dpg.metagradients.config import SettingsError
from trl_dpg.metagradients.fine_tuning import FineTuning
from trl_dpg.scripts.tune import TuneArguments, entry, tuned_recipe
from trl_dpg.student_scorer import StudentScorer
from trl_dpg.tuning import MAX_REWARD_STEPS, Trial, reuse, search, trials, tune, tune_together
from trl_dpg.tuning.search import _rounded
from trl_dpg.verification import Agreement, predicted_and_actual, random_signs, reweighting, verify
from trl_dpg.verification.reweighting import one_step


AUTO = InnerLoopConfig(learning_rate="auto", eps_root="auto", batch_size=16)
OTHERS = make_samples(16, seed=9)


def student(peft_config=None):
    return Student(make_model(), peft_config=peft_config)


# -- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [16, 4], ids=["one step", "four steps"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_chosen_values_hold_for_other_samples(optimizer, batch_size):
    config = replace(AUTO, optimizer=optimizer, batch_size=batch_size)
    result = tune(student(), SAMPLES, METRIC, config)
    assert result.found and result.reward_steps <= MAX_REWARD_STEPS
    chosen = result.apply(config)
    verified = verify(student(), OTHERS, METRIC, chosen, compare_precision=False, try_remedies=False)
    assert verified["pearson"].value >= 0.99 and verified["metasmoothness"].value >= 0.9
    # Φ moves, and a clearly larger learning rate was tried unless the budget was spent
    (best,) = [trial for trial in result.trials if {k: getattr(trial, k) for k in result.chosen} == result.chosen]
    assert abs(best.metric_change) > 1e-3 and best.agrees and best.loss_change < 0
    larger = [trial for trial in result.trials if trial.learning_rate > best.learning_rate]
    assert all(not trial.agrees for trial in larger)


def test_only_what_is_auto_is_chosen():
    rate = tune(student(), SAMPLES, METRIC, replace(AUTO, eps_root=1e-3))
    assert list(rate.chosen) == ["learning_rate"] and {trial.eps_root for trial in rate.trials} == {1e-3}
    root = tune(student(), SAMPLES, METRIC, replace(AUTO, learning_rate=1e-2))
    assert list(root.chosen) == ["eps_root"] and {trial.learning_rate for trial in root.trials} == {1e-2}
    assert root.apply(replace(AUTO, learning_rate=1e-2)) == replace(AUTO, learning_rate=1e-2, **root.chosen)
    agreeing = [trial.eps_root for trial in root.trials if trial.agrees and trial.pearson >= search.CLOSE]
    assert root.chosen["eps_root"] == min(agreeing) and len(agreeing) < len(root.trials)


def test_a_trial_has_the_figures_of_a_metagradient_and_of_fine_tunings_with_other_weights():
    for batch_size in (16, 4):
        config = replace(AUTO, batch_size=batch_size)
        trial = tune(student(), SAMPLES, METRIC, config, seed=3).trials[0]
        values = replace(config, learning_rate=trial.learning_rate, eps_root=trial.eps_root)
        scores = metagradient(student(), SAMPLES, METRIC, values)
        fine_tuning = FineTuning(student(), SAMPLES, values)
        directions = random_signs(trial.num_directions, 16, seed=3)
        agreement = predicted_and_actual(fine_tuning, METRIC, scores.scores, directions)
        assert trial.pearson == pytest.approx(agreement.mirrored, abs=1e-4)
        assert trial.slope == pytest.approx(agreement.slope, rel=1e-2)
        assert trial.metric_change == pytest.approx(scores.metric_after - scores.metric_before, abs=1e-5)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules="all-linear")], ids=["full", "lora"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("num_directions", [2, 8], ids=["batches", "samples"])
def test_the_only_step_is_linear_in_the_data_weights(num_directions, max_grad_norm, peft_config):
    config = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-4, batch_size=16, max_grad_norm=max_grad_norm)
    fine_tuning, directions = FineTuning(student(peft_config), SAMPLES, config), random_signs(num_directions, 16, 0)
    single = one_step(fine_tuning, directions)
    moved = single.end(config, 0.05, 1)
    assert (moved - fine_tuning.theta(1 + 0.05 * directions[1])).abs().max() < 1e-7
    scores = metagradient(student(peft_config), SAMPLES, lambda s: s.theta.sin().sum(), config).scores
    slopes = single.slopes(config, single.end(config).cos())
    torch.testing.assert_close(slopes, directions.double() @ scores.double(), rtol=1e-3, atol=1e-5)


def judged(predicted, actual, metric=1.0, smoothness=1.0):
    trial = Trial(1e-3, 1e-9, metric_change=0.1, metasmoothness=smoothness)
    goes_on = trials.judge(trial, torch.tensor(predicted, dtype=torch.float64), actual, metric)
    return trial.verdict, goes_on


def test_verdicts():
    assert judged([1.0, 2.0, 3.0], [1.0, 2.0, 3.1]) == ("agrees", True)
    assert judged([1.0, 2.0, 3.0], [1.0, 2.0, 3.1], smoothness=0.8) == ("rough", True)
    assert judged([1.0, 2.0, 3.0], [0.6, 1.2, 1.8]) == ("disagrees", False)  # the slope
    assert judged([1.0, 2.0, 3.0], [1.0, -2.0]) == ("disagrees", False)
    assert judged([1.0, 2.0, 3.0], [1.4, 1.8]) == ("disagrees", True)  # may still be chance
    assert judged([1e-7, 2e-7, 3e-7], [1e-7, 2e-7, 3e-7]) == ("still", False)  # rounding errors
    assert judged([0.0, 0.0, 0.0], [0.0]) == ("still", False)
    assert judged([1.0, 2.0, 3.0], [math.inf]) == ("diverges", False)


def test_opposite_directions_count_as_well():
    predicted, actual = torch.tensor([[1.0, 2.0, 4.0], [1.1, 1.9, 4.2]], dtype=torch.float64)
    both = Agreement(torch.cat([predicted, -predicted]), torch.cat([actual, -actual]))
    assert Agreement(predicted, actual).mirrored == pytest.approx(both.pearson)


def test_the_search_ends_with_a_doubt_if_nothing_agrees(monkeypatch):
    monkeypatch.setattr(trials, "AGREES", 1.1)
    result = tune(student(), SAMPLES, METRIC, AUTO)
    assert not result.found and "No values agreed" in result.render()
    assert result.chosen["learning_rate"] in {trial.learning_rate for trial in result.trials}
    assert result.reward_steps <= MAX_REWARD_STEPS


@pytest.mark.parametrize(
    ("tried", "rate"),
    [
        ([(1e-3, "overshoots", math.nan), (3e-4, "disagrees", 0.98), (1e-4, "disagrees", 0.99)], 1e-4),
        ([(1e-3, "turns", math.nan), (1e-4, "overshoots", math.nan), (1e-2, "diverges", math.nan)], 1e-4),
        ([(1e-3, "still", 0.1), (1e-2, "still", math.nan)], 1e-2),
        ([(1e-3, "still", 0.1), (1e-2, "still", math.nan), (1e-1, "turns", math.nan)], 1e-1),
        ([(1e-2, "diverges", math.nan), (1e-3, "diverges", math.nan)], 1e-3),
    ],
)
def test_if_nothing_agrees_no_trial_is_taken_that_was_not_measured_while_another_was(tried, rate):
    tried = [Trial(value, 1e-6, pearson=pearson, verdict=verdict) for value, verdict, pearson in tried]
    assert search.most_promising(tried).learning_rate == rate


def test_learning_rates_are_rounded_to_one_digit():
    assert [_rounded(value) for value in (1.04e-3, 3.2e-3, 0.014, 9.0, 4.4)] == [1e-3, 3e-3, 0.01, 10.0, 5.0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (InnerLoopConfig(), "none of learning_rate, eps_root is 'auto'"),
        (replace(AUTO, attribution="dataset"), "computes no scores"),
    ],
)
def test_without_a_choice_to_make_it_raises(config, message):
    with pytest.raises(ValueError, match=message):
        tune(student(), SAMPLES, METRIC, config)


def test_a_schedule_without_a_learning_rate_is_refused():
    config = replace(AUTO, lr_scheduler_type="constant_with_warmup", warmup_steps=1)  # one step
    with pytest.raises(SettingsError, match=r"is 0 in each of the 1 steps.*`warmup_steps` \(1\): a warm-up starts"):
        tune(student(), SAMPLES, METRIC, config)
    assert tune(student(), SAMPLES, METRIC, replace(config, batch_size=8)).chosen


@pytest.mark.parametrize("batch_size", [16, 4], ids=["one step", "four steps"])
@pytest.mark.parametrize(("factor", "value"), [(0.0, "0.0"), (math.nan, "nan")])
def test_a_gradient_of_zero_or_that_is_not_finite_is_refused(monkeypatch, factor, value, batch_size):
    for module in (trials, reweighting):  # both use it to find the size of a step's gradient
        gradient = module.step_gradient
        monkeypatch.setattr(module, "step_gradient", lambda *a, gradient=gradient: factor * gradient(*a))
    with pytest.raises(SettingsError, match=f"gradient of the student's loss on these samples is {value}"):
        tune(student(), SAMPLES, METRIC, replace(AUTO, batch_size=batch_size))


@pytest.mark.parametrize(("vectors", "number"), [(1000, 4), (7, 3), (1, 2)])
def test_with_one_step_directions_are_as_many_as_fit_into_memory(monkeypatch, vectors, number):
    size = student().initial_theta().nbytes
    monkeypatch.setattr(reweighting, "free_memory", lambda device: 4 * vectors * size)
    result = tune(student(), SAMPLES, METRIC, AUTO)
    assert max(trial.num_directions for trial in result.trials) == number


# -- "auto" ----------------------------------------------------------------------------------------------------------


def test_auto_must_be_resolved_before_a_student_is_fine_tuned():
    with pytest.raises(SettingsError, match="`learning_rate` and `eps_root`: 'auto' stands for a number"):
        metagradient(student(), SAMPLES, METRIC, AUTO)


@pytest.mark.parametrize("name", ["learning_rate", "eps_root"])
def test_other_words_are_refused_and_the_remedy_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be a number or 'auto', got 'fast'"):
        InnerLoopConfig(**{name: "fast"})
    with pytest.raises(ValueError, match=f"`student_...`.*{name} must be a number or 'auto', got 'fast'"):
        DPGConfig(output_dir="x", **{f"student_{name}": "fast"})


def test_the_command_line_takes_numbers_and_auto(tmp_path, capsys):
    from trl_dpg.scripts.arguments import make_recipe_parser

    (tmp_path / "recipe.yaml").write_text("metric: weight_norm\noutput_dir: x\nstudent_eps_root: auto\nbf16: false\n")
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--dataset_name", "d", "--student_learning_rate", "1e-3"]
    _, args, *_ = make_recipe_parser().parse_args_and_config(arguments)
    assert (args.student_learning_rate, args.student_eps_root) == (1e-3, "auto")
    assert args.inner_loop_config().auto == ("eps_root",)
    with pytest.raises(SystemExit):
        cli.main(["dpg", *arguments, "--student_eps_root", "fast"])
    assert "eps_root must be a number or 'auto', got 'fast'" in capsys.readouterr().err


def test_the_reward_chooses_on_its_first_batch_and_never_again(monkeypatch):
    reward = DPGReward(make_student(), small_runs.METRIC, replace(AUTO, batch_size=4))
    first = reward(PROMPTS, TEXTS)
    chosen = reward.inner_loop_config
    assert not chosen.auto and reward.tuning.apply(replace(AUTO, batch_size=4)) == chosen
    again = DPGReward(make_student(), small_runs.METRIC, chosen)
    assert again(PROMPTS, TEXTS) == first
    monkeypatch.setattr(search, "_Search", None)
    reward(PROMPTS, TEXTS[::-1])
    assert reward.inner_loop_config == chosen


RANKS_THAT_CHOOSE = """
    import json, pathlib, sys
    sys.path.insert(0, {root!r})
    import tests.conftest
    from accelerate import PartialState
    from tests.test_tuning import *

    state = PartialState(cpu=True)
    mine = slice(4 * state.process_index, 4 * state.process_index + 4)
    config, path = replace(AUTO, batch_size=4), {out!r} + "/tune.json"
    reward = DPGReward(make_student(), small_runs.METRIC, config, tuning_file=path)
    rewards = reward(PROMPTS[mine], TEXTS[mine])
    results = [reward.inner_loop_config.learning_rate, reward.inner_loop_config.eps_root, rewards]
    pathlib.Path({out!r}, f"{{state.process_index}}.json").write_text(json.dumps(results))
"""


def test_two_ranks_make_the_choice_of_one(tmp_path):
    both = on_two_ranks(RANKS_THAT_CHOOSE, tmp_path)
    alone = DPGReward(make_student(), small_runs.METRIC, replace(AUTO, batch_size=4))
    rewards, chosen = alone(PROMPTS, TEXTS), alone.inner_loop_config
    for rank, (learning_rate, eps_root, mine) in enumerate(both):
        assert (learning_rate, eps_root) == (chosen.learning_rate, chosen.eps_root)
        assert mine == pytest.approx(rewards[4 * rank : 4 * rank + 4], rel=1e-5)
    assert json.loads((tmp_path / "tune.json").read_text())["complete"]


def test_a_resumed_training_does_not_choose_anew_and_all_records_have_numbers(tmp_path, monkeypatch):
    args = dpg_config(
        tmp_path,
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        student_learning_rate="auto",
        student_eps_root="auto",
    )
    trainer = make_trainer(args)
    trainer.train()
    trainer.create_model_card()
    chosen = json.loads((tmp_path / "tune.json").read_text())["chosen"]
    config = json.loads((tmp_path / "dpg_config.json").read_text())
    assert {name: config["inner_loop"][name] for name in chosen} == chosen
    assert f'"learning_rate": {chosen["learning_rate"]}' in (tmp_path / "README.md").read_text()
    args = replace_steps(args, 2)
    monkeypatch.setattr(search, "_Search", None)  # choosing anew would fail
    resumed = make_trainer(args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert {name: getattr(resumed.dpg_reward.inner_loop_config, name) for name in chosen} == chosen
    new = make_trainer(args)
    with pytest.raises(TypeError):  # a new run in the same folder chooses anew
        new.train()


def auto_config(folder, **kwargs):
    return dpg_config(folder, max_steps=1, student_learning_rate="auto", student_eps_root="auto", **kwargs)


def count_choices(monkeypatch):
    """A list that gets an entry for each search."""
    searches, run = [], search._Search.run

    def counted(self):
        searches.append(self)
        run(self)

    monkeypatch.setattr(search._Search, "run", counted)
    return searches


def test_an_evaluation_before_the_training_chooses_for_evaluations_only(tmp_path, monkeypatch):
    searches = count_choices(monkeypatch)
    trainer = make_trainer(auto_config(tmp_path), eval_dataset=small_runs.TRAIN_PROMPTS.select(range(4)))
    for _ in range(2):
        trainer.evaluate()
    assert len(searches) == 1 and not (tmp_path / "tune.json").exists()
    trainer.train()
    assert len(searches) == 2 and json.loads((tmp_path / "tune.json").read_text())["complete"]
    trainer.evaluate()
    assert len(searches) == 2


def test_a_training_with_numbers_leaves_an_earlier_choice_alone(tmp_path):
    (tmp_path / "tune.json").write_text("{}")
    make_trainer(dpg_config(tmp_path, max_steps=1)).train()
    assert (tmp_path / "tune.json").exists()


def test_a_resumed_run_without_a_step_keeps_the_numbers_in_its_records(tmp_path, monkeypatch):
    args = auto_config(tmp_path, save_strategy="steps", save_steps=1)
    data = {"train_dataset": small_runs.TRAIN_PROMPTS.select(range(4))}  # an epoch is a step
    make_trainer(args, **data).train()
    config = (tmp_path / "dpg_config.json").read_text()
    chosen = json.loads((tmp_path / "tune.json").read_text())["chosen"]
    monkeypatch.setattr(search, "_Search", None)
    resumed = make_trainer(args, **data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    resumed.create_model_card()
    inner_loop = json.loads((tmp_path / "dpg_config.json").read_text())["inner_loop"]
    assert inner_loop == json.loads(config)["inner_loop"] and inner_loop["eps_root"] == chosen["eps_root"]
    assert f'"learning_rate": {chosen["learning_rate"]}' in (tmp_path / "README.md").read_text()
    (tmp_path / "tune.json").unlink()  # then nothing knows the numbers, but the settings keep them
    make_trainer(args, **data).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert json.loads((tmp_path / "dpg_config.json").read_text())["inner_loop"] == inner_loop


def test_a_file_without_settings_is_not_a_choice(tmp_path):
    """Such files come from elsewhere. A resumed training must not fail on them."""
    (tmp_path / "tune.json").write_text(json.dumps(tune(student(), SAMPLES, METRIC, AUTO).figures()))
    result = tune_together(student(), SAMPLES, METRIC, AUTO, tmp_path / "tune.json")
    written = json.loads((tmp_path / "tune.json").read_text())
    assert result.found and written["complete"] and written["settings"]


def test_a_choice_with_data_is_reused_for_the_same_data_only(tmp_path, monkeypatch):
    searches = count_choices(monkeypatch)
    for data, number in (({"samples": "a"}, 1), ({"samples": "a"}, 1), ({"samples": "b"}, 2), (None, 3)):
        tune_together(student(), SAMPLES, METRIC, AUTO, tmp_path / "tune.json", data)
        assert len(searches) == number


def test_auto_is_refused_early_for_the_naive_baseline():
    config = replace(AUTO, attribution="dataset")
    with pytest.raises(SettingsError, match="`learning_rate` and `eps_root`: attribution='dataset' computes no"):
        DPGReward(make_student(), small_runs.METRIC, config, cross_group_batching=False, num_generations=2)


def test_the_student_is_moved_where_an_error_reaches_all_processes(monkeypatch):
    inside = []

    def from_all_ranks(function, name):
        inside.append(name)
        result = ranks.from_all_ranks(function, name)
        inside.pop()
        return result

    @contextmanager
    def guard(self, name):
        inside.append(name)
        yield
        inside.pop()

    moved = []
    for module in (reuse, reward_module):
        monkeypatch.setattr(module, "from_all_ranks", from_all_ranks)
    monkeypatch.setattr(ranks.Ranks, "guard", guard)
    monkeypatch.setattr(StudentScorer, "move", lambda self, move, metric: moved.append((move.__name__, *inside)))
    reward = DPGReward(make_student(), small_runs.METRIC, replace(AUTO, batch_size=4))
    moved.clear()
    reward(PROMPTS, TEXTS)
    scored = [("move_in", "The DPG reward"), ("move_out", "The DPG reward")]
    assert moved == [("move_in", "Choosing the inner loop's numbers"), *scored]


def replace_steps(args, max_steps):
    args.max_steps = max_steps
    return args


# -- the commands ----------------------------------------------------------------------------------------------------

SMALL = ["--num_samples", "32", "--student_batch_size", "8"]


def test_the_command_writes_its_evidence_and_a_recipe_that_trains_and_verifies(tmp_path, capsys):
    cli.main(["tune", "--config", str(RECIPE), "--output_dir", str(tmp_path), *SMALL])
    figures = json.loads((tmp_path / "tune.json").read_text())
    out = capsys.readouterr().out
    assert "| learning rate | eps_root | Pearson |" in out and "Chosen: --student_learning_rate" in out
    assert figures["found"] and figures["num_samples"] == 32 and len(figures["trials"]) >= 2
    recipe, before = (yaml.safe_load(path.read_text()) for path in (tmp_path / "tuned.yaml", RECIPE))
    changed = {"student_learning_rate", "student_eps_root", "student_batch_size"}
    assert {name: recipe[name] for name in recipe if name not in changed} == {
        name: before[name] for name in before if name not in changed
    }
    assert recipe["student_batch_size"] == 8
    assert recipe["student_learning_rate"] == figures["chosen"]["learning_rate"]
    config = ["--config", str(tmp_path / "tuned.yaml")]
    cli.main(["verify", *config, "--num_samples", "32", "--output_dir", str(tmp_path / "verified")])
    figures = json.loads((tmp_path / "verified" / "verify.json").read_text())
    assert figures["complete"] and figures["trustworthy"]


def test_settings_of_the_command_line_are_written_exactly():
    arguments = TuneArguments(metric="weight_norm")
    student = {"student_adam_beta2": 0.999, "student_learning_rate": 1e-5}
    written = yaml.safe_load(tuned_recipe(arguments, student, {"student_learning_rate": 1e-5}))
    assert written == student | {"metric": "weight_norm"}


def test_a_recipe_leaves_out_credentials_and_keeps_paths(tmp_path):
    arguments = TuneArguments(metric="weight_norm", dataset_name="/scratch/hf_checkpoints_run1/train.jsonl")
    arguments.recipe = tmp_path / "recipe.yaml"
    arguments.recipe.write_text("metric: weight_norm\nmodel_init_kwargs:\n  token: sesame\nlearning_rate: 0.1\n")
    student = {"student_model_init_kwargs": {"token": "sesame"}, "student_learning_rate": 1e-5}
    text = tuned_recipe(arguments, student, {"student_learning_rate": 1e-5})
    assert yaml.safe_load(text) == {
        "metric": "weight_norm",
        "learning_rate": 0.1,
        "student_learning_rate": 1e-5,
        "dataset_name": arguments.dataset_name,
    }
    for name in ("model_init_kwargs", "student_model_init_kwargs"):
        assert f"\n# {name} is left out, because it has a credential." in text
    assert "sesame" not in text and "hidden" not in text


@pytest.mark.parametrize(
    "value", [0.999, 1e-5, 0.12345, 5e-324, [0.9, 1e-8], {"a": {"b": 1e-8}}, "¿qué?\n\n{x}", None]
)
def test_a_recipe_is_written_with_the_very_values_of_the_settings(value):
    read = yaml.safe_load(entry("name", value))["name"]
    assert read == value and type(read) is type(value)


def test_verify_and_dpg_resolve_auto_on_their_own_samples(tmp_path):
    auto = ["--student_learning_rate", "auto", "--student_eps_root", "auto"]
    cli.main(["verify", "--config", str(RECIPE), "--output_dir", str(tmp_path / "verify"), *SMALL, *auto])
    assert json.loads((tmp_path / "verify" / "verify_tune.json").read_text())["found"]
    training = ["--max_steps", "1", "--per_device_train_batch_size", "32", "--num_generations", "16"]
    training += ["--student_batch_size", "16", "--output_dir", str(tmp_path / "dpg")]
    cli.main(["dpg", "--config", str(RECIPE), *training, *auto])
    assert "metric" in json.loads((tmp_path / "dpg" / "summary.json").read_text())["trained"]
    assert json.loads((tmp_path / "dpg" / "tune.json").read_text())["complete"]


@pytest.fixture
def texts(tmp_path):
    """Arguments of commands with a student on disk, and the path of a dataset."""
    make_student().model.save_pretrained(tmp_path)
    small_runs.TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    common = ["--student_model_name_or_path", str(tmp_path), "--metric", "weight_norm", "--student_batch_size", "4"]
    common += ["--student_learning_rate", "auto", "--student_eps_root", "auto"]
    return common, str(tmp_path / "texts.jsonl")


def test_attribute_and_evaluate_resolve_auto(tmp_path, texts, monkeypatch):
    searches = count_choices(monkeypatch)
    common, path = texts
    data = ["--dataset_name", path, "--output_format", "jsonl", "--dataset_chunk", "8"]
    for _ in range(2):  # the second time from the journal
        cli.main(["attribute", *common, *data, "--output_dir", str(tmp_path / "scores")])
    assert len(searches) == 1
    chosen = json.loads((tmp_path / "scores" / "attribute_tune.json").read_text())["chosen"]
    settings = json.loads((tmp_path / "scores" / "summary.json").read_text())["settings"]
    assert settings["student_learning_rate"] == chosen["learning_rate"]
    data = ["--datasets", path, "--seeds", "0", "--output_dir", str(tmp_path / "fresh")]
    cli.main(["evaluate", *common, *data, "--attribution", "dataset"])  # which plays no part here
    assert (tmp_path / "fresh" / "evaluate_tune.json").exists() and (tmp_path / "fresh" / "evaluation.json").exists()
    assert len(searches) == 2


def test_attribute_checks_settings_and_journal_before_it_loads_a_student(tmp_path, texts, monkeypatch, capsys):
    common, path = texts
    arguments = ["attribute", *common, "--dataset_name", path, "--output_dir", str(tmp_path / "scores")]
    cli.main(arguments)
    monkeypatch.setattr(StudentArguments, "load_student", None)
    for further, message in (
        (["--seed", "7"], "has scores of other settings"),
        (["--attribution", "dataset"], "--student_learning_rate and --student_eps_root: attribution='dataset'"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*arguments, *further])
        assert message in capsys.readouterr().err
    (tmp_path / "scores" / "attribute_tune.json").unlink()
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "no longer the file with the numbers" in capsys.readouterr().err


def test_evaluate_chooses_on_as_many_samples_as_a_chunk_and_writes_only_the_named_file(tmp_path, texts, monkeypatch):
    common, path = texts
    numbers = []

    def tune_fewer(student, examples, *args, **kwargs):
        numbers.append(len(examples))
        return tune(student, examples, *args, **kwargs)

    monkeypatch.setattr(reuse, "tune", tune_fewer)
    monkeypatch.setattr(chunks, "SAMPLES_PER_CHUNK", 4)
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    cli.main(["evaluate", *common, "--datasets", path, "--seeds", "0", "--output_file", "x.json"])
    assert numbers == [4] and set(tmp_path.iterdir()) - before == {tmp_path / "x.json"}


def test_tune_leaves_the_folder_of_a_training_alone(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"metric: weight_norm\noutput_dir: {tmp_path / 'run'}\ndataset_name: d\n")
    from trl_dpg.scripts.tune import make_parser

    arguments = ["--config", str(recipe)]
    assert make_parser().parse_args_and_config(arguments)[0].output_dir == str(tmp_path / "run_tuned")
    given = make_parser().parse_args_and_config([*arguments, f"--output_dir={tmp_path / 'run'}"])[0]
    assert given.output_dir == str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dpg_config.json").write_text("{}")
    with pytest.raises(SystemExit):
        cli.main(["tune", *arguments, "--output_dir", str(tmp_path / "run")])
    assert "holds a training run or a model (dpg_config.json)" in capsys.readouterr().err


@pytest.mark.parametrize("settings, number", [({}, 64), ({"cross_group_batching": False, "num_generations": 4}, 16)])
def test_samples_are_as_many_as_a_student_is_fine_tuned_on(settings, number):
    batch = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 2}
    assert TuneArguments(metric="weight_norm", dataset_name="texts.jsonl", **batch, **settings).num_samples == number
