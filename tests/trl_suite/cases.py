"""The cases of `test_grpo.py`: what TRL's tests of GRPO ask of a trainer, as settings and expectations."""

import asyncio
import functools

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from tests.trl_suite.models import IMAGE_SIZE
from tests.trl_suite.runs import WORDS, Case, changed, conversation, letters, prompts, text


CASES: dict[str, Case] = {}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
REWARD_KEYS = ("reward", "reward_std", "completions/mean_length", "completions/clipped_ratio", "entropy", "num_tokens")


# -- the loss ---------------------------------------------------------------------------------------------------------

CASES["defaults"] = Case(logged=REWARD_KEYS)
CASES["defaults-conversational"] = Case(conversational=True, logged=REWARD_KEYS)
for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"):
    CASES[f"loss-{loss}"] = Case(dict(loss_type=loss, gradient_accumulation_steps=2))
CASES["loss-luspo"] = Case(dict(loss_type="luspo", importance_sampling_level="sequence"))
for scale in ("group", "batch", "none", True, False):
    CASES[f"scale-rewards-{scale}"] = Case(dict(scale_rewards=scale, gradient_accumulation_steps=2))
CASES["beta"] = Case(dict(beta=0.1), logged=("kl",))
CASES["beta-bias-correction"] = Case(dict(beta=0.1, use_bias_correction_kl=True), logged=("kl",))
CASES["iterations"] = Case(dict(num_iterations=2, max_steps=4))
CASES["iterations-sequence-level"] = Case(dict(num_iterations=2, max_steps=4, importance_sampling_level="sequence"))
CASES["steps-per-generation"] = Case(dict(steps_per_generation=2, max_steps=4))
CASES["generation-batch-size"] = Case(dict(generation_batch_size=6, max_steps=4))
CASES["generations-beyond-batch"] = Case(dict(num_generations=6, gradient_accumulation_steps=2))
CASES["epsilon-high"] = Case(dict(epsilon=0.1, epsilon_high=0.3, num_iterations=2, max_steps=4))
CASES["delta"] = Case(dict(delta=2.0))
CASES["off-policy-mask"] = Case(dict(off_policy_mask_threshold=0.5))
CASES["entropy-filter"] = Case(dict(top_entropy_quantile=0.2))
CASES["entropy-bonus"] = Case(dict(entropy_coef=0.01))
CASES["entropy-adaptive"] = Case(dict(use_adaptive_entropy=True, entropy_target=0.5))
CASES["normalize-then-sum"] = Case(
    dict(multi_objective_aggregation="normalize_then_sum"), lambda models: dict(reward_funcs=[letters, length])
)


def length(completions, **kwargs):
    return [float(len(text(completion))) for completion in completions]


# -- the reference model ----------------------------------------------------------------------------------------------


def reference_follows(trainer):
    """The reference is no longer the model before training."""
    start = AutoModelForCausalLM.from_pretrained(trainer.model.config._name_or_path)
    before = dict(start.named_parameters())
    assert changed(trainer.ref_model, before) == set(before)


CASES["reference-synchronised"] = Case(
    dict(beta=0.1, sync_ref_model=True, ref_model_sync_steps=1), check=reference_follows, logged=("kl",)
)


# -- generation -------------------------------------------------------------------------------------------------------

CASES["sampling"] = Case(dict(temperature=0.8, top_p=0.9, top_k=10, min_p=0.01, repetition_penalty=1.1))
CASES["generation-kwargs"] = Case(
    dict(generation_kwargs={"do_sample": True, "top_k": 50, "num_beams": 2, "length_penalty": -0.1})
)
CASES["cache-static"] = Case(dict(cache_implementation="static"))
CASES["chat-template-kwargs"] = Case(
    dict(chat_template_kwargs={"enable_thinking": False}), model="qwen3", conversational=True
)
CASES["masked-some"] = Case(
    dict(mask_truncated_completions=True),
    replies=(("far away", "near<|im_end|>", "nowhere<|im_end|>"),),
    logged=("completions/clipped_ratio",),
)
CASES["masked-all"] = Case(
    dict(mask_truncated_completions=True), replies=(("far away", "close by", "it rains"),), learns=False
)


