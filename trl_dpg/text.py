"""What a TRL completion says: a string, or the text of its messages."""

from typing import Any


def message_text(message: dict[str, Any]) -> str:
    """A message's text: its content, or the text parts of a structured one; empty for a mere tool call."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """A completion's text: itself, or its messages' texts one after another."""
    return completion if isinstance(completion, str) else "".join(message_text(message) for message in completion)
