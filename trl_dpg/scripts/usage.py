"""Wrong usage of a command, and checks of arguments that several commands have."""

import json
from typing import Any


class UsageError(ValueError):
    """Wrong usage of a command. The message names the flag and says what to do."""


def at_least(least: int, **values: int | None) -> None:
    """Refuse arguments that are below a smallest value."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"--{name} must be at least {least}, got {value}.")


def from_json(flag: str, value: dict | str | None) -> dict | None:
    """The mapping that an argument stands for. On the command line it is JSON."""
    if not isinstance(value, str):
        return value
    try:
        mapping = json.loads(value)
    except json.JSONDecodeError as error:
        raise UsageError(f"--{flag} must be JSON, got {value!r} ({error}).") from error
    if not isinstance(mapping, dict):
        raise UsageError(f"--{flag} must be a mapping, got {value!r}.")
    return mapping


def metric_entries(flag: str, value: dict | str | None) -> dict[str, Any] | None:
    """Several metrics by name, each a mapping with `metric` and perhaps `metric_kwargs`."""
    entries = from_json(flag, value)
    for name, entry in (entries or {}).items():
        if not isinstance(name, str) or not name:
            raise UsageError(f"--{flag}: the names must be texts, got {name!r}. Put it into quotes.")
        if not isinstance(entry, dict) or "metric" not in entry or set(entry) - {"metric", "metric_kwargs"}:
            raise UsageError(f"--{flag}: {name!r} must have `metric` and perhaps `metric_kwargs`, got {entry!r}.")
    return entries
