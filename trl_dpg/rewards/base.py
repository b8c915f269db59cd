"""What the rewards that compare with reference texts share."""

from collections.abc import Sequence


def reference_texts(references: Sequence[str]) -> list[str]:
    """The references as a list, refused if there are none or if they are one bare string."""
    if isinstance(references, str) or len(references) == 0:
        raise ValueError(f"The references must be a list of at least one text, got {references!r}.")
    return list(references)
