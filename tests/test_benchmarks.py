"""The benchmarks that need nothing else run at a tiny size."""

import argparse
import importlib
import json
import re
import runpy
import sys
import textwrap
from pathlib import Path

import pytest

from trl_dpg import Student
from trl_dpg.memory import empty_model
from trl_dpg.scripts import dpg


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = "--threads 1 --kinds lora --repeat 1 --hidden 8 --layers 1 --heads 1 --vocab 64 --length 8".split()

TINY_SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8)


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


# -- the checks that need a GPU --------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


def test_every_open_check_of_the_page_has_one_in_the_script(gpu):
    rows = gpu.page_rows(gpu.PAGE.read_text())
    assert len(rows) > 10
    checks = {check.name for check in gpu.CHECKS}
    for what, names, _ in rows:
        named = re.findall(r"`(\w+)`", names)
        assert set(named) <= checks and (named or names == "by hand"), what


def test_the_checks_fit_into_nine_minutes(gpu):
    assert sum(check.seconds for check in gpu.CHECKS) <= 0.9 * 540
    assert all(check.seconds < check.limit for check in gpu.CHECKS)
    assert f"| all | {sum(check.seconds for check in gpu.CHECKS)} |" in gpu.plan(gpu.CHECKS)


@pytest.mark.parametrize(
    "name", ["scores", "four_bits", "checkpointing", "memory", "costs", "offload", "bf16_verify", "recipe"]
)
def test_a_check_of_the_gpu_runs_at_a_tiny_size_on_the_cpu(name, gpu, tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("it reads /proc")
    (check,) = (check for check in gpu.CHECKS if check.name == name)
    rows = []
    assert not gpu.run_check(check, gpu.Setting("cpu", False, tmp_path), rows.append)
    states = [row.state for row, _ in rows]
    assert states and "fail" not in states, rows
    assert all(row.figure == "needs CUDA" for row, _ in rows if row.state == "open")
    assert "open" in states or name in ("four_bits", "costs", "bf16_verify")


FAKE_CHECKS = """
    import os, time

    from _gpu_rows import Row, at_most


    def good(setting):
        yield at_most("error", 0.5, 1.0)


    def failing(setting):
        yield Row("first", "1")
        raise ValueError("no | such kernel")


    def hanging(setting):
        yield Row("before", "2")
        time.sleep(60)


    def dying(setting):
        yield Row("last words", "3")
        os._exit(7)
"""


def test_a_check_that_fails_hangs_or_dies_is_a_row_and_not_the_end(gpu, tmp_path, monkeypatch, capsys):
    (tmp_path / "fake_checks.py").write_text(textwrap.dedent(FAKE_CHECKS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gpu, "START", 5)
    names = ["failing", "dying", "hanging", "good"]
    checks = [gpu.Check(name, f"fake_checks:{name}", 1, 1 if name == "hanging" else 10) for name in names]
    rows = gpu.run_checks(checks, gpu.Setting("cpu", False, tmp_path), tmp_path, minutes=1)
    found = [(row["check"], row["what"], row["figure"], row["state"]) for row in rows]
    assert found == [
        ("failing", "first", "1", "measured"),
        ("failing", "the check failed", "ValueError: no | such kernel", "fail"),
        ("dying", "last words", "3", "measured"),
        ("dying", "the check ended its process", "exit code 7", "fail"),
        ("hanging", "before", "2", "measured"),
        ("hanging", "the check was stopped", "it took more than 6 s", "fail"),
        ("good", "error", "0.5", "pass"),
    ]
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == rows
    assert gpu.line(rows[1]) in (tmp_path / "gpu.md").read_text()
    assert "no / such kernel" in capsys.readouterr().out
    assert "ValueError: no | such kernel" in (tmp_path / "gpu.log").read_text()
    (late,) = gpu.run_checks(checks[:1], gpu.Setting("cpu", False, tmp_path), tmp_path, minutes=0)
    assert late["state"] == "open" and "were over" in late["figure"]


def test_the_states_of_the_page_come_from_the_rows(gpu):
    page = "| check | in `gpu.py` | state |\n|---|---|---|\n" + "".join(
        f"| {what} | {names} | open |\n"
        for what, names in {"one": "`a`", "two": "`a`, `b`", "three": "`c`", "four": "`d`", "five": "`e`"}.items()
    )
    rows = [
        {"check": "environment", "what": "GPU", "figure": "1 x H100", "state": "measured"},
        {"check": "a", "what": "x", "figure": "1", "state": "pass"},
        {"check": "b", "what": "y", "figure": "9", "state": "fail"},
        {"check": "e", "what": "s", "figure": "2 s", "state": "measured"},
        {"check": "c", "what": "z", "figure": "needs two GPUs", "state": "open"},
    ]
    assert gpu.states(page, rows).splitlines()[2:] == [
        "| one | `a` | passed (1 x H100) |",
        "| two | `a`, `b` | failed: y (1 x H100) |",
        "| three | `c` | open: needs two GPUs |",
        "| four | `d` | open |",
        "| five | `e` | measured (1 x H100) |",
    ]


def test_the_benchmark_of_predicted_memory_predicts_and_measures_a_cell(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("memory_estimate")
    tiny = dict(kind="lora", steps=2, memory_budget=0, hidden=64, layers=1, vocab=512, length=16, batch=2)
    monkeypatch.setitem(script.CONFIGURATIONS, "tiny", tiny)
    phases, weights = script.predict(script.settings("tiny"))
    script.measure("tiny", live=True)
    peak, tensors = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert peak >= 0 and weights > 0
    assert max(sum(parts.values()) for parts in phases.values()) * 1e6 == pytest.approx(tensors, rel=0.15)


# -- docs/scaling.md -------------------------------------------------------------------------------------------------


def test_several_ranks_are_predicted_from_the_first_row_of_one(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("ranks_predicted")
    flags = dict(hidden=8, heads=1, layers=1, vocab=64, length=8, batch=2, steps="2", rank=2, repeat=1)
    flags |= dict(learning_rate=1e-4, betas=(0.9, 0.95), eps=1e-8, eps_root=1e-6)
    args = argparse.Namespace(**flags)
    first, wide = (script.measure(args, None, "full", factors) for factors in ((1, 1), (2, 2)))
    assert script.vector_seconds(args, 100) > 0
    assert script.exchange_seconds(script.Ranks(), 100) == [0.0, 0.0]
    assert wide["N"] == 2 * first["N"] and wide["work"] > 4 * first["work"]
    alone = script.predict(first, first, 1e-9, [0.0, 0.0], 1, 2)
    assert (alone.cpu, alone.wall, alone.states) == pytest.approx([first[name] for name in ("cpu", "wall", "states")])
    four = script.predict(wide, first, 0.0, [1e-9, 2e-9], 4, 2)
    each = first["cpu"] / first["work"]
    assert four.cpu == pytest.approx(each * wide["work"] / 4 + 1e-9 * 5 * 2 * wide["P"])
    assert four.states * 4 == pytest.approx(wide["states"]) and four.exchanged == 40 * wide["P"]
    assert script.line("full", "P", 1, first, alone).count("|") == script.HEADER.splitlines()[0].count("|")


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("sizes")


def test_the_times_on_the_page_are_those_of_the_script(sizes, tmp_path):
    page = (BENCHMARKS.parent / "docs/scaling.md").read_text()
    sizes.save_models(tmp_path)
    for case in sizes.CASES:
        _, training, *_ = sizes.settings(case, tmp_path)
        for products in sizes.PRODUCTS:
            assert sizes.time_row(case, training, products) in page
        assert f"| {case.cards} x {case.memory} | {case.generator} | {case.student}, {case.trained} |" in page


def test_the_numbers_of_a_shape_are_those_of_the_model(sizes, monkeypatch, tmp_path):
    monkeypatch.setitem(sizes.SHAPES, "1B", TINY_SHAPE)
    monkeypatch.setattr(sizes, "VOCABULARY", 96)
    sizes.save_models(tmp_path)
    arguments = sizes.settings(sizes.CASES[0], tmp_path)
    student = empty_model(str(tmp_path / "1B"), peft_config=arguments[1].student_peft_config())
    own = sizes.counts("1B")
    assert own.lora == Student(student).num_trainable
    plain = empty_model(str(tmp_path / "1B"))
    assert own.blocks + own.head + own.norms == sum(p.numel() for p in plain.parameters())
    found = sizes.predicted_memory(arguments)
    assert found.fits and sizes.memory_row(sizes.CASES[0], found).endswith("| yes |")
