"""DPG's reward in TRL's RLOOTrainer: what its tests ask, with and without another reward beside it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import RLOOTrainer

from tests.trl_suite.cases import (
    EVAL_DATA,
    EVALUATION,
    LORA,
    CountSteps,
    does_not_apply,
    length,
    slow,
    stream,
    were_called,
)
from tests.trl_suite.runs import changed, letters, make_reward, make_trainer, parameters, prompts
from trl_dpg.callbacks import DPGLoggingCallback


CASES = {  # settings, further arguments, rewards beside DPG's
    "defaults": ({}, lambda models: {}, []),
    "conversational": ({}, lambda models: dict(train_dataset=prompts(True)), []),
    "function": ({}, lambda models: {}, [letters]),
    "several": ({}, lambda models: {}, [letters, length]),
    "async": ({}, lambda models: {}, [letters, slow]),
    "none": ({}, lambda models: {}, [does_not_apply]),
    "weights": (dict(reward_weights=[0.7, 0.3]), lambda models: {}, [letters]),
    "no-beta": (dict(beta=0.0), lambda models: {}, []),
    "reference-synchronised": (dict(beta=0.1, sync_ref_model=True, ref_model_sync_steps=1), lambda models: {}, []),
    "iterations": (dict(num_iterations=2, max_steps=4), lambda models: {}, []),
    "normalised": (dict(normalize_advantages=True), lambda models: {}, []),
    "clipped": (dict(reward_clip_range=(-1.0, 1.0)), lambda models: {}, []),
    "generations-beyond-batch": (dict(num_generations=6, gradient_accumulation_steps=2), lambda models: {}, []),
    "sampling": (dict(top_p=0.9, top_k=10, min_p=0.01, repetition_penalty=1.1), lambda models: {}, []),
    "evaluation": (EVALUATION | dict(num_generations_eval=3), lambda models: dict(eval_dataset=EVAL_DATA), []),
    "stream": ({}, lambda models: dict(train_dataset=stream()), []),
    "peft-config": ({}, lambda models: dict(peft_config=LORA), []),
    "peft-model": (
        {},
        lambda models: dict(
            model=get_peft_model(AutoModelForCausalLM.from_pretrained(models("qwen2")), LoraConfig(r=4))
        ),
        [],
    ),
    "log-completions": (dict(log_completions=True, num_completions_to_print=1), lambda models: {}, []),
    "callbacks": ({}, lambda models: dict(callbacks=[CountSteps()]), []),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "function" else pytest.mark.trl_suite) for n in CASES]
)
def test_rloo_trains_on_the_dpg_reward(name, models, tmp_path):
    args, given, beside = CASES[name]
    reward = make_reward(models)
    trainer = make_trainer(RLOOTrainer, models, tmp_path, args, **given(models) | dict(reward_funcs=[reward, *beside]))
    trainer.add_callback(DPGLoggingCallback(reward))
    trainable, frozen = parameters(trainer.model)
    student = {key: p.detach().clone() for key, p in reward.student.model.named_parameters()}
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert logs and all("rewards/dpg/mean" in log and "dpg/metric_after" in log for log in logs)
    assert changed(trainer.model, trainable) == set(trainable) and not changed(trainer.model, frozen)
    assert not changed(reward.student.model, student)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    if name == "evaluation":
        assert any("eval_rewards/dpg/mean" in log for log in trainer.state.log_history)
    if name == "callbacks":
        were_called(trainer)
