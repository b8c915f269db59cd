"""DPGTrainer adds to GRPOTrainer and takes nothing away: the same code, the same refusals, the same numbers."""

import inspect
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import GRPOTrainer

from tests.trl_suite.cases import EVAL_DATA, EVALUATION, LORA, Counter, RewardedCounter, multiply
from tests.trl_suite.runs import changed, letters, make_trainer, parameters, prompts
from trl_dpg import DPGTrainer


TRAINERS = pytest.mark.parametrize("trainer_class", [GRPOTrainer, DPGTrainer])
REST = pytest.mark.trl_suite


def test_what_is_not_named_in_the_docstring_is_inherited():
    """So that TRL's tests of single functions (losses, masks, entropies) hold for DPGTrainer, too."""
    overridden = {name for name in vars(DPGTrainer) if hasattr(GRPOTrainer, name)} - {"__doc__", "__module__"}
    assert overridden == {"__init__", "_calculate_rewards", "create_model_card", "_tag_names", "_name", "_paper"}
    assert all(f"`{name}`" in DPGTrainer.__doc__ for name in ("_calculate_rewards", "create_model_card"))


def test_every_argument_of_grpo_is_accepted(models, tmp_path):
    ours = set(inspect.signature(DPGTrainer).parameters)
    passed_on = set(inspect.signature(GRPOTrainer).parameters) - ours
    assert passed_on == {
        *("eval_dataset", "processing_class", "callbacks", "optimizers", "quantization_config", "peft_config"),
        *("tools", "rollout_func", "environment_factory"),
    }
    model = AutoModelForCausalLM.from_pretrained(models("qwen2"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokenizer = AutoTokenizer.from_pretrained(models("qwen2"))
    given = dict(model=model, optimizers=(optimizer, None), processing_class=tokenizer)
    trainer = make_trainer(DPGTrainer, models, tmp_path, {}, **given)
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer and trainer.processing_class is tokenizer


# With weight 0, DPG's reward is only logged. All random draws must then be GRPO's, too.
UNCHANGED = {
    "defaults": (dict(max_steps=3), lambda models: {}),
    "evaluation": (EVALUATION | dict(num_generations_eval=1), lambda models: dict(eval_dataset=EVAL_DATA)),
    "peft": ({}, lambda models: dict(peft_config=LORA)),
    "beta": (dict(beta=0.1, num_iterations=2, max_steps=4), lambda models: {}),
    "dropout": (
        dict(disable_dropout=False),
        lambda models: dict(peft_config=LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)),
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "evaluation" else REST) for n in UNCHANGED])
def test_with_weight_0_the_generator_is_bit_for_bit_that_of_grpo(name, models, tmp_path):
    args, given = UNCHANGED[name]
    weights = {GRPOTrainer: [1.0], DPGTrainer: [0.0, 1.0]}
    trained = []
    for trainer_class, reward_weights in weights.items():
        args = args | dict(reward_weights=reward_weights)
        trainer = make_trainer(trainer_class, models, tmp_path, args, **given(models))
        trainer.train()
        trained.append(trainer)
    grpo, dpg = trained
    assert not changed(dpg.model, dict(grpo.model.named_parameters()))
    for theirs, ours in zip(grpo.state.log_history, dpg.state.log_history, strict=True):
        assert set(theirs) <= set(ours)
        assert all(ours[key] == value for key, value in theirs.items() if "time" not in key and "per_s" not in key)


@TRAINERS
@pytest.mark.trl_suite
def test_a_generation_batch_is_used_as_often_as_set(trainer_class, models, tmp_path):
    """6 samples a step, 4 steps a generation, 2 iterations: each generation has 6 prompts, 4 times, for 8 steps."""
    args = dict(
        per_device_train_batch_size=6,
        steps_per_generation=4,
        num_generations=4,
        num_iterations=2,
        gradient_accumulation_steps=3,
        shuffle_dataset=False,
        max_steps=-1,
        num_train_epochs=2,
    )
    trainer = make_trainer(trainer_class, models, tmp_path, args)
    with patch.object(trainer_class, "training_step", wraps=trainer.training_step) as step:
        trainer.train()
    batches = [[row["prompt"] for row in call.args[1]] for call in step.call_args_list]
    assert len(batches) == 16
    assert all(batch == [prompt for prompt in prompts()["prompt"] for _ in range(4)] for batch in batches)


