"""
Runs the open checks of docs/gpu_checks.md on one NVIDIA GPU, in less than 9 minutes.

    python benchmarks/gpu.py --plan                    # what is run, and the seconds that it should take on an H100
    python benchmarks/gpu.py --output-dir runs/gpu
    python benchmarks/gpu.py --only scores,costs
    python benchmarks/gpu.py --device cpu --size tiny  # what the tests run; rows that need CUDA stay open

The output folder has `gpu.json` (all rows), `gpu.md` (the table of docs/gpu_checks.md with new states, and the
figures) and `gpu.log` (what the checks print). They are written anew after each row, so nothing is
lost if the machine is taken away. The checks run in a process of their own, the most important first. A check that
fails or takes too long is a row. If its process has ended or the GPU's state is broken, the next check gets a new one.

A machine without a network
---------------------------

It needs torch from 2.11 on (with CUDA), accelerate, peft, pandas, pyarrow, psutil, scipy, rich and, for the check
`tests`, pytest, pytest-xdist and hypothesis. The rest travels as wheels. On a machine with a network, in the root of
this repository, with the GPU machine's Python version (here 3.12):

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
        --dest wheels bitsandbytes==0.50.2 trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 \
        transformers==5.23.0

`wheels/` is ignored by git. It holds 58.3 MB:

    bitsandbytes 43.1 MB, any Python version, with kernels for CUDA 11.8 to 13.2
    transformers 13.3 MB, any Python version; leave it out if the machine has 5.18 or newer
    trl           0.9 MB, any Python version
    datasets      0.6 MB, any Python version
    multiprocess  0.2 MB, for this Python version
    dill          0.1 MB, any Python version

transformers 5.23 needs huggingface_hub from 1.31 on, tokenizers from 0.23.1 on, safetensors
from 0.8 on and regex from 2025.10.22 on: all of them small, and to be downloaded in the same way if they are older.
On the GPU machine, in the root of this repository:

    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python benchmarks/gpu.py --output-dir runs/gpu

trl needs datasets, and datasets needs pyarrow (50 MB). Nothing runs without them. If the machine has no pyarrow, and
a transfer takes at most 64 MB, transfer twice: first pyarrow alone, and install it; then the other wheels. Without
bitsandbytes, `four_bits`, `bf16_verify`, `costs`, `memory`, `recipe` and `quickstart` fail, and the others run.
"""

import argparse
import gc
import importlib
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # for `trl_dpg` without installation, and for the yardstick in tests/unroll.py

from _gpu_rows import Row, Setting  # noqa: E402

from trl_dpg.files import write_json, write_text  # noqa: E402


PAGE = ROOT / "docs" / "gpu_checks.md"
START = 40
"""Seconds for a new process, until it has imported everything and has reached the GPU."""


@dataclass(frozen=True)
class Check:
    """
    A check: a function that yields rows.

    Attributes:
        name (`str`): Its name on the command line and in docs/gpu_checks.md.
        place (`str`): Module and function.
        seconds (`int`): What it should take on an H100. An estimate.
        limit (`int`): After this time it is stopped.
    """

    name: str
    place: str
    seconds: int
    limit: int


CHECKS = [  # the most important first
    Check("environment", "_gpu_accuracy:environment", 15, 60),
    Check("scores", "_gpu_accuracy:scores", 25, 60),
    Check("four_bits", "_gpu_accuracy:four_bits", 10, 40),
    Check("checkpointing", "_gpu_accuracy:checkpointing", 10, 40),
    Check("memory", "_gpu_costs:memory", 25, 60),
    Check("costs", "_gpu_costs:costs", 110, 150),
    Check("recipe", "_gpu_runs:recipe", 65, 110),
    Check("offload", "_gpu_costs:offload", 25, 50),
    Check("bf16_verify", "_gpu_accuracy:bf16_verify", 10, 40),
    Check("quickstart", "_gpu_runs:quickstart_language", 40, 70),
    Check("benchmarks", "_gpu_costs:benchmarks", 30, 60),
    Check("two_ranks", "_gpu_runs:two_ranks", 1, 60),
    Check("placement", "_gpu_costs:placement", 10, 40),
    Check("commands", "_gpu_runs:commands", 1, 120),
    Check("engines", "_gpu_runs:engines", 1, 240),
    Check("vllm", "_gpu_runs:vllm", 1, 90),
    Check("tests", "_gpu_runs:tests", 90, 150),
]


# -- in the process of the checks -----------------------------------------------------------------------------------


def serve(connection, setting: Setting, log: Path) -> None:
    """Run the checks that come through the connection. Answer with rows, and after each check whether this ends."""
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    for check, seconds in iter(connection.recv, None):
        broken = run_check(check, setting._replace(seconds=seconds), connection.send)
        connection.send(broken)
        if broken:
            return


def run_check(check: Check, setting: Setting, send) -> bool:
    """Run one check and send its rows. Whether its error leaves the GPU in a state in which nothing else runs."""
    print(f"\n== {check.name}", flush=True)
    module, function = check.place.split(":")
    started = time.perf_counter()
    try:
        for row in getattr(importlib.import_module(module), function)(setting):
            send((row, time.perf_counter() - started))
            started = time.perf_counter()
    except Exception as error:
        traceback.print_exc()
        message = " ".join(f"{type(error).__name__}: {error}".split())
        send((Row("the check failed", f"{message:.300}", "fail"), time.perf_counter() - started))
        return type(error).__name__ == "AcceleratorError"
    finally:
        if setting.cuda:
            import torch

            gc.collect()
            torch.cuda.empty_cache()
    return False