def rollout(prompts, trainer):
    """Every completion is written by the rollout function, and a column goes to the rewards."""
    tokenizer = trainer._tokenizer
    words = [f"{k} {WORDS[k % len(WORDS)]}" for k in range(len(prompts))]
    completion_ids = [tokenizer(word).input_ids for word in words]
    return {
        "prompt_ids": [tokenizer(prompt).input_ids for prompt in prompts],
        "completion_ids": completion_ids,
        "logprobs": [[-1.0] * len(ids) for ids in completion_ids],
        "from_rollout": list(range(len(prompts))),
    }


def of_rollout(completions, from_rollout, **kwargs):
    assert from_rollout == list(range(len(completions)))
    return letters(completions)


CASES["rollout-function"] = Case(given=lambda models: dict(rollout_func=rollout, reward_funcs=of_rollout))


# -- rewards ----------------------------------------------------------------------------------------------------------


async def slow(completions, **kwargs):
    await asyncio.sleep(0.001)
    return letters(completions)


def constant(completions, **kwargs):
    return [1 for _ in completions]


def does_not_apply(completions, **kwargs):
    return [None] * len(completions)


def applies_to_some(completions, **kwargs):
    return [None if k % 3 == 0 else reward for k, reward in enumerate(letters(completions))]


def of_column(completions, aim, **kwargs):
    rewards = zip(completions, aim, letters(completions), strict=True)
    return [reward - abs(len(text(completion)) - wanted) for completion, wanted, reward in rewards]


def of_state(completions, trainer_state, **kwargs):
    return [r * (1 + trainer_state.global_step) for r in letters(completions)]


def of_messages(prompts, completions, **kwargs):
    assert all(prompt[0]["role"] == "user" for prompt in prompts)
    assert all(message["role"] == "assistant" for completion in completions for message in completion)
    return letters(completions)


def that_logs(completions, completion_ids, log_metric, log_extra, **kwargs):
    log_metric("tokens", sum(map(len, completion_ids)) / len(completion_ids))
    log_extra("letters", [f"{reward:.2f}" for reward in letters(completions)])
    return letters(completions)


class CallableReward:
    """A reward that is an object, as DPG's is."""

    def __init__(self, name):
        self.__name__ = name

    def __call__(self, completions, **kwargs):
        return letters(completions)


def named(*names):
    """Logged, in this order, after DPG's."""
    return tuple(f"rewards/{name}/{figure}" for name in names for figure in ("mean", "std"))


def reward_case(*reward_funcs, names, **kwargs):
    return Case(given=lambda models: dict(reward_funcs=list(reward_funcs)), logged=named(*names), **kwargs)


CASES["reward-function"] = Case(given=lambda models: dict(reward_funcs=letters), logged=named("letters"))
CASES["reward-several"] = reward_case(letters, length, names=("letters", "length"))
CASES["reward-async"] = reward_case(slow, names=("slow",))
CASES["reward-sync-and-async"] = reward_case(letters, constant, slow, names=("letters", "constant", "slow"))
CASES["reward-none-of-one"] = reward_case(letters, does_not_apply, names=("letters",))
CASES["reward-none-of-some"] = reward_case(applies_to_some, letters, names=("applies_to_some",))
CASES["reward-weights"] = reward_case(
    letters, length, names=("letters", "length"), args=dict(reward_weights=[0.7, 0.3])
)
CASES["reward-object"] = reward_case(CallableReward("custom"), names=("custom",))
CASES["reward-partial"] = reward_case(functools.partial(letters), names=("letters",))
CASES["reward-column"] = Case(
    given=lambda models: dict(reward_funcs=of_column, train_dataset=prompts(aim=list(range(6)))),
    logged=named("of_column"),
)
CASES["reward-trainer-state"] = reward_case(of_state, names=("of_state",))
CASES["reward-messages"] = reward_case(of_messages, names=("of_messages",), conversational=True)
CASES["reward-that-logs"] = Case(
    dict(log_completions=True, num_completions_to_print=0),
    lambda models: dict(reward_funcs=that_logs),
    logged=("tokens", *named("that_logs")),
)
CASES["reward-model"] = Case(
    given=lambda models: dict(reward_funcs=models("qwen2", reward=True)), logged=named("tiny-qwen2-reward")
)
CASES["reward-model-and-function"] = Case(
    given=lambda models: dict(reward_funcs=[letters, models("qwen2", reward=True)]),
    logged=named("letters", "tiny-qwen2-reward"),
)


