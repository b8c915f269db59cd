"""
How does the cost of a metagradient grow with the dataset, the inner loop, the model's width and the sequence?

Seconds of `metagradient` (recomputing all, without the metric), one setting changed at a time from the smallest:
medians of repetitions in one process. The last column is the cost for each token and each weight of the linear layers,
relative to the first row: 1 where time grows as the arithmetic does.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --device cuda --hidden 1024 --layers 16
"""

import argparse
import statistics

import torch
from _side_by_side import add_arguments
from metagradient_vs_sft import head_sum, make_model, timed

from trl_dpg import InnerLoopConfig, Student, metagradient


def measure(args, num_samples):
    student = Student(make_model(args, args.kinds))
    data = torch.randint(0, args.vocab, (num_samples, args.length))
    samples = [{"input_ids": row} for row in data.tolist()]
    config = InnerLoopConfig(batch_size=args.batch, learning_rate=1e-6, memory_budget=0)
    run = lambda: metagradient(student, samples, head_sum, config, metric_before=0.0)  # noqa: E731
    seconds = statistics.median([timed(run, args) for _ in range(args.repeat + 1)][1:])
    layer = 4 * args.hidden**2 + 3 * args.hidden * (args.hidden * 8 // 3)
    return seconds, data.numel() * (args.layers * layer + args.hidden * args.vocab)


def main(args):
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads; {args.layers} layers, {args.kinds},")
    print(f"vocabulary {args.vocab}, float32; medians of {args.repeat}\n")
    print("| what grows | N | T | width | sequence | seconds | seconds / arithmetic |\n|---|---|---|---|---|---|---|")
    first = None
    base = {"num_samples": 8, "batch": 8, "hidden": args.hidden, "length": args.length}
    rows = [("", {})]
    rows += [("N at T = 1", {"num_samples": n, "batch": n}) for n in (16, 32)]
    rows += [("N, T = N / 8", {"num_samples": n}) for n in (16, 32, 64)]
    rows += [("width", {"hidden": factor * args.hidden}) for factor in (2, 4)]
    rows += [("sequence", {"length": factor * args.length}) for factor in (2, 4)]
    for name, changes in rows:
        setting = base | changes
        num_samples = setting.pop("num_samples")
        seconds, work = measure(argparse.Namespace(**vars(args) | setting), num_samples)
        first = first or seconds / work
        cells = name, num_samples, num_samples // setting["batch"], setting["hidden"], setting["length"]
        print(f"| {' | '.join(map(str, cells))} | {seconds:.2f} | {seconds / work / first:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps="")
    parser.set_defaults(kinds="lora", hidden=192, heads=6, length=64)
    main(parser.parse_args())
