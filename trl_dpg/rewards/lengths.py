"""The lengths and the correctness of completions of all ranks, for the rewards of length."""

from collections.abc import Callable
from itertools import chain
from pkgutil import resolve_name
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..ranks import from_all_ranks
from ..thinking import completion_thinking


class Lengths(NamedTuple):
    """
    N completions of all ranks, in the order of the ranks.

    Attributes:
        lengths (`np.ndarray` of shape `[N]`): Tokens, at least 1.
        correct (`np.ndarray` of shape `[N]`): 1.0 or 0.0; `nan` where the check returned `None`. All 1.0 without one.
        prompts (`list`): Prompts, of which equal ones are a group.
        values (`list`): A value of each completion's row, such as its difficulty.
        mine (`slice`): The completions of this rank.
    """

    lengths: np.ndarray
    correct: np.ndarray
    prompts: list[Any]
    values: list[Any]
    mine: slice

    def groups(self) -> list[np.ndarray]:
        """The completions of each prompt, as indices."""
        keys = [repr(prompt) for prompt in self.prompts]
        places: dict[str, list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(key, []).append(place)
        return [np.array(group) for group in places.values()]

    def returned(self, rewards: np.ndarray) -> list[float | None]:
        """This rank's rewards, for TRL. `nan` becomes `None`: TRL then leaves the sample out."""
        return [None if np.isnan(reward) else float(reward) for reward in rewards[self.mine]]


class LengthReader:
    """
    Counts the tokens of completions and checks their answers, on all ranks.

    Args:
        measure (`str`): `"all"`: the whole completion. `"reasoning"`: what stands in its thoughts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*): Counts tokens of reasoning.
        check (`Callable` or `str`, *optional*):
            A TRL reward function, or its dotted path. A completion is correct if the value is above 0.5.

    Raises:
        `ValueError`: If an option is unknown, or one is missing that it needs.
    """

    def __init__(
        self,
        measure: str,
        tokenizer: PreTrainedTokenizerBase | str | None,
        check: Callable[..., list[float | None]] | str | None,
    ):
        if measure not in ("all", "reasoning"):
            raise ValueError(f"Unknown `measure` {measure!r}. Choose 'all' or 'reasoning'.")
        if measure == "reasoning" and tokenizer is None:
            raise ValueError("`measure='reasoning'` counts tokens of the reasoning alone and needs a `tokenizer`.")
        if isinstance(check, str):
            try:
                check = resolve_name(check)
            except (ImportError, AttributeError, ValueError) as error:
                raise ValueError(
                    f"The `check` {check!r} could not be imported ({error}). Give a dotted path."
                ) from error
        if check is not None and not callable(check):
            raise ValueError(f"The `check` must be a TRL reward function or its dotted path, got {check!r}.")
        self.measure = measure
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.check = check

    def read(
        self,
        name: str,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]] | None,
        values: list[Any],
        **kwargs: Any,
    ) -> Lengths:
        """The completions of all ranks. An error on one rank is raised on all."""

        def own():
            lengths = self._lengths(prompts, completions, completion_ids)
            return lengths, self._correct(prompts, completions, completion_ids, kwargs), prompts, values

        parts = from_all_ranks(own, f"The reward {name}")
        lengths, correct, everyones_prompts, everyones = (list(chain(*column)) for column in zip(*parts, strict=True))
        start = sum(len(part[0]) for part in parts[: PartialState().process_index])
        return Lengths(
            np.maximum(lengths, 1).astype(float),
            np.array(correct, dtype=float),
            everyones_prompts,
            everyones,
            slice(start, start + len(completions)),
        )

    def _lengths(self, prompts: list, completions: list, completion_ids: list[list[int]] | None) -> list[int]:
        if self.measure == "reasoning":
            thoughts = [
                completion_thinking(completion, self.tokenizer, prompt if isinstance(prompt, str) else "")
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
            texts = [thought.reasoning or "" for thought in thoughts]
            return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]  # type: ignore[misc]
        if completion_ids is None:
            raise ValueError("Lengths of completions are those of their `completion_ids`, which TRL passes.")
        return [len(ids) for ids in completion_ids]

    def _correct(self, prompts: list, completions: list, completion_ids, kwargs: dict[str, Any]) -> list[float]:
        if self.check is None:
            return [1.0] * len(completions)
        values = self.check(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs)
        return [np.nan if value is None else float(value > 0.5) for value in values]