def other_reward_model(models):
    """A reward model with another chat template, and its own tokenizer."""
    path = models("llama", reward=True)
    return dict(
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(path),
        reward_processing_classes=AutoTokenizer.from_pretrained(path),
    )


CASES["reward-model-of-other-family"] = Case(given=other_reward_model, conversational=True)


# -- models -----------------------------------------------------------------------------------------------------------

for name in ("qwen3", "llama", "mistral", "gemma2"):
    CASES[f"model-{name}"] = Case(model=name)
CASES["model-experts"] = Case(dict(router_aux_loss_coef=0.01), model="qwen3-moe", logged=("aux_loss",))
CASES["model-object"] = Case(
    given=lambda models: dict(model=AutoModelForCausalLM.from_pretrained(models("qwen2"), dtype=torch.float32))
)
CASES["model-init-kwargs"] = Case(dict(model_init_kwargs={"dtype": "float32", "attn_implementation": "eager"}))
CASES["no-gradient-checkpointing"] = Case(dict(gradient_checkpointing=False))
CASES["dropout-kept"] = Case(dict(disable_dropout=False))
CASES["peft-config"] = Case(given=lambda models: dict(peft_config=LORA))
CASES["peft-config-beta"] = Case(dict(beta=0.1), lambda models: dict(peft_config=LORA), logged=("kl",))
CASES["peft-gradient-checkpointing"] = Case(
    dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    lambda models: dict(peft_config=LORA),
)
CASES["peft-prompt-tuning"] = Case(
    given=lambda models: dict(peft_config=PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
)


def peft_model(models):
    return dict(model=get_peft_model(AutoModelForCausalLM.from_pretrained(models("qwen2")), LORA))


CASES["peft-model"] = Case(given=peft_model)
CASES["peft-model-beta"] = Case(dict(beta=0.1), peft_model, logged=("kl",))


# -- data, evaluation, callbacks --------------------------------------------------------------------------------------


def stream(conversational=False):
    return IterableDataset.from_generator(lambda: iter(prompts(conversational)))


def in_evaluation(trainer):
    """Evaluations were logged, with their reward."""
    evaluated = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert evaluated and all("eval_loss" in log for log in evaluated)


EVALUATION = dict(eval_strategy="steps", eval_steps=1)
EVAL_DATA = prompts().select(range(3))
CASES["data-stream"] = Case(given=lambda models: dict(train_dataset=stream()))
CASES["data-in-order"] = Case(dict(shuffle_dataset=False))
CASES["data-workers"] = Case(dict(dataloader_num_workers=1))
CASES["evaluation"] = Case(EVALUATION, lambda models: dict(eval_dataset=EVAL_DATA), check=in_evaluation)
CASES["evaluation-generations"] = Case(
    EVALUATION | dict(num_generations_eval=1), lambda models: dict(eval_dataset=EVAL_DATA), check=in_evaluation
)
CASES["evaluation-first"] = Case(
    EVALUATION | dict(eval_on_start=True, loss_type="grpo"),
    lambda models: dict(eval_dataset=EVAL_DATA),
    check=in_evaluation,
)


def of_both_sets(trainer):
    for name in ("near", "far"):
        assert any(f"eval_{name}_loss" in log for log in trainer.state.log_history)


CASES["evaluation-of-several"] = Case(
    EVALUATION, lambda models: dict(eval_dataset={"near": EVAL_DATA, "far": EVAL_DATA}), check=of_both_sets
)


class CountSteps(TrainerCallback):
    def __init__(self):
        self.begun, self.steps, self.logs = 0, 0, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def were_called(trainer):
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, CountSteps))
    assert (callback.begun, callback.steps) == (1, 2)
    assert sum("reward" in logs for logs in callback.logs) == 2


CASES["callbacks"] = Case(given=lambda models: dict(callbacks=[CountSteps()]), check=were_called)
CASES["log-completions"] = Case(dict(log_completions=True, num_completions_to_print=1, log_unique_prompts=True))
CASES["profiled"] = Case(dict(include_num_input_tokens_seen=True))


# -- tools and environments -------------------------------------------------------------------------------------------


def multiply(a: int, b: int) -> int:
    """
    Multiplies two numbers.

    Args:
        a: The first number.
        b: The second number.

    Returns:
        Their product.
    """
    return a * b


async def multiply_slowly(a: int, b: int) -> int:
    """
    Multiplies two numbers, without haste.

    Args:
        a: The first number.
        b: The second number.

    Returns:
        Their product.
    """
    await asyncio.sleep(0.001)
    return a * b


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call><|im_end|>'


