"""What a client may ask of the server, and how much of it."""

import hashlib
import json
import sys
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, field_validator, model_validator

from ..score_limits import Limits


Name = Annotated[str, StringConstraints(pattern=r"^[\w.:/-]+$", max_length=200)]


class Refused(Exception):
    """
    A request that the server does not do.

    Args:
        status (`int`): The HTTP status.
        reason (`str`): What is wrong, and what to do.
        retry_after (`float`, *optional*): Seconds after which the same request may be sent again.
    """

    def __init__(self, status: int, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.status, self.reason, self.retry_after = status, reason, retry_after


class Message(BaseModel):
    """A message of a conversation, as chat templates read it. It may have further fields."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, JsonValue]
    role: str
    content: str | list[dict[str, JsonValue]] | None = None


Messages = Annotated[list[Message], Field(min_length=1)]


class SampleIn(BaseModel):
    """A text, or a prompt and its completion: two texts or two lists of messages."""

    model_config = ConfigDict(strict=True, extra="forbid")
    id: int | Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    text: str | None = None
    prompt: str | Messages | None = None
    completion: str | Messages | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> "SampleIn":
        pair = self.prompt is not None and self.completion is not None
        if (self.text is not None) == pair or (not pair and (self.prompt, self.completion) != (None, None)):
            raise ValueError("a sample has either `text`, or `prompt` and `completion`")
        if isinstance(self.prompt, str) != isinstance(self.completion, str):
            raise ValueError("`prompt` and `completion` must both be texts, or both lists of messages")
        return self

    def example(self) -> Any:
        """The sample as a student reads it, see [`Student.tokenize`]."""
        if self.text is not None:
            return self.text
        return self.model_dump(include={"prompt", "completion"}, exclude_unset=True)


class ScoreRequest(BaseModel):
    """
    Samples to score.

    Args:
        samples (`list`): Texts, or samples with `id` and `text`, or with `id`, `prompt` and `completion`.
        dataset (`str`, *optional*): The dataset to which they belong. Without a name, they are a dataset of their own.
        stream (`str`, *optional*): In the place of `dataset`: the samples are cut into datasets as they arrive.
        size (`int`, *optional*): Samples of the whole dataset. Needed with `dataset` or `stream`.
        wait (`float`, *optional*): Seconds to wait for the scores; by default, as long as the server allows.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    samples: Annotated[list[SampleIn], Field(min_length=1)]
    dataset: Name | None = None
    stream: Name | None = None
    size: Annotated[int, Field(ge=1)] | None = None
    wait: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @field_validator("samples", mode="before")
    @classmethod
    def _texts(cls, samples: Any) -> Any:
        is_list = isinstance(samples, list)
        return [{"text": own} if isinstance(own, str) else own for own in samples] if is_list else samples

    @model_validator(mode="after")
    def _fits(self) -> "ScoreRequest":
        named = self.dataset is not None or self.stream is not None
        if self.dataset is not None and self.stream is not None:
            raise ValueError("give `dataset` or `stream`, not both")
        if named and self.size is None:
            raise ValueError("`dataset` and `stream` need `size`, the number of samples of a dataset")
        if not named and self.size not in (None, len(self.samples)):
            raise ValueError("`size` is not the number of samples; a dataset of several requests needs a name")
        ids = [sample.id for sample in self.samples]
        missing = ids.count(None)
        if missing and (missing < len(ids) or self.stream is not None or (named and self.size != len(ids))):
            raise ValueError("each sample of a dataset that comes in parts needs an `id`")
        if not missing and len(set(ids)) < len(ids):
            raise ValueError("two samples have the same `id`")
        return self

    def examples(self, limits: Limits) -> dict[int | str, Any]:
        """The samples by their ids, which are their positions by default."""
        if max(self.size or 0, len(self.samples)) > limits.max_samples:
            number = max(self.size or 0, len(self.samples))
            raise Refused(413, f"A dataset may have {limits.max_samples} samples, not {number}.")
        found = {place if own.id is None else own.id: own.example() for place, own in enumerate(self.samples)}
        for name, example in found.items():
            if (length := size_of(example)) > limits.max_text_length:
                raise Refused(413, f"Sample {name!r} has {length} characters; at most {limits.max_text_length}.")
        return found


def size_of(example: Any) -> int:
    """Characters of a sample."""
    return len(example) if isinstance(example, str) else len(json.dumps(example, ensure_ascii=False))


def bytes_of(example: Any) -> int:
    """Bytes of a sample in memory: 1, 2 or 4 for a character, as the widest one of the text needs."""
    return sys.getsizeof(example if isinstance(example, str) else json.dumps(example, ensure_ascii=False))


def digest(example: Any) -> str:
    """A short name of what JSON can hold."""
    return hashlib.sha256(json.dumps(example, sort_keys=True).encode()).hexdigest()[:32]
