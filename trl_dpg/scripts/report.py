"""
Make an HTML report of a run, or of several that differ in their seeds.

    trl-dpg report --run_dir trl-dpg-output
    trl-dpg report --run_dir runs/seed_0 runs/seed_1 runs/seed_2 --output_dir runs/report

The report is one file that loads no other file. It has curves, the decoded picture over time, score histograms, the
best and worst samples, settings and environment. The figures are also written beside it as PNGs. The report is made
from `dpg_log.jsonl` (see docs/logging.md), and from `dpg_config.json`, `summary.json` and `trainer_state.json` if the
run has them. The run need not be finished.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from ..report import Run, read_runs, write_report
from ..report.figures import draw, plot_mean_and_range
from ..report.page import STYLE, heat_map, render
from ..report.runs import read_run, spread
from .arguments import UsageError


__all__ = [
    "STYLE",
    "ReportArguments",
    "Run",
    "draw",
    "heat_map",
    "main",
    "make_parser",
    "plot_mean_and_range",
    "read_run",
    "render",
    "spread",
]


@dataclass
class ReportArguments:
    """
    Arguments of `trl-dpg report`.

    Args:
        run_dir (`list[str]`):
            Output folders of `DPGTrainer` or `trl-dpg dpg`. Several folders are one experiment with several seeds:
            curves are means, and bands reach from the lowest to the highest run.
        output_dir (`str`, *optional*):
            Folder for `report.html` and the PNGs; `report` in the first run's folder by default.
        title (`str`, *optional*):
            Title of the report; the names of the runs' folders by default.
    """

    run_dir: list[str] | None = field(
        default=None, metadata={"help": "Output folders of runs; several are seeds of one experiment."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the report; <first run_dir>/report by default."}
    )
    title: str | None = field(default=None, metadata={"help": "Title of the report."})

    def __post_init__(self):
        if not self.run_dir:
            raise UsageError("--run_dir is required: the output folder of a run (or of several, one for each seed).")


def main(script_args: ReportArguments) -> Path:
    folders: list[str] = script_args.run_dir  # type: ignore[assignment]  # required
    try:
        runs = read_runs(folders)
    except ValueError as error:
        raise UsageError(f"--run_dir: {error}") from error
    path = write_report(runs, script_args.output_dir or Path(folders[0]) / "report", script_args.title)
    print(f"Report of {len(runs)} run{'s' * (len(runs) > 1)}: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


def make_parser(prog: str | None = None) -> TrlParser:
    return TrlParser(ReportArguments, prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("report", make_parser, main, sys.argv[1:])
