"""One request to an OpenAI-compatible server, and what became of it."""

import asyncio
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ...metagradients.config import SettingsError
from .answers import Answer, MalformedAnswer, Parts, read_answer
from .errors import (
    Disturbed,
    Rejected,
    TeacherError,
    Unanswered,
    Unreachable,
    WrongRequest,
    described,
    sorted_error,
)


Messages = list[dict[str, Any]]
OURS = ("model", "messages", "stream", "stream_options", "n")
"""Fields of a request that are not parameters."""
PRICES = ("input", "cached", "output")
NO_CONNECTION = ("ConnectError", "ConnectTimeout")
"""Errors of httpx and of httpx2: openai has the one or the other below it."""
CONNECT = 10.0
"""Seconds to connect to the server, at most."""


@dataclass
class Teacher:
    """
    A model behind an OpenAI-compatible API.

    Args:
        base_url (`str`):
            The address of the API, e.g. `"http://localhost:8000/v1"`.
        model (`str`):
            The model's id.
        parameters (`dict[str, Any]`, *optional*):
            Fields of each request: `max_tokens`, `temperature`, `reasoning_effort`, ... With a `seed`, the samples of
            a prompt have this seed and the next ones.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            The environment variable with the key. A local server may need none.
        prices (`dict[str, float]`, *optional*):
            `input`, `output` and perhaps `cached` (input that the server had in its cache), in dollars per million
            tokens.
        stream (`bool`, *optional*, defaults to `False`):
            Whether answers come in parts. A long answer then keeps its connection alive.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds for one answer, at most.

    Raises:
        `ValueError`: If a setting cannot be right.
    """

    base_url: str
    model: str
    parameters: dict[str, Any] = field(default_factory=dict)
    api_key_env: str = "OPENAI_API_KEY"
    prices: dict[str, float] | None = None
    stream: bool = False
    timeout: float = 600.0

    def __post_init__(self) -> None:
        address = urlsplit(self.base_url)
        if "@" in address.netloc or address.query:
            raise SettingsError("`base_url` has a password or key in it. Put the key into an environment variable.")
        if address.scheme not in ("http", "https") or not address.netloc:
            raise SettingsError(f"`base_url` must be like https://host/v1, got {self.base_url!r}.")
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", self.api_key_env) or len(self.api_key_env) > 60:
            raise SettingsError("`api_key_env` takes the name of an environment variable, not the key itself.")
        taken = [name for name in OURS if name in self.parameters]
        if taken:
            raise SettingsError(
                f"`request_parameters` has {', '.join(taken)}, which the command sets itself. Several samples of a "
                "prompt are several requests: set `num_samples`."
            )
        if self.timeout <= 0:
            raise SettingsError(f"`timeout` must be positive, got {self.timeout}.")
        self._check_prices()

    def _check_prices(self) -> None:
        prices = self.prices
        if prices is None:
            return
        numbers = all(isinstance(price, int | float) and price >= 0 for price in prices.values())
        if not {"input", "output"} <= set(prices) <= set(PRICES) or not numbers:
            raise SettingsError(
                "`prices` must have `input`, `output` and perhaps `cached`, in dollars per million tokens, got "
                f"{prices!r}."
            )

    def cost(self, usage: dict[str, int | None], text: str = "") -> float:
        """Dollars of an answer. Where the server does not say its tokens, 3 characters of `text` count as one."""
        if self.prices is None:
            return 0.0
        read, written, cached = (usage.get(name) for name in ("prompt_tokens", "completion_tokens", "cached_tokens"))
        written, cached = len(text) / 3 if written is None else written, cached or 0  # type: ignore[assignment]
        price = self.prices
        dear = max((read or 0) - cached, 0) * price["input"] + cached * price.get("cached", price["input"])
        return (dear + written * price["output"]) / 1e6  # type: ignore[operator]

    def request(self, messages: Messages, sample: int) -> dict[str, Any]:
        """The parameters of a request for one of a prompt's samples."""
        seed = self.parameters.get("seed")
        return self.parameters if seed is None else {**self.parameters, "seed": seed + sample}

    def key(self) -> str:
        """The key, without white space around it. `"none"` if there is none."""
        key = os.environ.get(self.api_key_env, "").strip() or "none"
        if not (key.isascii() and key.isprintable()):
            raise SettingsError(f"The key in `{self.api_key_env}` has characters that no key has. Copy it again.")
        return key


