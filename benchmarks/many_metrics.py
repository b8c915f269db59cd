"""
What do ten metrics cost, over one metric and over ten calls?

Seconds of `metagradient`: medians of interleaved repetitions in one process, with metrics that cost nothing. The ten
calls are ten times the seconds of one. Model and flags are those of `metagradient_vs_sft.py`.

    python benchmarks/many_metrics.py
    python benchmarks/many_metrics.py --threads 1 --cpu-seconds --kinds lora --steps 8 --repeat 5
"""

import argparse
import statistics

import torch
from _side_by_side import add_model_arguments
from metagradient_vs_sft import make_model, timed

from trl_dpg import InnerLoopConfig, Student, metagradient


def make_metrics(number):
    """Metrics that cost nothing: sums of some trained parameters each."""
    return {f"metric {k}": lambda student, k=k: student.theta[1000 * k : 1000 * (k + 1)].sum() for k in range(number)}


def main(args):
    torch.set_num_threads(args.threads)
    size = f"{args.layers} x {args.hidden}, vocabulary {args.vocab}"
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads; {size},")
    print(
        f"sequence {args.length}, {args.batch} samples a step, float32; {args.number} metrics; {args.repeat} times\n"
    )
    print("| student | T | graphs | one metric, s | all / one | all / calls |")
    print("|---|---|---|---|---|---|")
    for kind in args.kinds.split(","):
        student = Student(make_model(args, kind))
        for steps in map(int, args.steps.split(",")):
            rows = torch.randint(0, args.vocab, (steps * args.batch, args.length)).tolist()
            for budget in args.budgets.split(","):
                compare(args, kind, student, [{"input_ids": row} for row in rows], steps, budget)


def compare(args, kind, student, samples, steps, budget):
    config = InnerLoopConfig(
        batch_size=args.batch,
        learning_rate=1e-6,
        memory_budget="auto" if budget == "kept" else 0,
        attribution=args.attribution,
    )
    metrics = make_metrics(args.number)

    def one(samples=samples):
        metagradient(student, samples, metrics["metric 0"], config, metric_before=0.0)

    def together(samples=samples):
        metagradient(student, samples, metrics, config, metric_before=dict.fromkeys(metrics, 0.0))

    for function in (one, together):  # imports and thread pools
        function(samples[: args.batch])
    seconds = [(timed(one, args), timed(together, args)) for _ in range(args.repeat)]
    ratio = statistics.median(b / a for a, b in seconds)
    alone = statistics.median(a for a, _ in seconds)
    print(f"| {kind} | {steps} | {budget} | {alone:.2f} | {ratio:.2f} | {ratio / args.number:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, steps="1,8")
    parser.add_argument("--number", type=int, default=10, help="of metrics")
    parser.add_argument("--budgets", default="kept,recomputed", help="whether graphs are kept")
    parser.add_argument("--attribution", default="metagradient", choices=("metagradient", "first_order"))
    main(parser.parse_args())
