"""
Choose the student's learning rate and eps_root from a few fine-tunings on one batch.

    trl-dpg tune --config recipes/pattern_67/mini.yaml --output_dir runs/tuned
    trl-dpg dpg --config runs/tuned/tuned.yaml

A recipe of `trl-dpg dpg` can be used unchanged. If its dataset has prompts, its generator writes the texts. Of the two
values, those are chosen that are `auto`; if none is, both. `docs/tune.md` explains the search. It costs at most 12
reward steps.

Files in `output_dir`:

- `tune.json`: the choice and its evidence, written anew after each trial.
- `tuned.yaml`: the recipe with the chosen values, for `--config`.
"""

import json
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..redaction import redacted
from .arguments import UsageError
from .data import check_no_training, make_folder, one_process
from .flags import in_flags
from .output import say
from .samples import SampleArguments, choice_data, load_set_up


LEFT_OUT = "# {0} is left out, because it has a credential. Give it on the command line.\n"


@dataclass
class TuneArguments(SampleArguments):
    """
    Arguments of `trl-dpg tune`, in addition to those of [`SampleArguments`].

    Args:
        output_dir (`str`, *optional*, defaults to `"tuned"`):
            Folder for `tune.json` and `tuned.yaml`. A recipe's `output_dir` is that of its training, so the default is
            then `<output_dir>_tuned` beside it.
    """

    output_dir: str = field(default="tuned", metadata={"help": "Folder for tune.json and tuned.yaml."})

    def __post_init__(self):
        super().__post_init__()
        self.recipe: Path | None = None  # set by the parser
        self.given = {f.name: vars(self)[f.name] for f in fields(self)}  # before a toy world fills in its files


class Report:
    """Prints each trial as soon as it is known, and writes the figures so far to a file."""

    def __init__(self, path: Path, settings: dict[str, Any], num_samples: int):
        self.path, self.settings, self.num_samples, self._num_lines = path, settings, num_samples, 0

    def __call__(self, result) -> None:
        from trl_dpg.tuning.reuse import write_figures

        lines = result.render().split("\n")[: len(result.trials) + 2]  # columns, rule and rows
        for line in lines[self._num_lines :]:
            say(line)
        self._num_lines = len(lines)
        write_figures(self.path, result, self.settings, num_samples=self.num_samples)


def main(script_args: TuneArguments, student_args) -> None:
    from trl_dpg.metagradients.config import AUTO, SettingsError
    from trl_dpg.tuning import tune
    from trl_dpg.tuning.reuse import dependencies

    one_process("tune", "Start it without accelerate, or with --num_processes 1.")
    script_args.set_threads()
    if student_args.attribution == "dataset":
        raise UsageError("--attribution dataset computes no scores of samples, so there is nothing that could agree.")
    output_dir = make_folder("output_dir", script_args.output_dir)
    check_no_training(output_dir)
    given = asdict(student_args)  # before a toy world fills in its files
    if not student_args.inner_loop_config().auto:
        for name in AUTO:
            setattr(student_args, f"student_{name}", "auto")
    student, examples, metric = load_set_up("tune", script_args, student_args, script_args.output_dir)
    config = student_args.inner_loop_config()
    settings = dependencies(student, metric, config, choice_data(script_args, examples))
    report = Report(output_dir / "tune.json", settings, len(examples))
    try:
        result = tune(student, examples, metric, config, progress=True, on_trial=report)
    except SettingsError as error:
        raise UsageError(in_flags(str(error))) from error
    chosen = {f"student_{name}": value for name, value in result.chosen.items()}
    recipe = output_dir / "tuned.yaml"
    recipe.write_text(tuned_recipe(script_args, given | chosen, chosen), encoding="utf-8")
    say(in_flags(result.choice()))
    say(f"All figures: {output_dir / 'tune.json'}. To train with them: trl-dpg dpg --config {recipe}")


def tuned_recipe(script_args: TuneArguments, student: dict[str, Any], chosen: dict[str, float]) -> str:
    """
    The recipe with the chosen values. Without a recipe: the settings that are not at their defaults.

    A comment takes the place of an entry with a credential.

    Args:
        script_args ([`TuneArguments`]): Metric, data and the recipe.
        student (`dict[str, Any]`): The student's settings with the chosen values.
        chosen (`dict[str, float]`): The chosen values by flag.
    """
    from trl_dpg.config import StudentArguments

    text = "" if script_args.recipe is None else script_args.recipe.read_text(encoding="utf-8")
    written = yaml.safe_load(text) or {}
    settings = {
        name: value
        for arguments, values in ((StudentArguments, student), (TuneArguments, script_args.given))
        for name, value in values.items()
        if name not in ("output_dir", "num_samples")
        and str(value) != str(written.get(name, _default(arguments, name)))  # the same number may be written otherwise
    }
    entries = {name: value for name, value in written.items() if _has_credential(name, value)} | settings | chosen
    for name, value in entries.items():
        line = LEFT_OUT.format(name) if _has_credential(name, value) else entry(name, value)
        lines = rf"^{name}:.*\n?(?:[ \t-].*\n?)*"  # the entry, which may have several lines
        text, count = re.subn(lines, line.replace("\\", r"\\"), text, flags=re.MULTILINE)
        text = text if count else text.rstrip("\n") + f"\n{line}"
    return text.lstrip("\n")


def entry(name: str, value: Any) -> str:
    """An entry of a YAML file from which the very same value is read."""
    if isinstance(value, str):
        return f"{name}: {json.dumps(value, ensure_ascii=False)}\n"  # on one line
    return yaml.safe_dump({name: value}, default_flow_style=False, sort_keys=False, allow_unicode=True)


def _has_credential(name: str, value: Any) -> bool:
    return redacted({name: value}) != {name: value}


def _default(arguments: type, name: str) -> Any:
    return next(f.default for f in fields(arguments) if f.name == name)


def make_parser(prog: str | None = None):
    from trl import TrlParser

    from trl_dpg.config import StudentArguments

    class Parser(TrlParser):
        """Remembers the recipe, of which a copy is written."""

        def parse_args_and_config(self, args=None, **kwargs):
            parsed = super().parse_args_and_config(args=args, **kwargs)
            if args is not None and "--config" in args:
                recipe = Path(args[args.index("--config") + 1])
                parsed[0].recipe = recipe
                given = any(argument.partition("=")[0] == "--output_dir" for argument in args)
                if not given and "output_dir" in yaml.safe_load(recipe.read_text(encoding="utf-8")):
                    parsed[0].output_dir = f"{parsed[0].output_dir.rstrip('/')}_tuned"
            return parsed

    return Parser((TuneArguments, StudentArguments), prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("tune", make_parser, main, sys.argv[1:])
