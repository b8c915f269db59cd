"""
How much faster do several ranks score one dataset, and what does each keep?

    python benchmarks/ranks.py
    python benchmarks/ranks.py --numbers 1 2 4 --kinds full --hidden 768 --batch 32

Each rank is a process with one thread, and all score the same dataset together over gloo. Each needs a free core.
Seconds are of `metagradient` without the metric, the median of the repetitions. Bytes are those of the inner loop's
states (θ, moments and gradients of all steps) on one rank. The last column is the relative L2 distance of the scores
from those of one rank.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from _side_by_side import add_arguments
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from trl_dpg import InnerLoopConfig, Student, metagradient
from trl_dpg.metagradients.fine_tuning import FineTuning
from trl_dpg.ranks import Ranks


HEADER = (
    "| student | T | budget | ranks | seconds | speed-up | states, MB | share | distance |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def make_student(args, kind: str) -> Student:
    torch.manual_seed(0)
    heads = dict(num_attention_heads=args.heads, num_key_value_heads=args.heads)
    size = dict(hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3, num_hidden_layers=args.layers)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=args.vocab, **size, **heads))
    lora = LoraConfig(r=args.rank, target_modules="all-linear") if kind == "lora" else None
    return Student(model, peft_config=lora)


def state_bytes(fine_tuning: FineTuning) -> int:
    """Bytes of the states that a rank keeps for the reverse sweep."""
    last = fine_tuning.sweep(torch.ones(len(fine_tuning.samples)), keep_states=True).last
    assert last is not None
    values = [value for step in last.steps for value in (step.theta, step.gradient, *step.state)]
    storages = [value.untyped_storage() for value in values if isinstance(value, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def join(args):
    """This rank's process group; `None` for a single rank."""
    torch.set_num_threads(1)
    if args.of == 1:
        return None
    address = f"tcp://127.0.0.1:{args.port}"
    dist.init_process_group("gloo", init_method=address, rank=args.index, world_size=args.of)
    return dist.group.WORLD


def work(args, kind: str, steps: int, budget: str) -> dict:
    """Seconds, bytes and scores of one rank."""
    group = join(args)
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"input_ids": torch.randint(0, args.vocab, (args.length,), generator=generator).tolist()}
        for _ in range(args.batch * steps)
    ]
    student = make_student(args, kind)
    direction = torch.randn(student.num_trainable, generator=generator)

    def metric(finetuned):
        return finetuned.theta @ direction / len(direction)

    memory = "auto" if budget == "kept" else 0
    settings = dict(learning_rate=args.learning_rate, betas=tuple(args.betas), eps=args.eps, eps_root=args.eps_root)
    config = InnerLoopConfig(batch_size=args.batch, max_length=args.length, memory_budget=memory, **settings)
    times = []
    for _ in range(args.repeat + 1):  # the first one is warm-up
        started = time.perf_counter()
        out = metagradient(student, samples, metric, config, metric_before=0.0, process_group=group)
        times.append(time.perf_counter() - started)
    kept = state_bytes(FineTuning(student, samples, config, Ranks(group)))
    return {"seconds": statistics.median(times[1:]), "bytes": kept, "scores": out.scores.tolist()}


def launch(script: str, number: int, flags: list[str]) -> list:
    """What each rank of a script has written. Every rank is a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, *flags, "--port", str(port), "--of", str(number), "--out", folder]
        processes = [subprocess.Popen([*command, "--index", str(k)]) for k in range(number)]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"A rank of {number} failed, see above.")
        return [json.loads((Path(folder) / f"{k}.json").read_text()) for k in range(number)]


def write(args, found) -> None:
    (Path(args.out) / f"{args.index}.json").write_text(json.dumps(found))


def add_rank_arguments(parser) -> None:
    """What `launch` tells each rank."""
    for name in ("--of", "--index", "--port"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)


def main(args) -> None:
    if args.cell:
        kind, steps, budget = args.cell
        write(args, work(args, kind, int(steps), budget))
        return
    print(HEADER, flush=True)
    for kind in args.kinds.split(","):
        for steps in args.steps.split(","):
            for budget in args.budgets:
                first = None
                for number in args.numbers:
                    found, *_ = launch(__file__, number, [*sys.argv[1:], "--cell", kind, steps, budget])
                    first = first or found
                    scores, expected = torch.tensor(found["scores"]), torch.tensor(first["scores"])
                    print(
                        f"| {kind} | {steps} | {budget} | {number} | {found['seconds']:.2f} "
                        f"| {first['seconds'] / found['seconds']:.2f} | {found['bytes'] / 1e6:.1f} "
                        f"| {found['bytes'] / first['bytes']:.3f} "
                        f"| {(scores - expected).norm() / expected.norm():.1e} |",
                        flush=True,
                    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 2], help="of ranks; the first is compared with")
    parser.add_argument("--budgets", nargs="+", default=["recomputed", "kept"], choices=("recomputed", "kept"))
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    add_rank_arguments(parser)
    add_arguments(parser, steps="1,4")
    main(parser.parse_args())
