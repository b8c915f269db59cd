"""
Does the arithmetic of docs/scaling.md predict time and memory of several ranks, for growing N and P?

    python benchmarks/ranks_predicted.py
    python benchmarks/ranks_predicted.py --numbers 1 2 --kinds full --hidden 384

Each rank is a process with one thread, and all score the same dataset together over gloo, with nothing kept. Of the
first row of one rank, the seconds for each token and weight of the linear layers are taken. Of each number of ranks,
the seconds to exchange a number are measured once. With these, all rows are predicted: the share of the linear layers'
work, the share of the optimizer's work on vectors of P numbers, and 5 T P numbers that are exchanged. The seconds are
those of `metagradient`, medians of the repetitions:

- CPU seconds of the rank that computed the longest. They are measured for any number of ranks.
- Wall-clock seconds, only where every rank has a core of its own.

States are the inner loop's (θ, moments and gradients of all steps) on one rank. What is exchanged is counted in the
collectives. Where a cell has two numbers, the first is predicted and the second is measured.
"""

import argparse
import os
import statistics
import sys
import time
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from _side_by_side import add_arguments
from ranks import add_rank_arguments, join, launch, make_student, state_bytes, write

from trl_dpg import InnerLoopConfig, metagradient
from trl_dpg.metagradients.fine_tuning import FineTuning
from trl_dpg.ranks import Ranks


