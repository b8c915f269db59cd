"""Manifests: where the files of a folder come from, the hash of each of their rows, and whether all is still so."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from .environment import environment
from .files import write_json, write_text, written_whole
from .redaction import as_stored


if TYPE_CHECKING:
    from datasets import Dataset

LAYOUT = "trl-dpg manifest 1"
MANIFEST, ROW_HASHES, CARD = "manifest.json", "manifest_rows.npz", "README.md"
LEFT_OUT = (MANIFEST, ROW_HASHES, CARD, "*.lock", "*.tmp", ".*", "_*", "checkpoint-*", "notes", "runs", "wandb")
"""Names of files and folders that no manifest lists. The card shows the manifest, so it is written after it."""
TABLES = (".parquet", ".jsonl")
ROWS_PER_READ = 1000
SHOWN = 5
"""Rows that are named, at most, where several differ."""
START, END = "<!-- manifest -->", "<!-- end of manifest -->"


def write_manifest(folder: str | Path, command: str, settings: Mapping[str, Any], **inputs: Any) -> dict[str, Any]:
    """
    Write `manifest.json` and `manifest_rows.npz` for the files of a folder, and show the manifest in its card.

    The manifest has versions, settings without credentials, the models that the settings name, and of each file its
    size and SHA-256, and of each table the number of its rows. The other file has a hash of each row.

    Args:
        folder (`str` or `Path`): The folder, with all files in their final form. Links are listed, and not followed.
        command (`str`): What made the files.
        settings (`Mapping[str, Any]`): Its settings, with metric, models and seeds.
        inputs: Hashes of what was read, e.g. of the prompts.

    Returns:
        `dict[str, Any]`: The manifest.
    """
    folder = Path(folder)
    stored, rows = as_stored(dict(settings)), {}
    files: dict[str, Any] = {}
    for name, path in listed(folder).items():
        if path.is_symlink():
            files[name] = {"link": str(path.readlink())}
            continue
        files[name] = {"size": path.stat().st_size, "sha256": file_hash(path)}
        if path.suffix in TABLES:
            with suppress(ValueError):  # of a file that is no table in spite of its name
                rows[name] = row_hashes(path)
                digest = hashlib.sha256(rows[name].tobytes()).hexdigest()
                files[name] |= {"rows": len(rows[name]), "rows_sha256": digest}
    manifest = {
        "layout": LAYOUT,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": environment(),
        "models": model_states(stored),
        "inputs": as_stored(inputs),
        "settings": stored,
        "files": files,
    }
    with written_whole(folder / ROW_HASHES) as beside, beside.open("xb") as file:
        arrays: dict[str, Any] = {str(number): values for number, values in enumerate(rows.values())}
        np.savez(file, **arrays)
    write_json(folder / MANIFEST, manifest)
    show_in_card(folder)
    return manifest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """
    The manifest of a folder.

    Raises:
        `ValueError`: If it has none, or one that cannot be read.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise ValueError(f"{str(folder)!r} has no {MANIFEST} that can be read ({error.strerror}).") from error
    except ValueError as error:
        raise ValueError(f"The {MANIFEST} of {str(folder)!r} is not JSON ({error}).") from error
    if not isinstance(manifest, dict) or manifest.get("layout") != LAYOUT or not _is_whole(manifest):
        raise ValueError(f"The {MANIFEST} of {str(folder)!r} is not one of trl-dpg ({LAYOUT!r}).")
    return manifest


def _is_whole(manifest: dict[str, Any]) -> bool:
    """Whether a manifest has what is read of it."""
    files = manifest.get("files")
    return (
        {"command", "created"} <= set(manifest)
        and isinstance(files, dict)
        and all(
            isinstance(own, dict)
            and ("link" in own or {"size", "sha256"} <= set(own))
            and ("rows" in own) == ("rows_sha256" in own)
            for own in files.values()
        )
    )


def check_manifest(folder: str | Path) -> list[str]:
    """
    What differs between a folder and its manifest: missing, new and changed files, and which of their rows.

    Raises:
        `ValueError`: If the folder has no manifest, or one that cannot be read.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    found, differences = listed(folder), []
    tables = [name for name, own in manifest["files"].items() if "rows" in own]
    for name, own in manifest["files"].items():
        if name not in found:
            differences.append(f"{name}: the file is missing")
        elif found[name].is_symlink() or "link" in own:
            there = str(found[name].readlink()) if found[name].is_symlink() else None
            if there != own.get("link"):
                differences.append(f"{name}: was {_kind(own.get('link'))}, is {_kind(there)}")
        elif found[name].stat().st_size != own["size"] or file_hash(found[name]) != own["sha256"]:
            differences += _inside(folder, name, own, tables.index(name) if name in tables else None)
    return differences + [f"{name}: the file is new" for name in found if name not in manifest["files"]]


def listed(folder: Path) -> dict[str, Path]:
    """The files of a folder and of the folders in it by their names there, and links of any kind."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in LEFT_OUT):
            continue
        if path.is_dir() and not path.is_symlink():
            found |= {f"{path.name}/{name}": own for name, own in listed(path).items()}
        else:
            found[path.name] = path
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table, Parquet or JSON Lines."""
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    else:
        with path.open("rb") as file:
            yield from map(json.loads, file)


def row_hashes(path: Path) -> np.ndarray:
    """The first 8 bytes of the SHA-256 of each row as JSON, `[N]`. They do not depend on the order of columns."""
    texts = (json.dumps(row, sort_keys=True, ensure_ascii=False, default=str) for row in rows_of(path))
    hashes = b"".join(hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()[:8] for text in texts)
    return np.frombuffer(hashes, dtype="<u8")


def row_as_json(row: str | Mapping[str, Any]) -> str:
    """A sample as text, by which samples can be compared. Arrays and tensors are lists."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=lambda value: value.tolist())


