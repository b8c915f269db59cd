"""A teacher's answer, read from the JSON of an OpenAI-compatible server."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...thinking import FIELDS, split_thinking


class MalformedAnswer(ValueError):
    """A server's answer that is no chat completion."""


class Answer(NamedTuple):
    """
    One sample of a teacher.

    Attributes:
        completion (`str`): The answer, without the reasoning.
        reasoning (`str` or `None`): The reasoning. `None` if there is none.
        finish_reason (`str` or `None`): Why the server stopped: `"stop"`, `"length"`, `"content_filter"`, ...
        usage (`dict[str, int | None]`): `prompt_tokens`, `completion_tokens` (with the reasoning), `total_tokens`,
            `reasoning_tokens` and `cached_tokens`. `None` where the server does not say.
        model (`str` or `None`): The model's id as the server gives it.
    """

    completion: str
    reasoning: str | None
    finish_reason: str | None
    usage: dict[str, int | None]
    model: str | None


def read_answer(body: Any) -> Answer:
    """
    The answer in the body of a chat completion.

    The reasoning is the message's `reasoning_content`, or its `reasoning`, or stands between `<think>` and `</think>`
    in its content.

    Raises:
        `MalformedAnswer`: If the body has no message.
    """
    try:
        choice = body["choices"][0]
        message = choice["message"]
        content, thought = message.get("content"), _reasoning(message)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise MalformedAnswer(f"the server's answer has no message: {str(body)[:200]}") from error
    if not isinstance(content, str | None):
        raise MalformedAnswer(f"the content of the server's answer is no text: {str(content)[:200]}")
    return _answer(content or "", thought, choice.get("finish_reason"), body)


class Parts:
    """Puts an answer together that comes in parts: `add` each chunk of the stream, then call `answer`."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._finish_reason: str | None = None
        self._rest: dict[str, Any] = {}

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Add a chunk. The last one may have the usage, and no choices."""
        self._rest |= {key: chunk[key] for key in ("usage", "model") if chunk.get(key)}
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            self._content.append(delta.get("content") or "")
            self._reasoning.append(_reasoning(delta))
            self._finish_reason = choice.get("finish_reason") or self._finish_reason

    def answer(self) -> Answer:
        """
        The whole answer.

        Raises:
            `MalformedAnswer`: If the stream has ended without a reason, so that the rest is missing.
        """
        if self._finish_reason is None:
            raise MalformedAnswer("the stream ended in the middle of an answer")
        return _answer("".join(self._content), "".join(self._reasoning), self._finish_reason, self._rest)


def _reasoning(message: Mapping[str, Any]) -> str:
    found = (message.get(field) for field in FIELDS)
    return next((text for text in found if isinstance(text, str) and text), "")


def _answer(content: str, thought: str, finish_reason: str | None, rest: Mapping[str, Any]) -> Answer:
    if thought:
        reasoning, completion = thought.strip(), content
    else:
        reasoning, completion, _ = split_thinking(content)  # type: ignore[assignment]
    usage = rest.get("usage") or {}
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    counts["reasoning_tokens"] = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    counts["cached_tokens"] = usage.get("cached_tokens") if cached is None else cached
    return Answer(completion, reasoning or None, finish_reason, counts, rest.get("model"))
