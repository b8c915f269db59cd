"""
Sums in prefix notation: a task on which the length of the reasoning can be chosen (Wu et al., arXiv 2502.07266).

An expression such as `+ + + 4 2 3 1` is a chain of T operators and T + 1 digits below 5. Its value is the sum modulo
5. (The paper has digits below 10, longer chains and larger models.) The chain of thought resolves t operators in each
step, from the deepest leaf upwards, so it has N = ⌈T / t⌉ steps. All operators are `+`, so an operator and its right
leaf are one token:

    4 +2 +3 +1 <begin> t2 4 +2 +3 = 4 +1 = 0 <eos>

`t2` is the control token, which says t. Each step copies its operators and ends with `=` and a digit, the sum so far.
The prompt ends with `<begin>`, and only the completion is learned.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ..metrics.base import Metric
from ..student import FinetunedStudent, Student
from ..toy import save_world, tiny_llama, word_tokenizer


BASE = 5
"""Digits are below it, and sums are taken modulo it."""

MAX_OPERATORS = 24
"""The largest T."""

STEP_SIZES = (1, 2, 3, 4, 6)
"""The values of t that have a control token."""

SPECIAL = ["<pad>", "<eos>", "<unk>", "<begin>", "="]
PAD, EOS, _, BEGIN, EQUALS = range(len(SPECIAL))
DIGIT = len(SPECIAL)
OPERATOR = DIGIT + BASE
CONTROL = OPERATOR + BASE
"""Ids of `0`, `+0` and of the first control token."""

WORDS = [*SPECIAL, *map(str, range(BASE)), *(f"+{digit}" for digit in range(BASE)), *(f"t{t}" for t in STEP_SIZES)]
MAX_LENGTH = 4 * MAX_OPERATORS + 6

Mixture = Mapping[int, Sequence[int]]
"""The values of t, each as likely as the others, for each T. Each T is as likely as the others, too."""

UNIFORM: Mixture = {T: [t for t in STEP_SIZES if t <= T] for T in range(1, MAX_OPERATORS + 1)}


def prefix_sums_tokenizer() -> PreTrainedTokenizerFast:
    """The task's tokenizer. Its tokens are separated by spaces."""
    return word_tokenizer(WORDS[3:])  # it puts `<pad>`, `<eos>` and `<unk>` before them