def tool_replies(name, good='{"a": 3, "b": 4}', bad='{"a": 3, "c": 4}'):
    """Of three completions, one calls the tool, one calls it wrongly, and one does not. Then all are done."""
    return ((call(name, good), call(name, bad), "No tool.<|im_end|>"), ("Done!<|im_end|>", "So be it.<|im_end|>"))


def tools_were_used(trainer):
    log = next(log for log in trainer.state.log_history if "tools/call_frequency" in log)
    assert abs(log["tools/call_frequency"] - 2 / 3) < 1e-6 and log["tools/failure_frequency"] == 0.5


TOOLS = dict(conversational=True, model="qwen3", check=tools_were_used)
CASES["tools"] = Case(
    dict(max_completion_length=192), lambda models: dict(tools=[multiply]), replies=tool_replies("multiply"), **TOOLS
)
CASES["tools-async"] = Case(
    dict(max_completion_length=192),
    lambda models: dict(tools=[multiply_slowly]),
    replies=tool_replies("multiply_slowly"),
    **TOOLS,
)


class Counter:
    """An environment that counts, and tells the prompt where it stands."""

    def reset(self, **kwargs) -> str | None:
        self.count = 0
        return "It stands at 0."

    def add(self, number: int) -> int:
        """
        Adds to the counter.

        Args:
            number: What is added.

        Returns:
            Where it stands.
        """
        self.count += number
        return self.count


class RewardedCounter(Counter):
    def get_reward(self) -> float:
        return float(self.count)


class SlowlyRewardedCounter(Counter):
    async def get_reward(self) -> float:
        return float(self.count)


class Asking(RewardedCounter):
    """Brings its own prompt."""

    def reset(self, **kwargs) -> str:
        self.count = 0
        return "Count to three."


def of_environment(completions, environments, **kwargs):
    return [environment.count + reward for environment, reward in zip(environments, letters(completions), strict=True)]


ADDING = tool_replies("add", '{"number": 3}', '{"amount": 3}')


def environment_case(factory, logged=(), **given):
    return Case(
        dict(max_completion_length=192),
        lambda models: dict(environment_factory=factory, **given),
        replies=ADDING,
        logged=logged,
        **TOOLS,
    )


CASES["environment"] = environment_case(Counter, logged=named("of_environment"), reward_funcs=of_environment)
CASES["environment-rewards"] = environment_case(RewardedCounter, named("RewardedCounter"), reward_funcs=None)
CASES["environment-rewards-slowly"] = environment_case(
    SlowlyRewardedCounter, named("SlowlyRewardedCounter"), reward_funcs=None
)
CASES["environment-and-function-reward"] = environment_case(
    RewardedCounter, named("letters", "RewardedCounter"), reward_funcs=letters
)
CASES["environment-asks"] = environment_case(Asking, named("Asking"), reward_funcs=None, train_dataset=None)
CASES["environments-by-name"] = environment_case(
    {"plain": Counter, "rewarded": RewardedCounter},
    named("letters", "RewardedCounter"),
    reward_funcs=letters,
    train_dataset=prompts(True, environment=["rewarded", "plain"] * 3),
)


# -- images -----------------------------------------------------------------------------------------------------------


def pictures(num_images=1):
    """Conversations with one picture or several."""
    images = [Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (40 * k, 90, 200 - 30 * k)) for k in range(6)]
    columns = {"prompt": [conversation(words) for words in WORDS]}
    if num_images == 1:
        columns["image"] = images
    else:
        columns["images"] = [[images[k], images[5 - k]] for k in range(6)]
    return Dataset.from_dict(columns)


VISION = dict(model="gemma3-vision", conversational=True)
CASES["image"] = Case(given=lambda models: dict(train_dataset=pictures()), **VISION)
CASES["image-several"] = Case(given=lambda models: dict(train_dataset=pictures(2)), **VISION)
CASES["image-beta"] = Case(dict(beta=0.1), lambda models: dict(train_dataset=pictures()), **VISION)
CASES["image-peft"] = Case(given=lambda models: dict(train_dataset=pictures(), peft_config=LORA), **VISION)
CASES["image-steps-per-generation"] = Case(
    dict(steps_per_generation=2, max_steps=4), lambda models: dict(train_dataset=pictures()), **VISION
)
