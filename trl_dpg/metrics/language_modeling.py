"""Metric for the fine-tuned student's language-modelling loss on given texts."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from ..student import Examples, FinetunedStudent, Student, TokenizedExample
from .base import Metric
from .draw import standard_error, systematic_draw


logger = logging.get_logger(__name__)


class LanguageModelingMetric(Metric):
    """
    Minus the language-modelling loss on a dataset: the mean over all its supervised tokens, in nats.

    It needs the memory of one batch for a dataset of any size. Proxies: `perplexity` and, while a subset of the texts
    is drawn (see [`LanguageModelingMetric.draw`]), `metric_noise`.

    Args:
        dataset (`list[str]`, `list[dict]` or [`~datasets.Dataset`]):
            Samples in any format of [`Student.tokenize`]. The loss of a prompt-completion pair is that of its
            completion.
        batch_size (`int`, *optional*, defaults to `16`):
            Samples per forward pass. It changes only memory and speed.
        max_length (`int`, *optional*, defaults to `1024`):
            Longest sample, in tokens. Longer samples are cut off, with a warning.
        add_eos (`bool`, *optional*, defaults to `False`):
            Whether the loss includes an eos token after each text or completion.

    Raises:
        `ValueError`: If the dataset is empty, or (at the first use) if it has no token to predict.
    """

    def __init__(self, dataset: Examples, batch_size: int = 16, max_length: int = 1024, add_eos: bool = False):
        if len(dataset) == 0:
            raise ValueError("The dataset of a LanguageModelingMetric is empty.")
        if isinstance(dataset, str):
            raise ValueError(f"The dataset of a LanguageModelingMetric is one text, {dataset!r:.60}. Give a list.")
        for name, size in (("batch_size", batch_size), ("max_length", max_length)):
            if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.max_length = max_length
        self.add_eos = add_eos
        self._tokenize: Callable[..., list[TokenizedExample]] = Student.tokenize
        self._tokenized: WeakKeyDictionary[Student, list[TokenizedExample]] = WeakKeyDictionary()
        self._warned_of = 0  # samples that are cut off
        self._draw: tuple[int, tuple[int, ...]] | None = None  # number of texts and seed
        # Of each student, Φ at each drawn text: in the first evaluation, and in the last
        self._drawn: WeakKeyDictionary[Student, list[np.ndarray]] = WeakKeyDictionary()

    @classmethod
    def from_lm_eval(
        cls,
        task: str,
        split: str | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
        include_path: str | Path | Sequence[str | Path] | None = None,
        seed: int = 1234,
        **kwargs,
    ) -> "LanguageModelingMetric":
        """
        Metric for a task of lm-eval: minus the loss of its correct answers given their contexts, in nats per token.

        lm-eval is Gao et al.'s language model evaluation harness. Its tasks `"lambada_openai_mt_es"`, `..._fr`,
        `..._de` and `..._it` are the LAMBADA tasks of Thrush et al. (arXiv 2604.08423), in which the loss is that of
        the last word.

        Contexts and answers are rendered and tokenised as in lm-eval, without a chat template. Samples that are too
        long are cut off on the left. For tasks with log-likelihoods, the metric is the sum of the log-likelihoods that
        lm-eval computes, divided by the number of tokens. For multiple choice, the answers are the correct choices.
        For generation tasks, the answer is the (first) reference.

        Needs the `lm-eval` extra. The task's dataset is downloaded.

        Args:
            task (`str`):
                Name of a task in lm-eval or in `include_path`.
            split (`str`, *optional*):
                `"test"`, `"validation"` or `"train"`. When `None`, the split that lm-eval evaluates on.
            limit (`int`, *optional*):
                Number of documents to use, from the beginning of the split.
            num_fewshot (`int`, *optional*):
                Number of few-shot examples in each context. When `None`, the task's default.
            include_path (`str`, `Path` or a list of them, *optional*):
                Folders with your own task YAML files. These can run code: `!function` in a task imports a Python file
                that lies beside it. So name only folders whose files you trust.
            seed (`int`, *optional*, defaults to `1234`):
                Seed of the choice of few-shot examples. The default is that of lm-eval.
            kwargs:
                `batch_size`, `max_length` and `add_eos` of [`LanguageModelingMetric`].

        Raises:
            `ImportError`: If lm-eval is not installed.
            `ValueError`: If the task or split does not exist, if the task is a group of tasks, a Python class, not
            only about text, or scores whole documents, or if documents or their targets are missing.
        """
        try:
            from .lm_eval_tasks import load_task, task_pairs, tokenize_pairs
        except ImportError as error:
            raise ImportError("Tasks of lm-eval need lm-eval: pip install 'trl-dpg[lm-eval]'") from error
        metric = cls(task_pairs(load_task(task, include_path), split, limit, num_fewshot, seed), **kwargs)
        metric._tokenize = tokenize_pairs
        return metric

    def __call__(self, student: FinetunedStudent) -> Tensor:
        examples, counts = self._chosen(student.student)
        sizes = np.array([example.num_supervised for example in examples])
        # Φ is the mean over all tokens; of a draw, that over its texts of the mean over their tokens
        shares = -counts / (counts @ sizes if self._draw is None else counts.sum() * sizes)
        losses = student.theta.new_zeros(len(examples))

        def log_likelihood(start: int) -> Tensor:
            own = slice(start, start + self.batch_size)
            batch = student.student.collate(examples[own])
            lengths = torch.as_tensor(sizes[own])
            weights = torch.as_tensor(shares[own], dtype=student.theta.dtype).repeat_interleave(lengths)
            value, of_tokens = student.student.run(
                student.parameters, lambda model: student.student.loss(model, batch, weights.to(student.device))
            )
            if self._draw is not None:
                means = [part.mean() for part in of_tokens.split(lengths.tolist())]
                losses[own] = torch.stack(means).to(losses.dtype)
            return value

        value = student.accumulate(log_likelihood, range(0, len(examples), self.batch_size))
        if self._draw is not None:
            at_texts = -student.ranks.sum(losses).double().cpu().numpy()
            self._drawn[student.student] = [*self._drawn.get(student.student, [])[:1], at_texts]
        return value

    def proxies(self, student: FinetunedStudent, value: float) -> dict[str, float]:
        found = {"perplexity": math.exp(min(-value, 700.0))}
        counts = self._chosen(student.student)[1]
        at_texts = self._drawn.get(student.student, [])
        if len(at_texts) == 2 and counts.sum() > 1:
            before, after = at_texts
            found["metric_noise"] = standard_error(before, after, counts, len(self._examples(student.student)))
        return found

    def draw(self, number: int | None, seed: Sequence[int] = ()) -> bool:
        """
        Read `number` of the texts from now on, drawn at random by a seed. `None`: all of them.

        Texts are drawn in proportion to their numbers of tokens, see [`~trl_dpg.metrics.draw.systematic_draw`]. Φ is
        then the mean over the drawn texts of the mean log-likelihood of their tokens. Its mean over the draws is Φ of
        all texts. The proxy `metric_noise` is the standard error of Φ's change between the first evaluation after the
        draw and the last one.
        """
        self._draw, self._drawn = None, WeakKeyDictionary()
        if number is not None and number < len(self.dataset):
            self._draw = number, tuple(seed)
        return True

    def _chosen(self, student: Student) -> tuple[list[TokenizedExample], np.ndarray]:
        """The n samples of an evaluation, and how often each of them counts, of shape `[n]`."""
        examples = self._examples(student)
        if self._draw is None:
            return examples, np.ones(len(examples), dtype=int)
        counts = systematic_draw([example.num_supervised for example in examples], *self._draw)
        rows = counts.nonzero()[0]
        return [examples[row] for row in rows], counts[rows]

    def num_tokens(self, student: Student) -> int:
        return sum(len(example.input_ids) for example in self._chosen(student)[0])

    def _examples(self, student: Student) -> list[TokenizedExample]:
        """
        The samples with a supervised token, tokenised once for each student.

        They are sorted by length, which reduces padding.
        """
        if student not in self._tokenized:
            examples = self._tokenize(student, self.dataset, self.max_length, self.add_eos)
            num_truncated = sum(example.truncated for example in examples)
            if (
                num_truncated and num_truncated != self._warned_of
            ):  # with further students of the same tokenizer, it is known
                self._warned_of = num_truncated
                logger.warning(
                    f"{num_truncated} of the metric's {len(examples)} samples are longer than max_length = "
                    f"{self.max_length} "
                    "tokens (or the model's positions) and were cut off."
                )
            examples = sorted((e for e in examples if e.num_supervised), key=lambda e: len(e.input_ids))
            if not examples:
                raise ValueError("The dataset of a LanguageModelingMetric has no token to predict.")
            self._tokenized[student] = examples
        return self._tokenized[student]
