"""JSON files that are whole at any time, also if the process ends while one is written."""

import json
import math
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Write figures such that the file is whole at any time. JSON has no `nan` and `inf`; they become `null`."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(finite(figures), indent=2), encoding="utf-8")
    os.replace(beside, path)


def finite(value: Any) -> Any:
    """The value with `None` in the place of `nan` and `inf`."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
