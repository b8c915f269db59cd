"""The text of a TRL completion, which is a string or a list of messages."""

from typing import Any


def message_text(message: dict[str, Any]) -> str:
    """A message's text: its content, or the text parts of a structured content. Empty if it has only tool calls."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def completion_text(completion: str | list[dict[str, Any]] | None) -> str:
    """A completion's text: the string, or the texts of its messages one after the other. `None` is empty."""
    if completion is None:
        return ""
    return completion if isinstance(completion, str) else "".join(message_text(message) for message in completion)
