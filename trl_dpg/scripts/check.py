"""
Compare the files of a folder with the manifest that was written beside them.

    trl-dpg check FOLDER

`attribute`, `generate`, `teach`, `mix` and `dpg` write `manifest.json`: versions, models, settings, and hashes of all
files and rows. This command names what differs: files that are missing, new or links, and rows that were changed,
added, removed or put in another order. The exit status is 0 if all is the same, and 1 otherwise.
"""

import sys
from dataclasses import dataclass, field

from .arguments import UsageError


@dataclass
class CheckArguments:
    """
    Arguments of `trl-dpg check`.

    Args:
        folder (`str`):
            The folder with the manifest. Its name may also stand alone, first of all.
    """

    folder: str | None = field(default=None, metadata={"help": "The folder with the manifest; `check FOLDER`."})

    def __post_init__(self):
        if self.folder is None:
            raise UsageError("The folder is required: trl-dpg check FOLDER.")


def main(script_args: CheckArguments) -> None:
    from trl_dpg.provenance import MANIFEST, check_manifest, read_manifest

    folder = str(script_args.folder)
    try:
        manifest, differences = read_manifest(folder), check_manifest(folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
    files = manifest["files"]
    rows = sum(own.get("rows", 0) for own in files.values())
    print(f"Made by trl-dpg {manifest['command']}, {manifest['created']}: {len(files)} files, {rows} rows.")
    if differences:
        print("\n".join(differences))
        print(f"{len(differences)} differences from {MANIFEST}.")
        sys.exit(1)
    print("All files are as they were written.")


def make_parser(prog: str | None = None):
    from trl import TrlParser

    class Parser(TrlParser):
        """Takes the folder without its flag, too."""

        def parse_args_and_config(self, args=None, **kwargs):
            args = list(args or [])
            alone = bool(args) and not args[0].startswith("-")
            return super().parse_args_and_config(args=["--folder"] * alone + args, **kwargs)

    return Parser(CheckArguments, prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("check", make_parser, main, sys.argv[1:])
