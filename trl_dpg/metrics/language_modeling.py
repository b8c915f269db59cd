"""How well the fine-tuned student models given text."""

import math
from weakref import WeakKeyDictionary

from torch import Tensor

from ..student import Batch, Examples, FinetunedStudent, Student, token_losses
from .base import Metric


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
            Longer samples are cut off, in tokens.
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
        self._batches: WeakKeyDictionary[Student, tuple[list[Batch], int]] = WeakKeyDictionary()

    def __call__(self, student: FinetunedStudent) -> Tensor:
        batches, num_tokens = self._tokenized(student.student)

        def log_likelihood(batch):
            logits = student(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            return -token_losses(logits, batch.labels).sum() / num_tokens

        return student.accumulate(log_likelihood, batches)

    def proxies(self, student: FinetunedStudent, value: float) -> dict[str, float]:
        return {"perplexity": math.exp(min(-value, 700.0))}

    def _tokenized(self, student: Student) -> tuple[list[Batch], int]:
        if student not in self._batches:
            examples = student.tokenize(self.dataset, self.max_length, self.add_eos)
            # Similar lengths together: less padding. The order does not change the sum.
            examples = sorted((e for e in examples if e.num_supervised), key=lambda e: len(e.input_ids))
            if not examples:
                raise ValueError("The dataset of a LanguageModelingMetric has no token to predict.")
            batches = [
                student.collate(examples[k : k + self.batch_size]) for k in range(0, len(examples), self.batch_size)
            ]
            self._batches[student] = (batches, sum(e.num_supervised for e in examples))
        return self._batches[student]