class Worker:
    """
    The process of the checks.

    Attributes:
        is_new (`bool`): Whether it has run no check.
        has_ended (`bool`): Whether it can run no more.
    """

    def __init__(self, setting: Setting, log: Path):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, setting, log), daemon=True)
        self.process.start()
        other.close()
        self.is_new, self.has_ended = True, False

    def rows(self, check: Check, seconds: float):
        """The rows of a check as they come, each with its seconds. The last one may say that it was stopped."""
        ends = time.perf_counter() + seconds
        self.connection.send((check, seconds))
        self.is_new = False
        try:
            while self.connection.poll(max(0.0, ends - time.perf_counter())):
                answer = self.connection.recv()
                if isinstance(answer, bool):
                    self.has_ended = answer
                    return
                yield answer
        except EOFError:
            self.process.join()
            self.has_ended = True
            yield Row("the check ended its process", f"exit code {self.process.exitcode}", "fail"), 0.0
            return
        self.process.kill()
        self.has_ended = True
        yield Row("the check was stopped", f"it took more than {seconds:.0f} s", "fail"), seconds

    def close(self) -> None:
        """Let the process end by itself, if it does so soon."""
        self.connection.send(None)
        self.process.join(10)
        self.process.kill()


# -- in the process of the command ----------------------------------------------------------------------------------


def run_checks(checks: list[Check], setting: Setting, output_dir: Path, minutes: float) -> list[dict]:
    """Run the checks, print each row, and write all of them after each."""
    ends = time.perf_counter() + 60 * minutes
    rows, worker = [], None

    def report(check, row, seconds):
        rows.append({"check": check.name, **row._asdict(), "seconds": round(seconds, 1)})
        print(line(rows[-1]), flush=True)
        write(rows, setting, output_dir)

    for check in checks:
        left = ends - time.perf_counter()
        if left < 5:
            report(check, Row("not run", f"the {minutes:g} minutes were over", "open"), 0.0)
            continue
        worker = worker or Worker(setting, output_dir / "gpu.log")
        for row, seconds in worker.rows(check, min(check.limit + START * worker.is_new, left)):
            report(check, row, seconds)
        if worker.has_ended:
            worker = None
    if worker is not None:
        worker.close()
    return rows


def line(row: dict) -> str:
    cells = [row["check"], row["what"], row["figure"], row["wanted"], row["state"], f"{row['seconds']:.1f}"]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


HEADER = "| check | what | figure | wanted | state | seconds |\n|---|---|---|---|---|---|"


def write(rows: list[dict], setting: Setting, output_dir: Path) -> None:
    size = "real" if setting.real else "tiny"
    write_json(output_dir / "gpu.json", {"device": setting.device, "size": size, "rows": rows})
    figures = "\n".join([HEADER, *map(line, rows)])
    page = f"{states(PAGE.read_text(), rows)}\n\n" if setting.cuda and setting.real else ""
    write_text(output_dir / "gpu.md", f"{page}{figures}\n")


def page_rows(page: str) -> list[list[str]]:
    """The cells of docs/gpu_checks.md: what is checked, the names of the checks here, and the state."""
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| check |")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def states(page: str, rows: list[dict]) -> str:
    """The table of docs/gpu_checks.md with the states that the rows give."""
    machine = next((row["figure"] for row in rows if row["what"] == "GPU"), "")
    lines = []
    for what, names, state in page_rows(page):
        wanted = re.findall(r"`(\w+)`", names)
        own = [row for row in rows if row["check"] in wanted]
        failed = [row["what"] for row in own if row["state"] == "fail"]
        still_open = [row["figure"] for row in own if row["state"] == "open"]
        if failed:
            state = f"failed: {'; '.join(failed)} ({machine})"
        elif still_open:
            state = f"open: {'; '.join(dict.fromkeys(still_open))}"
        elif wanted and {row["check"] for row in own} == set(wanted):
            passed = any(row["state"] == "pass" for row in own)
            state = f"{'passed' if passed else 'measured'} ({machine})"
        lines.append(f"| {what} | {names} | {state} |")
    return "\n".join(["| check | in `gpu.py` | state |", "|---|---|---|", *lines])


def plan(checks: list[Check]) -> str:
    lines = ["| check | seconds on an H100 (estimate) | stopped after |", "|---|---|---|"]
    lines += [f"| {check.name} | {check.seconds} | {check.limit} |" for check in checks]
    return "\n".join([*lines, f"| all | {sum(check.seconds for check in checks)} | |"])


def main(args: argparse.Namespace) -> None:
    unknown = set(args.only or ()) - {check.name for check in CHECKS}
    if unknown:
        raise SystemExit(f"--only: there is no check {', '.join(sorted(unknown))}. See --plan.")
    checks = [check for check in CHECKS if args.only is None or check.name in args.only]
    if args.plan:
        print(plan(checks))
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"WANDB_MODE": "offline"}
    if args.device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(args.device, args.size == "real", Path(folder))
        rows = run_checks(checks, setting, args.output_dir, args.minutes)
    counts = {state: sum(row["state"] == state for row in rows) for state in ("pass", "fail", "measured", "open")}
    print(f"\n{', '.join(f'{number} {state}' for state, number in counts.items())}. All rows: {args.output_dir}")
    sys.exit(counts["fail"] > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="real", choices=("real", "tiny"))
    parser.add_argument("--only", type=lambda names: names.split(","), help="names of checks, separated by commas")
    parser.add_argument("--plan", action="store_true", help="print the checks and their seconds, and run none")
    parser.add_argument("--minutes", type=float, default=8.75, help="no check goes on for longer than this, in all")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gpu"))
    main(parser.parse_args())
