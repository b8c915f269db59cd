"""The client of `trl-dpg serve`: has a dataset scored, and waits for a server that is away."""

import json
import os
import time
import uuid
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from transformers.utils import logging


logger = logging.get_logger(__name__)

TOKEN_VARIABLE = "TRL_DPG_SERVER_TOKEN"
"""The environment variable with the server's token."""
MAX_WAIT = 3600.0
"""Seconds to wait for a server that does not answer."""
POLL = 20.0
"""Seconds that a request waits for its scores, before the same request is sent again."""
SLACK = 60.0
"""Further seconds after which a connection is taken to be lost."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds before a server that does not answer is asked again."""
AWAY = (502, 503, 504)
"""What a server, or a proxy before it, answers while there is no room or no server."""


class ScoreClient:
    """
    Asks a server for scores.

    Every dataset has a name of its own and is sent whole. So it does not matter whether the server has seen it before:
    a server that was restarted gets all of it again, and one that has its scores gives them.

    Args:
        server (`str`):
            The server's address, e.g. `"http://127.0.0.1:8000"`.
        max_wait (`float`, *optional*, defaults to `3600.0`):
            Seconds to wait for a server that does not answer, or that has too much to do.

    Attributes:
        known (`dict[str, Any]`): The server's first answer to [`health`], once somebody has set it.

    Raises:
        `ValueError`: If the address is not one, or has a password, or if `max_wait` is negative.
    """

    def __init__(self, server: str, max_wait: float = MAX_WAIT):
        parts = urlsplit(server)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            shown = server if "@" not in server else "an address with a user"
            raise ValueError(
                f"The server must be an address such as 'http://127.0.0.1:8000', got {shown!r}. Its token belongs "
                f"into the environment variable {TOKEN_VARIABLE}."
            )
        if not max_wait >= 0:
            raise ValueError(f"server_max_wait must be 0 or more seconds, got {max_wait}.")
        self.url = server.rstrip("/")
        self.max_wait = max_wait
        self.known: dict[str, Any] = {}
        self._name, self._count = uuid.uuid4().hex, 0

    def health(self) -> dict[str, Any]:
        """What the server says of itself: student, metric, inner loop, versions."""
        return self._ask("/health")[1]

    def score(self, examples: Sequence[Any]) -> dict[str, Any]:
        """
        Have N samples scored as one dataset.

        Args:
            examples (`list[str]` or `list[dict]`): Texts, or rows with `prompt` and `completion`.

        Returns:
            `dict[str, Any]`: The server's answer, with `scores` in the order of the samples.

        Raises:
            `RuntimeError`: If the server refuses or fails, does not answer for `max_wait` seconds, or has another
                student, metric or inner loop than the one that is `known`.
        """
        self._count += 1
        rows = [{"text": example} if isinstance(example, str) else example for example in examples]
        body = {"dataset": f"{self._name}-{self._count}", "size": len(rows), "wait": POLL}
        content = json.dumps(body | {"samples": [row | {"id": place} for place, row in enumerate(rows)]}).encode()
        status = 202
        while status == 202:  # the dataset waits, or is being scored
            status, answer = self._ask("/score", content)
        if self.known and answer["set_up"] != self.known["set_up"]:
            now = self.health()
            parts = [name for name in ("student", "weights", "metric", "inner_loop") if now[name] != self.known[name]]
            raise RuntimeError(
                f"The server at {self.url} has another set-up than before ({', '.join(parts)}): metric "
                f"{now['metric']}, student {now['student']}. Start it as it was, or start a new run."
            )
        return answer

    def _ask(self, path: str, content: bytes | None = None) -> tuple[int, dict[str, Any]]:
        """Status and answer. Waits while the server is away."""
        since, pause = time.monotonic(), FIRST_PAUSE
        told = False
        while True:
            try:
                answer = self._send(path, content)
            except HTTPError as error:
                reason = _reason(error)
                if error.code not in AWAY:
                    raise RuntimeError(f"The server at {self.url} answers {error.code}: {reason}") from None
                asked = error.headers.get("Retry-After", "")
                pause = max(pause, float(asked)) if asked.isdecimal() else pause
            except (OSError, HTTPException) as error:  # not there, or the connection is lost
                reason = str(error) or repr(error)
                self._check_welcome(content)
            else:
                if told:
                    logger.warning(f"The server at {self.url} answers again, after {time.monotonic() - since:.0f} s.")
                return answer
            left = since + self.max_wait - time.monotonic()
            if left <= 0:
                raise RuntimeError(
                    f"The server at {self.url} did not answer for {self.max_wait:g} s ({reason}). Start it again, "
                    "then this run, which goes on from its last checkpoint. A larger `server_max_wait` waits longer."
                )
            if not told:
                logger.warning(
                    f"The server at {self.url} does not answer ({reason}). This run waits up to {self.max_wait:g} s, "
                    "and goes on when it is back."
                )
                told = True
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _check_welcome(self, content: bytes | None) -> None:
        """
        Raise if a server that is there would refuse this content. It may have closed the connection before it has read
        all of it, so that its answer was lost.
        """
        if content is None:
            return
        try:
            limit = self._send("/health", None)[1]["limits"]["max_request_bytes"]
        except HTTPError as error:
            if error.code in AWAY:
                return
            raise RuntimeError(f"The server at {self.url} answers {error.code}: {_reason(error)}") from None
        except (OSError, HTTPException):
            return
        if len(content) > limit:
            raise RuntimeError(
                f"The dataset has {len(content)} bytes as JSON, but the server at {self.url} takes {limit}. Start it "
                "with a larger --max_request_bytes."
            )

    def _send(self, path: str, content: bytes | None) -> tuple[int, dict[str, Any]]:
        request = Request(self.url + path, data=content)
        if content is not None:
            request.add_header("Content-Type", "application/json")
        if token := checked_token(os.environ.get(TOKEN_VARIABLE, "")):
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        with urlopen(request, timeout=POLL + SLACK) as response:
            status, text = response.status, response.read()
        try:
            answer = json.loads(text)
            if status == 200:
                answer["set_up"]
        except (ValueError, KeyError, TypeError):
            raise RuntimeError(f"What answers at {self.url} is no `trl-dpg serve`: {text[:100]!r}") from None
        return status, answer


def checked_token(token: str) -> str:
    """A token without the spaces around it. Raises `ValueError` if a header cannot hold it."""
    token = token.strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError("The token of the server must be ASCII characters without spaces.")
    return token


def _reason(error: HTTPError) -> str:
    """What a server says of a request that it does not do."""
    text = error.read().decode(errors="replace")
    try:
        reason = json.loads(text)["detail"]
    except (ValueError, KeyError, TypeError):
        reason = text[:500] or error.reason
    hint = f" The token is read from the environment variable {TOKEN_VARIABLE}." if error.code == 401 else ""
    return f"{reason}{hint}"
