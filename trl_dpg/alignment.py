"""Old import path of `trl_dpg.token_alignment` and `trl_dpg.text`."""

from .text import completion_text, message_text
from .token_alignment import TokenBytes, decode_with_ends, ends_from_offsets, redistribute, translate


__all__ = [
    "TokenBytes",
    "completion_text",
    "decode_with_ends",
    "ends_from_offsets",
    "message_text",
    "redistribute",
    "translate",
]
