"""
Samples of a strong model behind an OpenAI-compatible API.

    from trl_dpg.practice.teaching import Teacher, teach

    teach(Teacher("http://localhost:8000/v1", "Qwen/Qwen3-8B"), [{"prompt": "What is 6 x 7?"}], "data")
"""

from .client import Teacher
from .errors import TeacherError
from .presets import PRESETS, Preset
from .results import Results, Selection
from .run import Limits
from .sft import LostError, reasoning_place, sft_row
from .teach import Taught, from_preset, served_models, teach
from .verifiers import VERIFIERS


__all__ = [
    "PRESETS",
    "VERIFIERS",
    "Limits",
    "LostError",
    "Preset",
    "Results",
    "Selection",
    "Taught",
    "Teacher",
    "TeacherError",
    "from_preset",
    "reasoning_place",
    "served_models",
    "sft_row",
    "teach",
]
