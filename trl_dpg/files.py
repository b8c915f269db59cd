"""JSON files that survive the end of the process at any moment: whole files, and journals that grow by lines."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .redaction import redacted


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """
    Write figures such that the file is whole at any time, without credentials.

    JSON has no `nan` and `inf`; they become `null`.
    """
    write_text(path, json.dumps(redacted(finite(figures)), indent=2))


def write_text(path: Path, text: str) -> None:
    """[`write_bytes`] of a text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file such that it is whole at any time, see [`written_whole`]."""
    with written_whole(path) as beside, beside.open("xb") as file:
        file.write(content)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """
    Context in which a file is written beside its place, under the name that it yields.

    The file gets its own name at the end, if there was no error. So it is whole at any time. A link at either name is
    replaced, and not followed.
    """
    beside = path.with_name(f"{path.name}.tmp")
    beside.unlink(missing_ok=True)
    yield beside
    os.replace(beside, path)


def check_links(folder: str | Path) -> None:
    """
    Refuse a folder of results with links to files, because what is written to them would change other places.

    Raises:
        `ValueError`: If there is one.
    """
    for path in sorted(Path(folder).glob("*")):
        if path.is_symlink() and not path.is_dir():
            raise ValueError(
                f"The output folder {str(folder)!r} has a link, {path.name} -> {os.readlink(path)}, whose target "
                "would be overwritten. Remove the link, or choose another folder."
            )


def finite(value: Any) -> Any:
    """The value with `None` in the place of `nan` and `inf`."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def locked(path: Path, taken: Exception) -> Iterator[None]:
    """
    Hold a file lock.

    Args:
        path (`Path`): The lock file. Its folder is made.
        taken (`Exception`): Raised if another process, or this one, holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise taken from None
    try:
        yield
    finally:
        lock.release()


def json_line(record: dict[str, Any]) -> bytes:
    """A record as a line of a journal."""
    return json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"


def append_line(path: Path, record: dict[str, Any]) -> int:
    """Write a line at the end of a journal. It is on the disk when this returns. Returns its place."""
    with path.open("ab") as file:
        place = file.tell()
        file.write(json_line(record))
        file.flush()
        os.fsync(file.fileno())
    return place


def remove_half_line(path: Path) -> None:
    """Remove what follows a journal's last whole line: the process ended while it wrote. A new journal is made."""
    path.touch()
    with path.open("rb+") as file:
        size = whole = file.seek(0, os.SEEK_END)
        while whole:  # from the end, as the file may be large
            step = min(whole, 1 << 16)
            file.seek(whole - step)
            found = file.read(step).rfind(b"\n")
            if found >= 0:
                whole += found + 1 - step
                break
            whole -= step
        if whole < size:
            file.truncate(whole)
