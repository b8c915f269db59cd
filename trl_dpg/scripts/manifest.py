"""What commands do when all of their files are written: they leave a manifest beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def leave_manifest(folder: str | Path, command: str, settings: Mapping[str, Any], **inputs: Any) -> None:
    """
    Write the manifest of a folder, see [`trl_dpg.provenance.write_manifest`].

    Args:
        folder (`str` or `Path`): The folder.
        command (`str`): The command's name.
        settings (`Mapping[str, Any]`): Its settings.
        inputs: What it read, e.g. its prompts: a dataset or a list, of which the hash is written, or a hash.
    """
    from trl_dpg.provenance import digest, write_manifest

    hashes = {name: value if isinstance(value, str) else digest(value) for name, value in inputs.items()}
    write_manifest(folder, command, settings, **hashes)
