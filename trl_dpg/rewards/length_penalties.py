"""Rewards of length in use, to compare with `LengthDistributionReward`. None of them knows a distribution."""

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .lengths import LengthReader, Lengths


Check = Callable[..., list[float | None]] | str


class _LengthPenalty:
    """What the three have in common: correctness, lengths over all ranks, and a formula."""

    __name__ = "length_penalty"

    def __init__(self, check: Check, measure: str, tokenizer: PreTrainedTokenizerBase | str | None):
        self._reader = LengthReader(measure, tokenizer, check)

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]] | None = None,
        **kwargs,
    ) -> list[float | None]:
        """
        Score a batch; called by the trainer on every rank.

        Returns:
            `list[float | None]`: A reward for each of this rank's completions; `None` where the check has none.
        """
        values = self._values(len(completions), kwargs)
        batch = self._reader.read(self.__name__, prompts, completions, completion_ids, values, **kwargs)
        rewards = np.where(np.isnan(batch.correct), np.nan, self._rewards(batch))
        return batch.returned(rewards)

    def _values(self, number: int, columns: dict[str, Any]) -> list[Any]:
        """A value of each completion's row that the formula needs."""
        return [None] * number

    def _rewards(self, batch: Lengths) -> np.ndarray:
        raise NotImplementedError


class LengthBudgetReward(_LengthPenalty):
    """
    A TRL reward function: a budget of tokens that stands in the prompt (LCPO of L1, Aggarwal and Welleck, arXiv
    2503.04697). With `form="exact"` it is correct - α |N - n|. With `form="max"` it is correct ·
    clip(α (N - n) + δ, 0, 1). N is the budget, n the length.

    Args:
        check (`Callable` or `str`):
            A TRL reward function, or its dotted path, that is above 0.5 for correct completions.
        budget_column (`str`, *optional*, defaults to `"num_tokens"`):
            The dataset's column with the budget in tokens.
        form (`str`, *optional*, defaults to `"exact"`):
            `"exact"` or `"max"`.
        alpha (`float`, *optional*, defaults to `0.0003`):
            Weight of a token.
        delta (`float`, *optional*, defaults to `0.5`):
            What a correct completion gets that has just the budget, with `form="max"`.
        measure (`str`, *optional*, defaults to `"all"`):
            `"all"`: tokens of the completion. `"reasoning"`: tokens of its thoughts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*):
            Counts tokens of reasoning.

    Raises:
        `ValueError`: If an option is unknown. In a call, if the dataset has no such column.
    """

    __name__ = "length_budget"

    def __init__(
        self,
        check: Check,
        budget_column: str = "num_tokens",
        form: str = "exact",
        alpha: float = 0.0003,
        delta: float = 0.5,
        measure: str = "all",
        tokenizer: PreTrainedTokenizerBase | str | None = None,
    ):
        if form not in ("exact", "max"):
            raise ValueError(f"Unknown `form` {form!r}. Choose 'exact' or 'max'.")
        super().__init__(check, measure, tokenizer)
        self.budget_column, self.form, self.alpha, self.delta = budget_column, form, alpha, delta

    def _values(self, number: int, columns: dict[str, Any]) -> list[Any]:
        if self.budget_column not in columns:
            raise ValueError(
                f"The dataset has no column {self.budget_column!r} with the budget of tokens. Name it by "
                "`budget_column`."
            )
        return columns[self.budget_column]

    def _rewards(self, batch: Lengths) -> np.ndarray:
        left = np.array(batch.values, dtype=float) - batch.lengths
        if self.form == "exact":
            return batch.correct - self.alpha * np.abs(left)
        return batch.correct * np.clip(self.alpha * left + self.delta, 0.0, 1.0)


class ShorterBetterReward(_LengthPenalty):
    """
    A TRL reward function: α correct - β |n - n*|, where n* is the length of the shortest correct completion of the
    same prompt, or the mean length if none is correct (ShorterBetter, Yi et al., arXiv 2504.21370).

    Args:
        check (`Callable` or `str`):
            A TRL reward function, or its dotted path, that is above 0.5 for correct completions.
        alpha (`float`, *optional*, defaults to `2.0`):
            Weight of correctness.
        beta (`float`, *optional*, defaults to `0.001`):
            Weight of a token.
        measure (`str`, *optional*, defaults to `"all"`):
            `"all"`: tokens of the completion. `"reasoning"`: tokens of its thoughts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*):
            Counts tokens of reasoning.
    """

    __name__ = "shorter_better"

    def __init__(
        self,
        check: Check,
        alpha: float = 2.0,
        beta: float = 0.001,
        measure: str = "all",
        tokenizer: PreTrainedTokenizerBase | str | None = None,
    ):
        super().__init__(check, measure, tokenizer)
        self.alpha, self.beta = alpha, beta

    def _rewards(self, batch: Lengths) -> np.ndarray:
        best = np.empty(len(batch.lengths))
        for group in batch.groups():
            right = group[batch.correct[group] == 1.0]
            best[group] = batch.lengths[right].min() if len(right) else batch.lengths[group].mean()
        return self.alpha * batch.correct - self.beta * np.abs(batch.lengths - best)


class AdaptiveLengthPenaltyReward(_LengthPenalty):
    """
    A TRL reward function: correct - β n max(p, 1 / K), where p is the share of correct completions among the K of the
    same prompt. So length costs more where the prompt is easy (ALP, Xiang et al., arXiv 2506.05256).

    Args:
        check (`Callable` or `str`):
            A TRL reward function, or its dotted path, that is above 0.5 for correct completions.
        beta (`float`, *optional*, defaults to `0.0001`):
            Weight of a token. The paper divides the length by a constant, which is part of this weight here.
        measure (`str`, *optional*, defaults to `"all"`):
            `"all"`: tokens of the completion. `"reasoning"`: tokens of its thoughts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*):
            Counts tokens of reasoning.
    """

    __name__ = "adaptive_length_penalty"

    def __init__(
        self,
        check: Check,
        beta: float = 0.0001,
        measure: str = "all",
        tokenizer: PreTrainedTokenizerBase | str | None = None,
    ):
        super().__init__(check, measure, tokenizer)
        self.beta = beta

    def _rewards(self, batch: Lengths) -> np.ndarray:
        solved = np.empty(len(batch.lengths))
        for group in batch.groups():
            known = batch.correct[group][~np.isnan(batch.correct[group])]
            solved[group] = max(known.mean() if len(known) else 0.0, 1 / len(group))
        return batch.correct - self.beta * batch.lengths * solved
