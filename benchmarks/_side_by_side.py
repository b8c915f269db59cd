"""
Rivals that compute the same scores, side by side. Shared by `against_unrolling.py` and `against_bergson.py`.

Each rival runs in a process of its own, so that its peak memory is its own (and its packages may be). They run in
turns, one repetition of each after the other, so that a busy machine slows all of them alike.
"""

import json
import os
import re
import resource
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


def add_model_arguments(parser, steps):
    """The reference model, its samples, and how it is timed."""
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
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--cpu-seconds", action="store_true", help="seconds in which a core computed; others may work")


def add_arguments(parser, steps):
    """The same, and the settings of the rivals' inner loop."""
    add_model_arguments(parser, steps)
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
            `load(settings)` loads the model and returns `start`. `start(data)` takes the token ids of N samples and
            brings everything to its beginning, at no cost to the rival; it returns the function that is measured,
            which returns the scores `[N]`.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the replies
    settings = json.loads(sys.argv[-1])
    torch.set_num_threads(settings["threads"])
    data = json.loads(Path(settings["folder"], "data.json").read_text())
    clock = cpu_seconds if settings["cpu_seconds"] else time.perf_counter
    start = load(settings)
    start(data[:1])()  # imports, kernels and thread pools: a single step of one sample
    replies.write("ready\n")
    for _ in sys.stdin:
        run = start(data)
        before = _reset_peak(settings["device"])
        started = clock()
        scores = run()
        if settings["device"] == "cuda":
            torch.cuda.synchronize()
        seconds = clock() - started
        peak = _peak(settings["device"]) - before
        replies.write(json.dumps(Measured(seconds, peak, scores.tolist())) + "\n")


def cpu_seconds():
    """User seconds of all threads of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


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
        save_adapters(make_model(args, "lora"), folder)
    for name, number in (("data", steps * args.batch), ("held_out", args.batch)):
        save_ids(torch.randint(0, args.vocab, (number, args.length)).tolist(), name, folder)


def save_real_inputs(args, kind, steps, folder):
    """SmolLM2 and paragraphs of the Declaration of Human Rights: half Spanish, half English; held out are Spanish."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_dpg.declaration import declaration_world

    world = folder / "world"
    world.mkdir()
    declaration_world(world)
    (folder / "full").symlink_to((world / "student").resolve(), target_is_directory=True)
    if kind == "lora":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder / "full", dtype=torch.float32)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        save_adapters(get_peft_model(model, lora), folder)

    tokenizer = AutoTokenizer.from_pretrained(folder / "full")
    spanish, english, benchmark = (
        [json.loads(line)["text"] for line in (world / f"{name}.jsonl").read_text().splitlines()]
        for name in ("held_out", "held_out_english", "benchmark")
    )
    mixed = [text for pair in zip(spanish, english, strict=True) for text in pair]
    for name, texts, number in (("data", mixed, steps * args.batch), ("held_out", benchmark, args.batch)):
        if number > len(texts):
            raise SystemExit(f"There are {len(texts)} paragraphs for {number} samples: use fewer --steps or --batch.")
        save_ids([tokenizer(text).input_ids[: args.length] for text in texts[:number]], name, folder)


def save_adapters(model, folder):
    model.peft_config["default"].base_model_name_or_path = str(folder / "full")
    model.save_pretrained(folder / "lora")


def save_ids(ids, name, folder):
    (folder / f"{name}.json").write_text(json.dumps(ids))


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
        for rival in rivals:  # no one warms up while another is timed
            while rival.reply() != "ready\n":  # what its packages print when they are imported comes before
                pass
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
    cells += [f"{error:.1e}" for error in errors] + [f"{pearson:.8f}"]
    return f"| {' | '.join(map(str, cells))} |"


def describe(args, model=None):
    model = model or f"{args.layers} x {args.hidden}, vocabulary {args.vocab}"
    seconds = "user seconds of the CPU, " if args.cpu_seconds else ""
    return (
        f"torch {torch.__version__}, {args.device}, {args.threads} threads; {model},\nsequence {args.length}, "
        f"{args.batch} samples a step, float32, learning rate {args.learning_rate:g}, eps_root {args.eps_root:g}; "
        f"{seconds}medians of {args.repeat}\n"
    )