def prefix_sums_model(num_layers: int, hidden_size: int = 64, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights and four attention heads, for the task's vocabulary."""
    return tiny_llama(prefix_sums_tokenizer(), hidden_size, num_layers, seed, initializer_range=0.05, mlp_ratio=4)


# -- data -------------------------------------------------------------------------------------------------------------


@cache
def _template(operators: int, step_size: int) -> np.ndarray:
    """
    Where each token of a sample comes from, `[L]`: its index in `[vocabulary | +d_0 ... +d_T | S_0 ... S_T]`.

    d_k are the digits, and S_k is the sum of the first k + 1 of them, modulo `BASE`.
    """
    if step_size not in STEP_SIZES:
        raise ValueError(f"`step_size` must be one of {STEP_SIZES}, got {step_size}.")
    if not 1 <= operators <= MAX_OPERATORS:
        raise ValueError(f"An expression must have 1 to {MAX_OPERATORS} operators, got {operators}.")
    leaf, total = len(WORDS), len(WORDS) + operators + 1
    tokens = [total, *range(leaf + 1, leaf + operators + 1), BEGIN, CONTROL + STEP_SIZES.index(step_size), total]
    for start in range(0, operators, step_size):
        end = min(start + step_size, operators)
        tokens += [*range(leaf + start + 1, leaf + end + 1), EQUALS, total + end]
    return np.array([*tokens, EOS])


def with_reasoning(digits: np.ndarray, step_size: int) -> np.ndarray:
    """
    Expressions with right reasoning, as token ids of shape `[B, L]`.

    Args:
        digits (`np.ndarray` of shape `[B, T + 1]`): The digits of B expressions.
        step_size (`int`): t, one of `STEP_SIZES`.

    Raises:
        `ValueError`: If t or the number of operators is not one of the task's.
    """
    words = np.broadcast_to(np.arange(len(WORDS)), (len(digits), len(WORDS)))
    pool = np.concatenate([words, OPERATOR + digits, DIGIT + digits.cumsum(axis=1) % BASE], axis=1)
    return pool[:, _template(digits.shape[1] - 1, step_size)]


def as_row(ids: np.ndarray) -> dict[str, Any]:
    """A sample with the columns `prompt`, `completion` (without eos), `operators`, `step_size` and `num_steps`."""
    begin = ids.tolist().index(BEGIN)
    words = [WORDS[k] for k in ids]
    step_size = STEP_SIZES[ids[begin + 1] - CONTROL]
    return {
        "prompt": " ".join(words[: begin + 1]) + " ",
        "completion": " ".join(words[begin + 1 : -1]),
        "operators": begin - 1,
        "step_size": step_size,
        "num_steps": math.ceil((begin - 1) / step_size),
    }


def draw_samples(mixture: Mixture, num_tokens: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random samples of a mixture, until they have `num_tokens` tokens or a few more. Each is token ids `[L]`."""
    samples, drawn, lengths = [], 0, list(mixture)
    while drawn < num_tokens:
        operators = lengths[rng.integers(len(lengths))]
        step_size = mixture[operators][int(rng.integers(len(mixture[operators])))]
        samples.append(with_reasoning(rng.integers(BASE, size=(1, operators + 1)), step_size)[0])
        drawn += len(samples[-1])
    return samples


# -- training ---------------------------------------------------------------------------------------------------------


def loss_sum(model: PreTrainedModel, samples: Sequence[np.ndarray]) -> tuple[Tensor, int]:
    """The loss of the completions' tokens, summed, and the number of these tokens."""
    length = max(map(len, samples))
    ids = torch.tensor(np.stack([np.pad(sample, (0, length - len(sample))) for sample in samples]))
    targets = ids[:, 1:]
    learned = ((ids == BEGIN).cumsum(dim=1)[:, :-1] > 0) & (targets != PAD)
    hidden = model.base_model(ids).last_hidden_state[:, :-1][learned]
    return F.cross_entropy(model.get_output_embeddings()(hidden), targets[learned], reduction="sum"), len(hidden)


def train(
    model: PreTrainedModel,
    mixture: Mixture,
    num_steps: int,
    tokens_per_step: int = 768,
    learning_rate: float = 2e-3,
    growth: float = 0.4,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """
    Train a model on samples that are made on the fly, with AdamW, 100 steps of warm-up and a cosine schedule.

    Expressions grow: at first T is at most 2, and this limit rises to the mixture's largest T in the first part of the
    training. All mixtures are trained on the same number of tokens, prompts and completions together.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, which is changed in place.
        mixture (`Mixture`): The values of t for each T.
        num_steps (`int`): Number of steps.
        tokens_per_step (`int`): Tokens of the samples of one step.
        learning_rate (`float`): The largest learning rate. The last one is 5 % of it.
        growth (`float`): The part of the training in which expressions grow. 0: none.
        seed (`int`): Seed of the samples.
        on_step (`Callable`): Called after each step with its number, from 1, and its loss per token.
    """
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / 100, 1) * (0.525 + 0.475 * math.cos(math.pi * k / num_steps))
    )
    model.train()
    for step in range(num_steps):
        limit = max(mixture) if step >= growth * num_steps else 2 + (max(mixture) - 2) * step / (growth * num_steps)
        allowed = {T: sizes for T, sizes in mixture.items() if T <= limit} or mixture
        samples = sorted(draw_samples(allowed, tokens_per_step, rng), key=len)
        cut = round(0.6 * len(samples))  # two parts, which need less padding
        parts = [loss_sum(model, part) for part in (samples[:cut], samples[cut:]) if part]
        loss = torch.stack([value for value, _ in parts]).sum() / sum(number for _, number in parts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step + 1, loss.item())


# -- answers ----------------------------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """
    What a model answers to B expressions.

    Attributes:
        right (`np.ndarray` of shape `[B]`): Whether the answer, the digit before `<eos>`, is right.
        num_tokens (`np.ndarray` of shape `[B]`): Tokens after `<begin>`.
        control (`np.ndarray` of shape `[B]`): t of the control token, forced or chosen. 0: another token was chosen.
    """

    right: np.ndarray
    num_tokens: np.ndarray
    control: np.ndarray


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    digits: np.ndarray,
    step_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Answers:
    """
    Let a model reason about expressions.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        digits (`np.ndarray` of shape `[B, T + 1]`): The digits of B expressions.
        step_size (`int`, *optional*): t, whose control token is forced. When `None`, the model chooses it.
        temperature (`float`): Temperature of the sampling. 0: greedy decoding.
        seed (`int`): Seed of the sampling.
    """
    start = digits.shape[1] + 1
    prompt = with_reasoning(digits, step_size or 1)[:, : start + (step_size is not None)]
    model.eval()
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    ids = torch.from_numpy(prompt)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_LENGTH - digits.shape[1],
        pad_token_id=PAD,
        **sampling,
    ).numpy()[:, start:]
    ended = output == EOS
    lengths = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, output.shape[1])
    last = np.take_along_axis(output, np.maximum(lengths - 2, 0)[:, None], axis=1)[:, 0]
    right = ended.any(axis=1) & (last == DIGIT + digits.sum(axis=1) % BASE)
    sizes = np.array([0, *STEP_SIZES])
    known = (output[:, 0] >= CONTROL) & (output[:, 0] < CONTROL + len(STEP_SIZES))
    return Answers(right, lengths, sizes[np.where(known, output[:, 0] - CONTROL + 1, 0)])


class RightAnswerMetric(Metric):
    """
    Log-probability of right answers, in nats: Φ = mean over expressions of log Σ_t p(control token t, right chain).

    The sum goes over all right chains of thought, one for each t, so the student is free to choose its control token.
    Proxy: `right_answer`, the mean probability of a right chain.

    Args:
        digits (`list[np.ndarray]`): Expressions by T, each `[B, T + 1]`.
        batch_size (`int`, *optional*, defaults to `16`): Expressions in a forward pass, each with all its chains.
    """

    def __init__(self, digits: Sequence[np.ndarray], batch_size: int = 16):
        self.digits = list(digits)
        self.batch_size = batch_size

    def __call__(self, student: FinetunedStudent) -> Tensor:
        number = sum(map(len, self.digits))
        return student.accumulate(lambda part: self.log_probabilities(student, part).sum() / number, self._parts())

    def log_probabilities(self, student: FinetunedStudent, digits: np.ndarray) -> Tensor:
        """Log-probability of a right chain, `[B]`, of expressions with digits `[B, T + 1]`."""
        operators = digits.shape[1] - 1
        return torch.stack([_log_probability(student, digits, t) for t in STEP_SIZES if t <= operators]).logsumexp(0)

    def proxies(self, student: FinetunedStudent, value: float) -> dict[str, float]:
        probabilities = [self.log_probabilities(student, part).exp() for part in self._parts()]
        return {"right_answer": torch.cat(probabilities).mean().item()}

    def num_tokens(self, student: Student) -> int:
        return sum(
            len(digits) * len(_template(digits.shape[1] - 1, t))
            for digits in self.digits
            for t in STEP_SIZES
            if t < digits.shape[1]
        )

    def _parts(self) -> Iterable[np.ndarray]:
        for digits in self.digits:
            yield from (digits[k : k + self.batch_size] for k in range(0, len(digits), self.batch_size))


def _log_probability(student: FinetunedStudent, digits: np.ndarray, step_size: int) -> Tensor:
    """Log-probability of the right completion in steps of t operators, `[B]`."""
    ids = torch.from_numpy(with_reasoning(digits, step_size)).to(student.device)
    start = digits.shape[1]  # the position of <begin>
    logits = student(ids).logits[:, start:-1]
    return -F.cross_entropy(logits.transpose(1, 2), ids[:, start + 1 :], reduction="none").sum(dim=1)


def right_answer(operators: Sequence[int], number: int = 64, seed: int = 1000) -> RightAnswerMetric:
    """The [`RightAnswerMetric`] on `number` random expressions of each length T in `operators`, for recipes."""
    rng = np.random.default_rng(seed)
    return RightAnswerMetric([rng.integers(BASE, size=(number, T + 1)) for T in operators])


def right_sum(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
    """A reward function of TRL: 1 if the completion's last word is the sum of the prompt's digits, else 0."""
    sums = [sum(int(word) for word in prompt.split() if word != "<begin>") % BASE for prompt in prompts]
    return [float(text.split()[-1:] == [str(own)]) for text, own in zip(completions, sums, strict=True)]


def reasoning_steps(completions: list[str], **kwargs) -> list[float]:
    """A reward function of TRL, to log: the number of steps N of each completion."""
    return [float(text.split().count("=")) for text in completions]


def prefix_sums_world(
    folder: Path, seed: int = 0, operators: Sequence[int] = (6,), num_steps: int = 600, num_layers: int = 2
) -> None:
    """
    A toy world, in which a generator can choose its length of reasoning.

    Generator and student are the same model, which is trained on all t alike. So the generator chooses each control
    token equally often at first. It also writes `prompts.jsonl`, 1,024 expressions.

    Args:
        folder (`Path`): The folder to write to.
        seed (`int`): Seed of weights and data.
        operators (`list[int]`): The lengths T of the prompts' expressions. The largest is the largest in training.
        num_steps (`int`): Training steps.
        num_layers (`int`): Layers of the model.
    """
    model = prefix_sums_model(num_layers, seed=seed)
    mixture = {T: sizes for T, sizes in UNIFORM.items() if T <= max(operators)}
    train(model, mixture, num_steps, learning_rate=5e-3, seed=seed)
    rng = np.random.default_rng(seed)
    rows = [as_row(with_reasoning(rng.integers(BASE, size=(1, rng.choice(operators) + 1)), 1)[0]) for _ in range(1024)]
    save_world(folder, prefix_sums_tokenizer(), model, model, [row["prompt"] for row in rows])
