"""Checks of a config file before its values become arguments, because YAML has types and the command line has none."""

import argparse
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from .usage import UsageError


KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}


def check_config_file(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Mapping[str, Any]:
    """
    Refuse values of a config file that are of another type than their argument: `student_batch_size: true`.

    Args:
        parser ([`~trl.TrlParser`]): The command's parser.
        argv (`Sequence[str]`): The command line, which has the file's path after `--config`.

    Returns:
        `Mapping[str, Any]`: The file's values. Empty without a file.
    """
    if "--config" not in argv:
        return {}
    path = argv[argv.index("--config") + 1]
    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(config, Mapping):
        raise UsageError(
            f"--config: {path!r} is not a mapping of arguments to values, such as `learning_rate: 0.001`."
        )
    kinds = {name: kind for arguments in parser.dataclass_types for name, kind in types(arguments).items()}  # type: ignore[attr-defined]
    for name, value in config.items():
        if name in kinds and not is_of_kind(value, kinds[name]):
            shown = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
            wanted = describe(kinds[name])
            hint = " Put a text such as no or 7 into quotes." if wanted == "a text" else ""
            raise UsageError(f"--config: {name} must be {wanted}, but {path!r} has {shown}.{hint}")
    return config


def types(arguments: type) -> dict[str, Any]:
    """The types of the fields of a class of arguments by name."""
    own = [
        vars(base).get("__annotations__", {}) for base in arguments.__mro__ if base.__module__.startswith("trl_dpg")
    ]
    hints, kinds = get_type_hints(arguments), {}
    for field in fields(arguments):
        further: list[Any] = []
        if field.default is None or not any(field.name in names for names in own):  # TRL's may be null
            further.append(NoneType)
        if field.default == "auto":
            further.append(float)  # a number, or the word
        if field.name == "resume_from_checkpoint":
            further.append(bool)
        kinds[field.name] = Union[hints[field.name], *further]
    return kinds


def is_of_kind(value: Any, kind: Any) -> bool:
    """Whether a value of YAML is of the type of an argument. Texts are converted and checked by the parser."""
    if get_origin(kind) in (Union, UnionType):
        return any(is_of_kind(value, choice) for choice in get_args(kind))
    if get_origin(kind) is list or kind is list:
        if isinstance(value, str):
            return True
        return isinstance(value, list) and all(is_of_kind(item, own) for item in value for own in get_args(kind)[:1])
    if get_origin(kind) is dict or kind is dict:
        return isinstance(value, dict | str)
    if kind is NoneType:
        return value is None
    if kind is bool:
        return isinstance(value, bool | str)
    if kind is int:
        return isinstance(value, int | str) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float | str) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str)
    if inspect.isfunction(kind):  # that reads a number or a word
        return isinstance(value, int | float | str) and not isinstance(value, bool)
    return True


def describe(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) in (Union, UnionType):
        words = dict.fromkeys(describe(choice) for choice in get_args(kind) if choice is not NoneType)
        return " or ".join(words)
    return KINDS.get(get_origin(kind) or kind, "a number or a word" if inspect.isfunction(kind) else "a text")