@TRAINERS
@pytest.mark.trl_suite
def test_training_resumes_from_a_checkpoint_as_if_never_stopped(trainer_class, models, tmp_path):
    saving = dict(save_strategy="steps", save_steps=2, max_steps=4)
    whole = make_trainer(trainer_class, models, tmp_path / "whole", saving)
    whole.train()
    resumed = make_trainer(trainer_class, models, tmp_path / "whole", saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert not changed(resumed.model, dict(whole.model.named_parameters()))


@TRAINERS
@pytest.mark.trl_suite
def test_evaluate_works_before_training(trainer_class, models, tmp_path):
    trainer = make_trainer(trainer_class, models, tmp_path, {}, eval_dataset=EVAL_DATA)
    figures = trainer.evaluate()
    assert {"eval_loss", "eval_reward", "eval_rewards/letters/mean"} <= set(trainer.state.log_history[-1]) | set(
        figures
    )


@TRAINERS
@pytest.mark.trl_suite
def test_a_quantised_generator_trains_its_adapters(trainer_class, models, tmp_path):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    trainer = make_trainer(
        trainer_class, models, tmp_path, dict(max_steps=3), quantization_config=quantization, peft_config=LORA
    )
    trainable, _ = parameters(trainer.model)
    trainer.train()
    assert any("4bit" in type(module).__name__ for module in trainer.model.modules())
    assert changed(trainer.model, trainable) == set(trainable)


@TRAINERS
@pytest.mark.trl_suite
def test_what_is_saved_is_what_was_trained(trainer_class, models, tmp_path):
    trainer = make_trainer(trainer_class, models, tmp_path, {})
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not changed(saved, dict(trainer.model.named_parameters()))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert all(f"- {tag}" in card for tag in trainer_class._tag_names)


def wrong_length(completions, **kwargs):
    return [1.0]


class NoReset:
    def get_reward(self):
        return 1.0


def no_tool_template(models):
    tokenizer = AutoTokenizer.from_pretrained(models("qwen2"))
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return dict(tools=[multiply], processing_class=tokenizer, train_dataset=prompts(True))


def adapters_twice(models):
    return dict(model=get_peft_model(AutoModelForCausalLM.from_pretrained(models("qwen2")), LORA), peft_config=LORA)


def of_qwen3(**given):
    return lambda models: dict(model=models("qwen3"), **given)


REFUSED = {  # settings, further arguments, and TRL's words
    "reference-without-beta": (dict(sync_ref_model=True), lambda models: {}, "sync_ref_model=True"),
    "reference-with-peft": (dict(sync_ref_model=True, beta=0.1), lambda models: dict(peft_config=LORA), "PEFT model"),
    "adapters-twice": ({}, adapters_twice, "PeftModel"),
    "adapters-on-head": ({}, lambda models: dict(peft_config=LoraConfig(target_modules=["lm_head"])), "lm_head"),
    "peft-config-type": ({}, lambda models: dict(peft_config="lora"), "PeftConfig"),
    "auxiliary-loss": (dict(router_aux_loss_coef=0.1), lambda models: {}, "Mixture-of-Experts"),
    "no-dataset": ({}, lambda models: dict(train_dataset=None), "train_dataset"),
    "dataset-type": ({}, lambda models: dict(train_dataset=["a", "b"]), "train_dataset"),
    "tool-template": ({}, no_tool_template, "tool calling"),
    "environment-without-reset": ({}, of_qwen3(environment_factory=NoReset), "reset"),
    "environments-without-data": (
        {},
        of_qwen3(environment_factory={"a": RewardedCounter}, train_dataset=None),
        "environment",
    ),
    "environment-without-steps": (
        dict(max_steps=-1),
        of_qwen3(environment_factory=RewardedCounter, train_dataset=None),
        "max_steps",
    ),
    "environment-of-unknown-name": (
        {},
        of_qwen3(environment_factory={"a": Counter}, train_dataset=prompts(True, environment=["b"] * 6)),
        "environment",
    ),
    "rewards-of-wrong-number": ({}, lambda models: dict(reward_funcs=wrong_length), "wrong_length"),
    "rollout-without-logprobs": (
        {},
        lambda models: dict(rollout_func=lambda prompts, trainer: {}),
        "must return keys",
    ),
    "weights-of-wrong-number": (dict(reward_weights=[1.0, 1.0, 1.0]), lambda models: {}, "number"),
    "generation-batch-twice": (
        dict(generation_batch_size=3, steps_per_generation=1),
        lambda models: {},
        "at the same time",
    ),
    "one-generation": (dict(num_generations=1), lambda models: {}, "at least 2 generations"),
    "uneven-groups": (dict(num_generations=2), lambda models: {}, "divisible"),
}


@pytest.mark.trl_suite
@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse_for_the_same_reason(name, models, tmp_path):
    args, given, words = REFUSED[name]
    errors = []
    for trainer_class in (GRPOTrainer, DPGTrainer):
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=f"(?i){words}") as refused:
            make_trainer(trainer_class, models, tmp_path, args, **given(models)).train()
        errors.append(refused)
    assert errors[0].type is errors[1].type


def test_a_reward_that_is_a_list_of_functions_is_left_as_it_is(models, tmp_path):
    rewards = [letters]
    make_trainer(DPGTrainer, models, tmp_path, {}, reward_funcs=rewards)
    assert rewards == [letters]