HEADER = (
    "| student | grows | N | P, million | ranks | CPU s | ratio | seconds | ratio | states, MB | exchanged, MB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
GROWTH = {"(first row)": (1, 1), "N": (2, 1), "N, further": (4, 1), "P": (1, 2), "N and P": (2, 2)}
"""Factors of the samples of a step, and of the width."""


def timed(function, repeat: int) -> tuple[float, float]:
    """Medians of CPU and wall-clock seconds."""
    found = []
    for _ in range(repeat):
        cpu, wall = time.process_time(), time.perf_counter()
        function()
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return tuple(map(statistics.median, zip(*found, strict=True)))


@contextmanager
def counted():
    """A list of the bytes of all vectors and scalars that this process exchanges."""
    sizes = []

    def wrapped(collective):
        def call(tensor, *args, **kwargs):
            sizes.append(tensor.nbytes)
            return collective(tensor, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in ("reduce", "broadcast", "all_reduce"):
            stack.enter_context(mock.patch.object(dist, name, wrapped(getattr(dist, name))))
        yield sizes


def first_numbers(finetuned):
    """A metric that costs nothing."""
    return finetuned.theta[:1000].sum()


def inner_loop(args, batch: int) -> InnerLoopConfig:
    settings = dict(learning_rate=args.learning_rate, betas=tuple(args.betas), eps=args.eps, eps_root=args.eps_root)
    return InnerLoopConfig(
        batch_size=batch, max_length=args.length, memory_budget=0, checkpoint_interval=1, **settings
    )


def vector_seconds(args, size: int) -> float:
    """CPU seconds of the optimizer and its derivative for each number and step."""
    theta, gradient, bar, out = (torch.randn(size) for _ in range(4))
    optimizer = inner_loop(args, 1).make_optimizer()
    state, state_bar = optimizer.init(theta), optimizer.init(theta)

    def step():
        _, after = optimizer.update(gradient, state, theta, 1e-4)
        optimizer.vjp(gradient, state, after, 1e-4, bar, state_bar, out=out)

    step()
    return timed(step, 5)[0] / size


def exchange_seconds(ranks: Ranks, size: int) -> list[float]:
    """CPU and wall-clock seconds to exchange a number: half a reduce-scatter and half an all-gather of `size`."""
    if ranks.alone:
        return [0.0, 0.0]

    def exchange():
        ranks.gather(ranks.sum_shards(torch.ones(size)), size)

    with ranks.guard("The exchange"):
        exchange()
        return [seconds / 2 / size for seconds in timed(exchange, 5)]


def measure(args, group, kind: str, factors: tuple[int, int]) -> dict:
    """One row, on one rank."""
    wide = argparse.Namespace(**vars(args) | {"hidden": args.hidden * factors[1]})
    student, batch, steps = make_student(wide, kind), args.batch * factors[0], int(args.steps)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, args.vocab, (batch * steps, args.length), generator=generator)
    samples = [{"input_ids": row} for row in ids.tolist()]
    config = inner_loop(args, batch)

    def run():
        metagradient(student, samples, first_numbers, config, metric_before=0.0, process_group=group)

    with counted() as sizes:  # a warm-up, too
        run()
    cpu, wall = timed(run, args.repeat)
    states = state_bytes(FineTuning(student, samples, config, Ranks(group)))
    layer = 4 * wide.hidden**2 + 3 * wide.hidden * (wide.hidden * 8 // 3)
    weights = args.layers * layer + wide.hidden * args.vocab
    numbers = {"P": student.num_trainable, "N": len(samples), "work": ids.numel() * weights}
    return numbers | {"cpu": cpu, "wall": wall, "states": states, "exchanged": sum(sizes)}


def work(args) -> dict:
    """All rows of one rank, and what an operation on a vector takes."""
    group = join(args)
    size = make_student(args, "full").num_trainable
    rows = [measure(args, group, kind, factors) for kind in args.kinds.split(",") for factors in GROWTH.values()]
    return {"rows": rows, "vector": vector_seconds(args, size), "exchange": exchange_seconds(Ranks(group), size)}


def predict(row, first, vector: float, exchange: list[float], number: int, steps: int) -> SimpleNamespace:
    """
    Args:
        row (`dict`): N, P and the linear layers' work.
        first (`dict`): The first row of this student on one rank, with its measured CPU and wall-clock seconds.
        vector (`float`), exchange (`list[float]`): Seconds for each number, see `vector_seconds`, `exchange_seconds`.
        number (`int`), steps (`int`): R and T.
    """
    numbers = 5 * steps * row["P"] * (number > 1)
    seconds = []
    for clock, seconds_each in zip(("cpu", "wall"), exchange, strict=True):
        each = (first[clock] - vector * steps * first["P"]) / first["work"]
        seconds.append((each * row["work"] + vector * steps * row["P"]) / number + seconds_each * numbers)
    return SimpleNamespace(
        cpu=seconds[0], wall=seconds[1], states=16 * row["P"] * steps / number, exchanged=4 * numbers
    )


def line(kind: str, what: str, number: int, row, expected) -> str:
    cells = [kind, what, row["N"], f"{row['P'] / 1e6:.2f}", number]
    for clock in ("cpu", "wall"):
        predicted, found = getattr(expected, clock), row[clock]
        shown = clock == "cpu" or number <= (os.cpu_count() or 1)
        cells += [f"{predicted:.2f}, {found:.2f}", f"{predicted / found:.2f}"] if shown else ["-", "-"]
    cells += [f"{getattr(expected, name) / 1e6:.1f}, {row[name] / 1e6:.1f}" for name in ("states", "exchanged")]
    return f"| {' | '.join(map(str, cells))} |"


def main(args) -> None:
    if args.of:
        write(args, work(args))
        return
    print(f"torch {torch.__version__}, 1 thread a rank; {args.layers} layers, width {args.hidden}, vocabulary")
    print(
        f"{args.vocab}, sequence {args.length}, T = {args.steps}, float32; medians of {args.repeat}\n\n{HEADER}",
        flush=True,
    )
    alone, notes = None, []
    for number in args.numbers:
        found = launch(__file__, number, sys.argv[1:])
        alone = alone or found[0]
        exchange = [max(rank["exchange"][k] for rank in found) for k in (0, 1)]
        if number > 1:
            notes.append(
                f"{number} ranks: {exchange[0] * 1e9:.1f} CPU ns, {exchange[1] * 1e9:.1f} ns to exchange a number"
            )
        names = [(kind, what) for kind in args.kinds.split(",") for what in GROWTH]
        for index, (kind, what) in enumerate(names):
            ranks = [rank["rows"][index] for rank in found]
            row = ranks[0] | {clock: max(rank[clock] for rank in ranks) for clock in ("cpu", "wall", "states")}
            first = alone["rows"][index - index % len(GROWTH)]
            expected = predict(row, first, alone["vector"], exchange, number, int(args.steps))
            print(line(kind, what, number, row, expected), flush=True)
    print(f"\nOptimizer: {alone['vector'] * 1e9:.1f} CPU ns for each number and step.", *notes, sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 2, 4], help="of ranks; predictions are from 1")
    add_rank_arguments(parser)
    add_arguments(parser, steps="2")
    parser.set_defaults(hidden=192, layers=4, vocab=2048, length=64)
    main(parser.parse_args())
