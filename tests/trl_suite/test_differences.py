"""
Where DPGTrainer differs from GRPOTrainer: the table of docs/training.md, with a test of what happens instead.

All of it follows from one fact: there is one reward more, that of DPG, and it comes first.
"""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOTrainer

from tests.trl_suite.cases import ADDING, Asking, RewardedCounter, does_not_apply
from tests.trl_suite.runs import changed, letters, make_trainer, parameters, prompts, scripted, student_arguments
from trl_dpg import DPGTrainer


DOCS = Path(__file__).parents[2] / "docs" / "training.md"


def last_log(trainer):
    return [log for log in trainer.state.log_history if "reward" in log][-1]


def test_without_another_reward_grpo_raises_and_dpg_trains(models, tmp_path):
    with pytest.raises(ValueError, match="No reward source"):
        make_trainer(GRPOTrainer, models, tmp_path, {}, reward_funcs=None)
    trainer = make_trainer(DPGTrainer, models, tmp_path, {}, reward_funcs=None)
    trainable, _ = parameters(trainer.model)
    trainer.train()
    assert changed(trainer.model, trainable) == set(trainable)
    assert trainer.reward_func_names == ["dpg"]
    assert last_log(trainer)["reward"] == pytest.approx(last_log(trainer)["rewards/dpg/mean"])


def test_if_all_other_rewards_are_none_grpo_warns_and_dpg_rewards(models, tmp_path, caplog):
    warning = "All reward functions returned None"
    make_trainer(GRPOTrainer, models, tmp_path, {}, reward_funcs=does_not_apply).train()
    assert warning in caplog.text
    caplog.clear()
    trainer = make_trainer(DPGTrainer, models, tmp_path, {}, reward_funcs=does_not_apply)
    trainable, _ = parameters(trainer.model)
    trainer.train()
    assert warning not in caplog.text
    assert changed(trainer.model, trainable) == set(trainable)
    log = last_log(trainer)
    assert log["rewards/does_not_apply/mean"] is None  # NaN, which JSON does not have
    assert log["reward"] == pytest.approx(log["rewards/dpg/mean"])


@pytest.mark.parametrize("environment", [RewardedCounter, Asking])
@pytest.mark.parametrize("reward_funcs", [None, letters])
def test_the_rewards_are_dpgs_then_the_functions_then_the_environments(environment, reward_funcs, models, tmp_path):
    given = dict(model=models("qwen3"), reward_funcs=reward_funcs, environment_factory=environment)
    given["train_dataset"] = None if environment is Asking else prompts(True)
    names = {}
    for trainer_class in (GRPOTrainer, DPGTrainer):
        trainer = make_trainer(trainer_class, models, tmp_path, dict(max_completion_length=192), **given)
        names[trainer_class] = trainer.reward_func_names
        assert len(trainer.reward_funcs) == len(trainer.reward_weights) == len(trainer.reward_func_names)
    assert names[GRPOTrainer] == [*(["letters"] if reward_funcs else []), environment.__name__]
    assert names[DPGTrainer] == ["dpg", *names[GRPOTrainer]]


def test_an_environments_reward_has_weight_1_beside_given_weights(models, tmp_path, monkeypatch):
    args = dict(max_completion_length=192, reward_weights=[0.5])
    given = dict(model=models("qwen3"), environment_factory=RewardedCounter, train_dataset=prompts(True))
    trainer = make_trainer(DPGTrainer, models, tmp_path, args, **given)
    assert trainer.reward_weights.tolist() == [1.0, 0.5, 1.0]
    monkeypatch.setattr(trainer.model, "generate", scripted(trainer, ADDING))
    trainer.train()
    log = last_log(trainer)
    parts = log["rewards/dpg/mean"] + 0.5 * log["rewards/letters/mean"] + log["rewards/RewardedCounter/mean"]
    assert log["reward"] == pytest.approx(parts, rel=1e-4) and log["rewards/RewardedCounter/mean"] == 1.0


def reward_models(models):
    paths = [models(name, reward=True) for name in ("qwen2", "qwen3")]
    rewards = [AutoModelForSequenceClassification.from_pretrained(path, num_labels=1) for path in paths]
    return rewards, [AutoTokenizer.from_pretrained(path) for path in paths]


def test_one_tokenizer_for_one_reward_model_is_the_second(models, tmp_path):
    (reward, _), (tokenizer, _) = reward_models(models)
    trainer = make_trainer(DPGTrainer, models, tmp_path, {}, reward_funcs=reward, reward_processing_classes=tokenizer)
    assert trainer.reward_processing_classes == [None, tokenizer]


@pytest.mark.parametrize("own", [[], [None]])
def test_tokenizers_are_for_the_further_rewards_and_dpgs_may_be_named(own, models, tmp_path):
    rewards, tokenizers = reward_models(models)
    given = [*own, *tokenizers]
    trainer = make_trainer(DPGTrainer, models, tmp_path, {}, reward_funcs=rewards, reward_processing_classes=given)
    assert trainer.reward_processing_classes == [None, *tokenizers]
    assert given == [*own, *tokenizers]
    trainer.train()


@pytest.mark.parametrize("number", [1, 4])
def test_another_number_of_tokenizers_is_refused_with_the_order_of_the_rewards(number, models, tmp_path):
    rewards, (tokenizer, _) = reward_models(models)
    message = rf"`reward_processing_classes` has {number} classes for 3 rewards: DPG's comes first.* must match"
    for trainer_class, match in ((GRPOTrainer, "must match"), (DPGTrainer, message)):
        with pytest.raises(ValueError, match=match):
            make_trainer(
                trainer_class,
                models,
                tmp_path,
                {},
                reward_funcs=rewards,
                reward_processing_classes=[tokenizer] * number,
            )


def test_without_settings_the_output_folder_is_called_dpg(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "transformers.training_args.is_torch_bf16_gpu_available", lambda: True
    )  # TRL's default is bf16
    given = dict(model=models("qwen2"), reward_funcs=letters, train_dataset=prompts())
    grpo = GRPOTrainer(**given)
    dpg = DPGTrainer(**given, **student_arguments(models))
    assert (grpo.args.output_dir, dpg.args.output_dir) == ("tiny-qwen2-GRPO", "tiny-qwen2-DPG")


def test_the_docs_name_every_difference():
    (section,) = re.findall(r"### What differs from GRPOTrainer\n(.*?)(?=\n## |\Z)", DOCS.read_text(), re.S)
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    subjects = " ".join(row.split("|")[1] for row in rows)
    for subject in ("no `reward_funcs`", "`None`", "environment", "`reward_weights`", "`reward_processing_classes`"):
        assert subject in subjects, subject
