"""The files of a run that must survive its end at any moment: samples, failures, and the settings they belong to."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from ...files import append_line, json_line, locked, remove_half_line, write_json, written_whole
from ...metagradients.config import SettingsError
from ...redaction import redacted
from .tally import Tally


LAYOUT = "trl-dpg teach 1"
"""Stands in `teach.json`."""


def sample_key(messages: list[dict[str, Any]], model: str, parameters: dict[str, Any], sample: int) -> str:
    """What a request is known by: a hash of its prompt, model and parameters, and of the sample's number."""
    text = json.dumps([messages, model, parameters, sample], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Journal(AbstractContextManager):
    """
    The folder of a run. Use it as a context manager: until the exit, no other run can open it.

    `samples.jsonl` gets a line for each answer, which is on the disk when `store` returns. `failures.jsonl` gets a
    line for each request that is given up. If the process was killed while it wrote, the last line is cut short; it is
    removed, and the request is sent again.

    Args:
        folder (`str` or `Path`): The folder.
        settings (`dict[str, Any]`): `model` and `parameters`: what the samples depend on beside their prompts.
        base_url (`str`): The server's address. It may change from run to run, and is kept for the record.
        created (`str`): The date, for a new folder.
        tally ([`Tally`]): Counts the samples that are there, and those that are stored.

    Attributes:
        done (`dict[str, int]`): The place in `samples.jsonl` of each sample, by key.
        rejected (`dict[str, str]`): Requests that are never sent again, with the reason, by key.
        base_urls (`list[str]`): All addresses that samples came from.
        created (`str`): The date of the first run.

    Raises:
        `ValueError`: On entering, if another run is at work, if the folder has samples of other settings, or if a line
        is no sample.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], base_url: str, created: str, tally: Tally):
        self.folder = Path(folder)
        self.samples, self.failures = self.folder / "samples.jsonl", self.folder / "failures.jsonl"
        self.settings = redacted(json.loads(json.dumps(settings)))
        self.base_urls, self.created, self.tally = [base_url], created, tally
        self.done: dict[str, int] = {}
        self.rejected: dict[str, str] = {}
        self._open = ExitStack()

    def __enter__(self) -> "Journal":
        taken = SettingsError(f"Another run writes to `output_dir` {str(self.folder)!r}. Choose another one.")
        with ExitStack() as stack:
            stack.enter_context(locked(self.folder / "teach.lock", taken))
            self._check_settings()
            for path in (self.samples, self.failures):
                remove_half_line(path)
            for place, record in self.records(self.samples):
                self.done[record["key"]] = place
                self.tally.add(record)
            self.rejected = {
                record["key"]: record["reason"] for _, record in self.records(self.failures) if record["final"]
            }
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._open.close()

    def _check_settings(self) -> None:
        path = self.folder / "teach.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not found and (self.samples.exists() or self.failures.exists()):
            raise SettingsError(
                f"`output_dir` {str(self.folder)!r} has samples that are not of `teach`. Choose another one."
            )
        changed = [name for name in self.settings if found and found["settings"].get(name) != self.settings[name]]
        if changed:
            changes = ", ".join(f"{name} (was {found['settings'].get(name)!r})" for name in changed)
            raise SettingsError(
                f"`output_dir` {str(self.folder)!r} has samples of other settings: {changes}. Choose another folder."
            )
        self.base_urls = list(dict.fromkeys([*found.get("base_urls", []), *self.base_urls]))
        self.created = found.get("created", self.created)
        write_json(
            path,
            {
                "layout": LAYOUT,
                "created": self.created,
                "base_urls": self.base_urls,
                "settings": self.settings,
            },
        )

    def store(self, record: dict[str, Any]) -> None:
        """Write a sample. It is on the disk when this returns."""
        self.done[record["key"]] = append_line(self.samples, record)
        self.tally.add(record)

    def fail(self, record: dict[str, Any]) -> None:
        """Write a failure, on the disk as well."""
        append_line(self.failures, record)
        if record["final"]:
            self.rejected[record["key"]] = record["reason"]

    def records(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """The lines of a file, each with its place. A key that comes twice counts once: its last line."""
        place = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = json.loads(line)
                    record["key"]  # each line of ours has one
                except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
                    raise SettingsError(
                        f"Line {number} of {str(path)!r} is damaged. Delete this line; its request is sent again."
                    ) from error
                yield place, record
                place += len(line)

    def read(self, key: str, file) -> dict[str, Any]:
        """A sample, from the open file of samples."""
        file.seek(self.done[key])
        return json.loads(file.readline())

    def rewrite(self, path: Path, records: Iterator[dict[str, Any]]) -> None:
        """Write a whole file anew, such that it is whole at any time."""
        places, place = {}, 0
        with written_whole(path) as beside, beside.open("xb") as file:
            for record in records:
                places[record["key"]] = place
                place += file.write(json_line(record))
            file.flush()
            os.fsync(file.fileno())
        if path == self.samples:
            self.done = places