class Client:
    """
    Sends requests to a teacher. The key is in no message of its errors.

    Args:
        teacher ([`Teacher`]): The teacher.

    Raises:
        `ImportError`: If openai is not installed.
    """

    def __init__(self, teacher: Teacher):
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ImportError('A teacher needs openai: pip install "trl-dpg[teacher]".') from error
        self.teacher, self._openai, self._key = teacher, openai, teacher.key()
        timeout = openai.Timeout(teacher.timeout, connect=min(CONNECT, teacher.timeout))
        self._client = openai.AsyncOpenAI(base_url=teacher.base_url, api_key=self._key, max_retries=0, timeout=timeout)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_) -> None:
        await self._client.close()

    async def ask(self, messages: Messages, sample: int = 0) -> Answer:
        """
        The answer to a prompt.

        Raises:
            `Refused`, `Disturbed`, `Rejected` or `TeacherError`: See their own docstrings.
        """
        try:
            async with asyncio.timeout(self.teacher.timeout):
                return await self._ask(messages, sample)
        except TimeoutError:
            found: Exception = Unanswered(f"no answer within {self.teacher.timeout:g} s")
        except self._openai.APIStatusError as error:
            message, kind = described(error.body, error.message)
            found = self._sorted(error.status_code, message, kind, error.response.headers)
        except self._openai.APIConnectionError as error:
            found = self._unconnected(error)
        except self._openai.APIError as error:  # in the middle of a stream
            found = self._from_body(error.body, error.message)
        except (MalformedAnswer, UnicodeDecodeError, json.JSONDecodeError) as error:
            found = Disturbed(self._clean(f"not an answer: {error}"))
        raise found from None  # the chain would print what the server sent, perhaps with the key

    async def _ask(self, messages: Messages, sample: int) -> Answer:
        request: dict[str, Any] = {"model": self.teacher.model, "messages": messages}
        parameters = self.teacher.request(messages, sample)
        chat = self._client.chat.completions
        if not self.teacher.stream:
            response = await chat.with_raw_response.create(**request, extra_body=parameters)
            body = json.loads(response.content)
            if isinstance(body, dict) and body.get("error") and not body.get("choices"):
                raise self._from_body(body["error"], "an error without a message")
            return read_answer(body)
        parts = Parts()
        stream = await chat.create(
            **request, stream=True, stream_options={"include_usage": True}, extra_body=parameters
        )
        async with stream:
            async for chunk in stream:
                if not isinstance(chunk, self._openai.BaseModel):
                    raise MalformedAnswer(f"a part is no object: {str(chunk)[:200]}")
                parts.add(chunk.to_dict())
        return parts.answer()

    async def model_ids(self) -> list[str]:
        """The ids of the server's models. Empty if it does not say."""
        try:
            page = await self._client.models.list()
            return [str(model.id) for model in page.data]
        except (self._openai.OpenAIError, AttributeError, TypeError, ValueError):
            return []

    async def explained(self, error: WrongRequest) -> Exception:
        """The error with the ids of the server's models, if the teacher's id is not among them."""
        ids = await self.model_ids()
        model = self.teacher.model
        unknown = ids and model not in ids and "model" in str(error).lower()
        if unknown or str(error).startswith("HTTP 404"):
            known = f" The server has {', '.join(map(repr, ids[:20]))}." if ids else " Does `base_url` end with /v1?"
            return TeacherError(f"The server does not know `model` {model!r} ({error}).{known}")
        return Rejected(str(error))

    def _from_body(self, body: Any, fallback: str) -> Exception:
        """An error that came with the status 200: its code may be a status."""
        message, kind = described(body, fallback)
        code = body.get("code") if isinstance(body, dict) else None
        status = int(str(code)) if str(code).isdigit() else None
        return self._sorted(status, message, kind, {})

    def _unconnected(self, error: Exception) -> Exception:
        """The error of a connection that could not be made, that broke, or that was silent for too long."""
        if type(error.__cause__).__name__ in NO_CONNECTION:
            reason = str(error.__cause__) or f"no connection within {min(CONNECT, self.teacher.timeout):g} s"
            return Unreachable(self._clean(f"no connection to {self.teacher.base_url}: {reason}"))
        if isinstance(error, self._openai.APITimeoutError):
            return Unanswered(f"no answer within {self.teacher.timeout:g} s")
        return Unanswered(self._clean(f"the connection broke: {error.__cause__ or error}"))

    def _sorted(self, status: int | None, message: str, kind: str, headers: Any) -> Exception:
        return sorted_error(status, self._clean(message), kind, headers, self.teacher.api_key_env)

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key != "none" else text
