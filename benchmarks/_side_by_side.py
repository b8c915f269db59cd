"""
Rivals that compute the same scores, side by side. Shared by `against_unrolling.py` and `against_bergson.py`.

Each rival runs in a process of its own, so that its peak memory is its own (and its packages may be). They run in
turns, one repetition of each after the other, so that a busy machine slows all of them alike.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import torch


WORKER = Path(__file__).with_name("_worker.py")
Measured = namedtuple("Measured", "seconds peak scores")


def add_arguments(parser, steps):
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kinds", default="lora,full")
    parser.add_argument("--steps", default=steps)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95))
    parser.add_argument("--eps", type=float, default=1e-8)
    parser.add_argument("--eps-root", type=float, default=1e-6)
    parser.add_argument("--checkpoint-interval", type=int, default=1, help="ours: steps between the states kept")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="ours: blocks are run again")


# -- the workers' half ------------------------------------------------------------------------------------------------


def serve(load):
    """
    Run whenever the parent asks, and answer with seconds, peak memory and scores.

    Args:
        load (`Callable`):
            `load(settings)` loads the model and returns `start`. `start(data)` takes token ids `[N, L]` and brings
            everything to its beginning, at no cost to the rival; it returns the function that is measured, which
            returns the scores `[N]`.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the replies
    settings = json.loads(sys.argv[-1])
    torch.set_num_threads(settings["threads"])
    data = torch.load(Path(settings["folder"], "data.pt"))
    start = load(settings)
    start(data[:1])()  # imports, kernels and thread pools: a single step of one sample
    replies.write("ready\n")
    for _ in sys.stdin:
        run = start(data)
        before = _reset_peak(settings["device"])
        started = time.perf_counter()
        scores = run()
        if settings["device"] == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = _peak(settings["device"]) - before
        replies.write(json.dumps(Measured(seconds, peak, scores.tolist())) + "\n")


def _reset_peak(device):
    """Bytes in use now, from which the peak is counted."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Linux's own high-water mark. getrusage's ru_maxrss would start at that of the parent and cannot be reset.
    Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


# -- the parent's half ------------------------------------------------------------------------------------------------


class Rival:
    """A worker process, from its command line."""

    def __init__(self, name, command, settings):
        self.name = name
        environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"])}
        if settings["device"] == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [*map(str, command), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )

    def reply(self):
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            raise SystemExit(f"{self.log.read()}\n{self.name} ended with exit code {code}, see above.")
        return line

    def run(self):
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return Measured(*json.loads(self.reply()))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def save_inputs(args, kind, steps, folder):
    """The start of every rival: the model, its adapters, and random token ids."""
    from metagradient_vs_sft import make_model  # the rival's environment has none of what it needs

    make_model(args, "full").save_pretrained(folder / "full")
    if kind == "lora":
        model = make_model(args, "lora")
        model.peft_config["default"].base_model_name_or_path = str(folder / "full")
        model.save_pretrained(folder / "lora")
    torch.save(torch.randint(0, args.vocab, (steps * args.batch, args.length)), folder / "data.pt")
    torch.save(torch.randint(0, args.vocab, (args.batch, args.length)), folder / "held_out.pt")


def measure(commands, settings, repeat):
    """
    Interleaved repetitions of all rivals: their seconds, their highest peak, their scores.

    Args:
        commands (`dict[str, list]`): The command line of each.
        settings (`dict`): What the workers are told.
        repeat (`int`): Repetitions.
    """
    rivals = [Rival(name, command, settings) for name, command in commands.items()]
    try:
        for rival in rivals:
            rival.reply()  # ready: no one warms up while another is timed
        runs = {rival.name: [] for rival in rivals}
        for _ in range(repeat):
            for rival in rivals:
                runs[rival.name].append(rival.run())
    finally:
        for rival in rivals:
            rival.close()
    return {
        name: Measured([r.seconds for r in rs], max(r.peak for r in rs), torch.tensor(rs[-1].scores).double())
        for name, rs in runs.items()
    }


HEADER = """\
| student | T | rival | recompute, s | retention, s | rival, s | recompute / rival | retention / rival \
| recompute, MB | retention, MB | rival, MB | recompute / rival | retention / rival \
| error of recompute | error of retention | Pearson |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def row(kind, steps, measured, name):
    """A row of the table: our two ways, `recompute` and `retention`, against the rival of that name."""
    ours, rival = (measured["recompute"], measured["retention"]), measured[name]
    seconds = [statistics.median(m.seconds) for m in (*ours, rival)]
    time_ratios = [statistics.median(a / b for a, b in zip(m.seconds, rival.seconds, strict=True)) for m in ours]
    errors = [(m.scores - rival.scores).norm() / rival.scores.norm() for m in ours]
    pearson = min(torch.corrcoef(torch.stack([m.scores, rival.scores]))[0, 1] for m in ours)
    cells = [kind, steps, name]
    cells += [f"{s:.2f}" for s in (*seconds, *time_ratios)]
    cells += [f"{m.peak / 1e6:.0f}" for m in (*ours, rival)] + [f"{m.peak / rival.peak:.2f}" for m in ours]
    cells += [f"{error:.1e}" for error in errors] + [f"{pearson:.6f}"]
    return f"| {' | '.join(map(str, cells))} |"


def describe(args):
    return (
        f"torch {torch.__version__}, {args.device}, {args.threads} threads; {args.layers} x {args.hidden}, vocabulary "
        f"{args.vocab},\nsequence {args.length}, {args.batch} samples a step, float32, eps_root {args.eps_root:g}; "
        f"medians of {args.repeat}\n"
    )
