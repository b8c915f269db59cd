"""Messages of the library, which name arguments and fields, in the words of the command line."""

import re
from collections.abc import Mapping
from dataclasses import fields


def in_flags(text: str, own: Mapping[str, str] = {}) -> str:
    """
    A message in which the settings in backticks are flags: `eps_root` becomes --student_eps_root.

    Args:
        text (`str`): The message. Names in backticks that are no settings stay as they are.
        own (`Mapping[str, str]`, *optional*): Flags of names that are not the student's or the inner loop's.
    """
    from trl_dpg import InnerLoopConfig

    names = [field.name for field in fields(InnerLoopConfig)]
    names += ["model_init_kwargs", "load_in_4bit", "bnb_4bit_compute_dtype", "bnb_4bit_skip_modules"]
    replay = {name: name for name in ("replay_dataset", "replay_ratio")}
    flags = {name: f"student_{name}" for name in names} | replay | dict(own)
    return re.sub(r"`(\w+)`", lambda match: f"--{flags[match[1]]}" if match[1] in flags else match[0], text)
