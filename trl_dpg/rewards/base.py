"""Shared code of the rewards that compare completions with reference texts."""

from collections.abc import Sequence


def reference_texts(references: Sequence[str]) -> list[str]:
    """The references as a list. An empty list and a single string are refused."""
    if isinstance(references, str) or len(references) == 0:
        raise ValueError(f"The references must be a list of at least one text, got {references!r}.")
    return list(references)