def digest(dataset: "Dataset | Sequence[Any]") -> str:
    """A hash of a dataset's contents."""
    from datasets import Dataset

    sha = hashlib.sha256()
    if not isinstance(dataset, Dataset):
        for row in dataset:
            sha.update(row_as_json(row).encode() + b"\n")
        return sha.hexdigest()
    for table in dataset.with_format("arrow").iter(ROWS_PER_READ):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        sha.update(sink.getvalue())
    return sha.hexdigest()


def is_model(name: str, value: Any) -> bool:
    """Whether a setting names a model."""
    return isinstance(value, str) and (name in ("model", "teacher") or name.endswith("model_name_or_path"))


def model_states(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The states of all models that settings name. Of several students, each has a number."""
    found = {
        name: model_state(own, revision_of(name, settings)) for name, own in settings.items() if is_model(name, own)
    }
    for number, own in enumerate(settings.get("student_models") or []):
        found[f"student_models[{number}]"] = model_state(own, revision_of("student_model_name_or_path", settings))
    return found


def revision_of(name: str, settings: Mapping[str, Any]) -> str | None:
    """The revision that is set for the model of a setting: `model_revision`, or in the arguments of its loading."""
    prefix = name.removesuffix("model_name_or_path")
    further = settings.get(f"{prefix}model_init_kwargs")
    given = further.get("revision") if isinstance(further, dict) else None
    return given or settings.get(f"{prefix}model_revision")


def model_state(name: str, revision: str | None = None) -> dict[str, Any]:
    """The revision of a model of the Hub, or a hash of the sizes and the beginnings of a folder's files."""
    if not Path(name).is_dir():
        try:
            config = try_to_load_from_cache(name, "config.json", revision=revision)
        except HFValidationError:  # a teacher's id need not be one of the Hub
            config = None
        return {"name": name, "revision": Path(config).parent.name if isinstance(config, str) else None}
    found = hashlib.sha256()
    for path in sorted(Path(name).glob("*")):
        if path.is_file() and path.name not in (MANIFEST, ROW_HASHES, CARD):
            with path.open("rb") as file:
                found.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
    return {"name": name, "sha256_of_beginnings": found.hexdigest()}


def show_in_card(folder: str | Path) -> None:
    """Show the manifest of a folder in its `README.md`, in the place of an earlier one, if it has both."""
    folder = Path(folder)
    path = folder / CARD
    if not path.exists() or not (folder / MANIFEST).exists():
        return
    manifest, text = read_manifest(folder), path.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    lines = [(name, own.get("rows", ""), own.get("sha256", "")) for name, own in manifest["files"].items()]
    files = [f"| `{name}` | {rows} | `{sha256[:16]}` |" for name, rows, sha256 in lines]
    packages = ("trl-dpg", "trl", "torch", "transformers")
    versions = ", ".join(f"{name} {manifest['versions'][name]}" for name in packages)
    digest = file_hash(folder / MANIFEST)
    section = f"""{START}
## Manifest

Made by `trl-dpg {manifest["command"]}` on {manifest["created"]} with {versions}. `{MANIFEST}` has all versions, the
settings, the models and hashes of all files. Its own SHA-256 is
`{digest}`. `trl-dpg check FOLDER` compares it with the files, row by row.

| file | rows | SHA-256 |
|---|---|---|
{chr(10).join(files[:20])}
{END}
"""
    write_text(path, f"{before.rstrip()}\n\n{section}{rest.partition(END)[2].lstrip()}")


def _kind(link: str | None) -> str:
    return "a file" if link is None else f"a link to {link!r}"


def _inside(folder: Path, name: str, own: Mapping[str, Any], number: int | None) -> list[str]:
    """What differs in a file whose contents have changed."""
    changed = [f"{name}: the contents differ ({own['size']} bytes then, {(folder / name).stat().st_size} now)"]
    if number is None:
        return changed
    try:
        with np.load(folder / ROW_HASHES, allow_pickle=False) as arrays:
            then = arrays[str(number)]
        now = row_hashes(folder / name)
    except (OSError, ValueError, KeyError) as error:
        return [f"{changed[0]}; the rows cannot be compared ({error})"]
    if hashlib.sha256(then.tobytes()).hexdigest() != own["rows_sha256"]:
        return [f"{changed[0]}; {ROW_HASHES} has changed, too, so the rows cannot be compared"]
    found = compare_rows(then, now)
    return [f"{name}: {line}" for line in found] or [f"{name}: the rows are the same, their form in the file is not"]


def compare_rows(then: np.ndarray, now: np.ndarray) -> list[str]:
    """What differs between rows, given by their hashes `[N]` and `[M]`."""
    missing, new = _left(then, now), _left(now, then)
    same = np.array_equal(missing, new) and len(then) == len(now)
    lines = [_rows(missing, "changed")] if same else [_rows(missing, "missing"), _rows(new, "new")]
    moved = np.flatnonzero(np.delete(then, missing) != np.delete(now, new))
    if len(moved):
        first = np.delete(np.arange(len(then)), missing)[moved]
        lines.append(_rows(first, "in another order"))
    return [line for line in lines if line]


def _left(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The places of rows that have no partner among the others."""
    there, places = Counter(others.tolist()), []
    for place, row in enumerate(rows.tolist()):
        if there[row]:
            there[row] -= 1
        else:
            places.append(place)
    return np.array(places, dtype=np.int64)


def _rows(places: np.ndarray, what: str) -> str:
    if not len(places):
        return ""
    more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    are = "are" if len(places) > 1 else "is"
    return f"row{'s' * (len(places) > 1)} {', '.join(map(str, places[:SHOWN].tolist()))}{more} {are} {what}"
