"""One way to build TRL's trainer and ours, so that a case is written once for both."""

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests.tiny import QUIET
from tests.trl_suite.models import Models
from trl_dpg import DPGConfig, DPGReward, DPGTrainer, InnerLoopConfig, Student
from trl_dpg.metrics import LanguageModelingMetric


METRIC = LanguageModelingMetric(["the moon is far", "a river runs"])
WORDS = ["the sun", "a stone in", "rain", "old trees", "birds that sing", "one more day"]
ARGS = dict(
    per_device_train_batch_size=3,
    per_device_eval_batch_size=3,
    num_generations=3,
    max_completion_length=8,
    max_steps=2,
    learning_rate=0.1,
    logging_steps=1,
    **QUIET,
)
STUDENT_ARGS = dict(student_batch_size=3, student_learning_rate=1e-3, student_eps_root=1e-6)
INNER_LOOP = InnerLoopConfig(batch_size=3, learning_rate=1e-3, eps_root=1e-6)


def text(completion) -> str:
    """The text of a completion, which is a string or messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def letters(completions, **kwargs):
    """Differs for almost any two completions."""
    return [sum(map(ord, text(completion))) % 97 / 97 for completion in completions]


def conversation(words: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": words}]


def prompts(conversational: bool = False, **columns) -> Dataset:
    """Six prompts, and further columns of six values."""
    return Dataset.from_dict(
        {"prompt": [conversation(words) if conversational else words for words in WORDS], **columns}
    )


@dataclass
class Case:
    """
    What a trainer is given, and what must be true afterwards.

    Args:
        args (`dict`): Settings, in addition to `ARGS`.
        given (`Callable`): Maps the [`Models`] to further arguments of the trainer.
        model (`str`): Name of the generator.
        conversational (`bool`): Whether prompts are messages.
        logged (`tuple[str, ...]`): Names that the logs of training must have.
        learns (`bool`): Whether the generator's trainable parameters must change; else none may.
        check (`Callable`): Called with the trainer after training.
        replies (`tuple[tuple[str, ...], ...]`): What the generator answers, call by call, instead of sampling.
    """

    args: dict = field(default_factory=dict)
    given: object = None
    model: str = "qwen2"
    conversational: bool = False
    logged: tuple = ()
    learns: bool = True
    check: object = None
    replies: tuple = ()


def student_arguments(models: Models) -> dict:
    return dict(student=models("llama"), target_metric=METRIC)


def make_trainer(trainer_class, models: Models, output_dir, args: dict, **given):
    """
    A trainer. [`DPGTrainer`] gets a student and a metric in addition, and every other argument as it is.

    [`~trl.RLOOTrainer`] takes the same arguments as [`~trl.GRPOTrainer`].
    """
    args = ARGS | dict(output_dir=str(output_dir)) | args
    given = dict(model=models("qwen2"), reward_funcs=letters, train_dataset=prompts()) | given
    if trainer_class is DPGTrainer:
        return DPGTrainer(args=DPGConfig(**STUDENT_ARGS | args), **student_arguments(models) | given)
    config_class = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[trainer_class]
    return trainer_class(args=config_class(**args), **given)


def make_reward(models: Models) -> DPGReward:
    return DPGReward(Student(models("llama")), METRIC, INNER_LOOP)


def parameters(model) -> tuple[dict, dict]:
    """Copies of a model's trainable and of its frozen parameters."""
    copies = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    trainable = {name: p for name, (requires_grad, p) in copies.items() if requires_grad}
    return trainable, {name: p for name, (requires_grad, p) in copies.items() if not requires_grad}


def changed(model, before: dict) -> set[str]:
    """Names of the parameters that are not bit for bit what they were."""
    now = dict(model.named_parameters())
    return {name for name, p in before.items() if not torch.equal(p, now[name])}


def scripted(trainer, replies):
    """
    A stand-in for the model's `generate`: call k answers with the k-th replies, as often as there are prompts.

    A reply that does not end with `<|im_end|>` is truncated. After the last call it begins anew.
    """
    tokenizer = trainer._tokenizer
    calls = iter(())

    def generate(input_ids, **kwargs):
        nonlocal calls
        answers = next(calls, None)
        if answers is None:
            calls = iter(replies)
            answers = next(calls)
        ids = [tokenizer(answers[k % len(answers)], add_special_tokens=False).input_ids for k in range(len(input_ids))]
        longest = max(map(len, ids))
        padded = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    return generate
