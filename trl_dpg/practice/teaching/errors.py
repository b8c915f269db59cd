"""What can go wrong with a request, sorted by what is done about it."""

import datetime
import email.utils
import math
from collections.abc import Mapping
from typing import Any

from ...metagradients.config import SettingsError


class TeacherError(SettingsError):
    """The teacher cannot be used as it is: a wrong key, no money left, an unknown model."""


class Refused(Exception):
    """Too many requests. Sent again, after `retry_after` seconds at the earliest."""

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class Disturbed(Exception):
    """A server's error, a broken connection, half an answer. Sent again a few times."""


class Unanswered(Disturbed):
    """The server was silent for too long, or the connection broke."""


class Unreachable(Disturbed):
    """There is no connection to the server."""


class Rejected(Exception):
    """The server will not answer this request, however often it is sent. Never sent again."""


class WrongRequest(Rejected):
    """The request was rejected in a way that may be the fault of all of them, such as an unknown model."""


_CONTENT = ("content_filter", "content filter", "content management policy", "high risk", "data_inspection_failed")
_NO_MONEY = ("insufficient_quota", "exceeded_current_quota", "insufficient balance", "insufficient_balance")


def sorted_error(
    status: int | None, message: str, kind: str, headers: Mapping[str, str], api_key_env: str
) -> Exception:
    """
    The error that stands for a server's answer.

    Args:
        status (`int` or `None`): The HTTP status. `None`: the error came in the body of an answer, without a status.
        message (`str`), kind (`str`): What the server says, and its `code` and `type`.
        headers (`Mapping[str, str]`): Those of the answer.
        api_key_env (`str`): The environment variable with the key, for messages.
    """
    said = f"{kind} {message}".lower()
    reason = f"HTTP {status}: {message}" if status else message
    if any(word in said for word in _NO_MONEY) or status == 402:
        return TeacherError(f"The account has no money or quota left ({reason}). The answers so far are stored.")
    if any(word in said for word in _CONTENT) or status == 451:
        return Rejected(f"content_filter: {reason}")
    if status == 401:
        return TeacherError(f"The server refuses the key ({reason}). Is the right one in {api_key_env}?")
    if status == 403:
        return TeacherError(f"The server forbids this ({reason}). Check the key's rights and balance.")
    if status in (429, 503, 529):
        return Refused(reason, seconds_to_wait(headers))
    if status is None or status in (408, 409, 425) or status >= 500:
        return Disturbed(reason)
    return WrongRequest(reason)


def seconds_to_wait(headers: Mapping[str, str]) -> float | None:
    """The seconds that the header `Retry-After` asks to wait: a number of seconds, or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds() if date.tzinfo else math.nan
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def described(body: Any, fallback: str) -> tuple[str, str]:
    """The message of a server's error, and its `code` and `type` as one string."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    if not isinstance(error, Mapping):
        return (str(error) if error else fallback)[:500], ""
    message = error.get("message") or error.get("detail") or fallback
    return str(message)[:500], f"{error.get('code') or ''} {error.get('type') or ''}"
