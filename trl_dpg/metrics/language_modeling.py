"""How well the fine-tuned student models given text."""

import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.utils import logging

from ..student import Examples, FinetunedStudent, Student, TokenizedExample
from .base import Metric


logger = logging.get_logger(__name__)


class LanguageModelingMetric(Metric):
    """
    Minus the language-modelling loss on a dataset: the mean over all its supervised tokens, in nats.

    Runs in the memory of one batch, whatever the size of the dataset. Proxy: `perplexity`.

    Args:
        dataset (`list[str]`, `list[dict]` or [`~datasets.Dataset`]):
            Samples in any format of [`Student.tokenize`]; of prompt-completion pairs the completion counts.
        batch_size (`int`, *optional*, defaults to `16`):
            Samples per forward pass; memory only.
        max_length (`int`, *optional*, defaults to `1024`):
            Longer samples are cut off, in tokens, with a warning.
        add_eos (`bool`, *optional*, defaults to `False`):
            Count the eos token after each text or completion as well.

    Raises:
        `ValueError`: If the dataset is empty, or (when first used) has no token to predict.
    """

    def __init__(self, dataset: Examples, batch_size: int = 16, max_length: int = 1024, add_eos: bool = False):
        if len(dataset) == 0:
            raise ValueError("The dataset of a LanguageModelingMetric is empty.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.max_length = max_length
        self.add_eos = add_eos
        self._tokenized: WeakKeyDictionary[Student, list[TokenizedExample]] = WeakKeyDictionary()

    def __call__(self, student: FinetunedStudent) -> Tensor:
        examples = self._examples(student.student)
        num_tokens = sum(example.num_supervised for example in examples)

        def log_likelihood(batch):
            weights = torch.full(
                batch.targets.shape, -1 / num_tokens, dtype=student.theta.dtype, device=student.device
            )
            return student.student.run(
                student.parameters, lambda model: student.student.loss(model, batch, weights)[0]
            )

        starts = range(0, len(examples), self.batch_size)
        return student.accumulate(
            log_likelihood, (student.student.collate(examples[k : k + self.batch_size]) for k in starts)
        )

    def proxies(self, student: FinetunedStudent, value: float) -> dict[str, float]:
        return {"perplexity": math.exp(min(-value, 700.0))}

    def _examples(self, student: Student) -> list[TokenizedExample]:
        """The samples that count, tokenised once for each student, similar lengths together to spare padding."""
        if student not in self._tokenized:
            examples = student.tokenize(self.dataset, self.max_length, self.add_eos)
            num_truncated = sum(example.truncated for example in examples)
            if num_truncated:
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
