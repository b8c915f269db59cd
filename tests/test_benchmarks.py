"""The benchmarks that need nothing else run at a tiny size."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest

from trl_dpg.scripts import dpg


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = "--threads 1 --kinds lora --repeat 1 --hidden 8 --layers 1 --heads 1 --vocab 64 --length 8".split()


@pytest.mark.parametrize(
    ("script", "flags", "rows"),
    [
        ("scaling.py", [], 10),
        ("metagradient_vs_sft.py", ["--steps", "1,2"], 2),
        ("many_metrics.py", ["--steps", "1,2", "--number", "2"], 4),
    ],
)
def test_a_benchmark_prints_its_table(script, flags, rows, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *TINY, *flags])
    monkeypatch.syspath_prepend(BENCHMARKS)
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + rows


def test_the_benchmark_of_memory_runs_a_cell(monkeypatch, capsys):
    if not sys.platform.startswith("linux"):
        pytest.skip("it reads /proc")
    monkeypatch.setattr(sys, "argv", ["memory.py", *TINY, "--steps", "1", "--cell"])
    monkeypatch.syspath_prepend(BENCHMARKS)
    runpy.run_path(str(BENCHMARKS / "memory.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("[")


def test_the_student_batches_of_the_papers_ways_divide_their_datasets(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    paper = importlib.import_module("paper")
    for experiment, ways in paper.WAYS.items():
        for way, flags in ways.items():
            arguments = [*paper.recipe(experiment), "--output_dir", str(tmp_path), "--bf16", "false", *flags]
            _, args, *_ = dpg.make_parser().parse_args_and_config(args=arguments)
            groups = 1 if args.cross_group_batching else args.num_generations
            assert args.generation_batch_size / groups % args.student_batch_size == 0, (experiment, way)
