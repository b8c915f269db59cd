"""Prompts that ask for detailed or for brief reasoning, for mixtures of long and short samples."""

from typing import Any

from ..lengths.rows import DataError


LONG_PROMPT = "Think it through in detail before you answer."
SHORT_PROMPT = "Think briefly before you answer."
PROMPT_FOR_USE = "Think as much as the question needs, between detailed and brief, before you answer."
"""For a student that was trained on the mixture: neither of the two that it was trained with."""


def with_instruction(row: dict[str, Any], instruction: str) -> dict[str, Any]:
    """
    The row, with an instruction at the end of its prompt: in the last user's message of a conversation.

    Raises:
        `ValueError`: If the row has no prompt.
    """
    if isinstance(row.get("prompt"), str):
        return row | {"prompt": f"{row['prompt'].rstrip()}\n\n{instruction}"}
    name = next((name for name in ("prompt", "messages") if isinstance(row.get(name), list)), None)
    users = [place for place, m in enumerate(row[name]) if m.get("role") == "user"] if name is not None else []
    if name is None or not users:
        raise DataError(
            "A mixture of long and short samples changes prompts, but the samples have none: neither a column "
            "`prompt` nor `messages` with a user's message. Set `long_prompt` and `short_prompt` to ''."
        )
    messages = list(row[name])
    last = messages[users[-1]]
    messages[users[-1]] = last | {"content": f"{str(last['content']).rstrip()}\n\n{instruction}"}
    return row | {name: messages}
