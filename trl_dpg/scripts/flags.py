"""Messages of the library, which name arguments and fields, in the words of the command line."""

import re
from collections.abc import Mapping


def in_flags(text: str, own: Mapping[str, str] = {}) -> str:
    """
    A message in which the names in backticks are flags: `eps_root` becomes --student_eps_root.

    Args:
        text (`str`): The message.
        own (`Mapping[str, str]`, *optional*): Flags of names that are not the student's or the inner loop's.
    """
    return re.sub("`(.+?)`", lambda match: f"--{own.get(match[1], f'student_{match[1]}')}", text)
