"""Tokens and dollars so far."""

from typing import Any

from .client import Teacher


class Tally:
    """
    Counts samples, their tokens and their cost.

    Attributes:
        samples (`int`): Samples.
        prompt_tokens (`int`), completion_tokens (`int`): Their tokens. Those of the reasoning are completion tokens.
        cost (`float`): Dollars; 0 without prices.
        dearest (`float`): The cost of the dearest sample.
    """

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.samples = self.prompt_tokens = self.completion_tokens = 0
        self.cost = self.dearest = 0.0

    def add(self, record: dict[str, Any]) -> None:
        """Count a sample."""
        usage = record["usage"]
        self.samples += 1
        self.prompt_tokens += usage["prompt_tokens"] or 0
        self.completion_tokens += usage["completion_tokens"] or 0
        cost = self.teacher.cost(usage, f"{record['reasoning'] or ''}{record['completion']}")
        self.cost += cost
        self.dearest = max(self.dearest, cost)

    def expected_tokens(self, messages: list[dict[str, Any]]) -> float:
        """Tokens that a request will have: 4 characters of its prompt count as one, the answer as the mean so far."""
        prompt = sum(len(str(message.get("content") or "")) for message in messages) / 4
        known = self.completion_tokens / self.samples if self.samples else 0.0
        return prompt + (known or min(self.teacher.parameters.get("max_tokens") or 1024, 1024))
