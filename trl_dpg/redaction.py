"""Hides credentials in what is written: settings, logs, cards, journals, reports and messages."""

import hashlib
import json
import re
from typing import Any


HIDDEN = "<hidden>"
_NAMES = re.compile(
    r"(?:.*_)?(?:api_?key|access_key|secret|secret_key|password|passwd|authorization|credentials?)"
    r"|(?:use_auth|hf|hub|auth|access|api|bearer|refresh)?_?token",
    re.IGNORECASE,
)
"""Names whose values are credentials. `eos_token` and the like are not among them."""
_KEYS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,}|AKIA[A-Z0-9]{16}\b"
    r"|xox[abeprs]-(?:[0-9]+-)+[A-Za-z0-9]{10,})"
    r"|(?<![\w/.\\-])sk-(?=[A-Za-z_-]*[0-9])[\w-]{20,}(?![\w/\\-]|\.\w)",  # no part of a path
    re.ASCII,
)
"""Keys of the Hub, of model APIs and clouds, by the lengths that they have."""
_PASSWORDS = re.compile(
    r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user and password of an address
    r"|(?<=Bearer )\S+"
)
_PAIRS = re.compile(r"""(["']?)\b([A-Za-z_\-]+)\1(\s*[:=]\s*)(["'])((?:(?!\4).)+)\4""")
"""A name and a quoted value, as in JSON or in the text of a dictionary."""


def redacted(value: Any, name: str = "") -> Any:
    """
    A value with `"<hidden>"` in the place of credentials.

    These are texts under a name such as `token`, `api_key` or `password`, and texts that look like a key themselves.
    In the place of the latter is `"<hidden:1a2b3c4d>"` with the beginning of the text's hash, so that two settings
    that are compared are different if two texts are that were taken for keys.

    Args:
        value: A setting. Mappings and lists are searched.
        name (`str`, *optional*): What the value is called.
    """
    if isinstance(value, dict):
        return {key: redacted(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(entry, name) for entry in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if value and is_secret(name) else redacted_text(value)


def as_stored(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as a JSON file gives them back, without credentials, so that they compare with those of a file."""
    return redacted(json.loads(json.dumps(settings, default=str)))


def is_secret(name: str) -> bool:
    """Whether the values of a name are credentials."""
    return _NAMES.fullmatch(name.replace("-", "_")) is not None


def redacted_text(text: str) -> str:
    """A text with `<hidden>` or `<hidden:hash>` in the place of what looks like a key, also in JSON inside of it."""

    def hide(match: re.Match) -> str:
        quote, name, between, mark, _ = match.groups()
        return f"{quote}{name}{quote}{between}{mark}{HIDDEN}{mark}" if is_secret(name) else match[0]

    return _PAIRS.sub(hide, _KEYS.sub(_marked, _PASSWORDS.sub(HIDDEN, text)))


def _marked(key: re.Match) -> str:
    return f"{HIDDEN[:-1]}:{hashlib.sha256(key[0].encode()).hexdigest()[:8]}>"
