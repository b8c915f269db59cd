r"""
What do ten metrics cost, over one metric and over ten calls?

Seconds of `metagradient`: medians of interleaved repetitions in one process, with metrics that cost nothing. The ten
calls are ten times the seconds of one. Model and flags are those of `metagradient_vs_sft.py`. With `--real`, the
student is SmolLM2-135M-Instruct, and each metric is language modelling on ten paragraphs, cut off like a sample.

    python benchmarks/many_metrics.py
    python benchmarks/many_metrics.py --threads 1 --cpu-seconds --kinds lora --steps 8 --repeat 5
    python benchmarks/many_metrics.py --real --number 5 --kinds lora --steps 1 --budgets kept --rank 8 --length 32 \
        --batch 200 --micro-batch 10 --threads 1 --cpu-seconds --repeat 2
"""

import argparse
import statistics
import tempfile
from itertools import cycle, islice

import torch
from _side_by_side import add_model_arguments
from metagradient_vs_sft import make_model, real_world, timed

from trl_dpg import InnerLoopConfig, Student, metagradient
from trl_dpg.metrics import LanguageModelingMetric


def make_metrics(number):
    """Metrics that cost nothing: sums of some trained parameters each."""
    return {f"metric {k}": lambda student, k=k: student.theta[1000 * k : 1000 * (k + 1)].sum() for k in range(number)}


def make_real_metrics(args, paragraphs):
    return {
        f"metric {k}": LanguageModelingMetric(paragraphs[10 * k : 10 * k + 10], max_length=args.length)
        for k in range(args.number)
    }


def main(args):
    torch.set_num_threads(args.threads)
    size = "SmolLM2-135M-Instruct" if args.real else f"{args.layers} x {args.hidden}, vocabulary {args.vocab}"
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads; {size},")
    print(
        f"sequence {args.length}, {args.batch} samples a step, float32; {args.number} metrics; {args.repeat} times\n"
    )
    print("| student | T | graphs | one metric, s | all / one | all / calls |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder, ids = real_world(temporary) if args.real else (None, [])
        paragraphs = [{"input_ids": own} for own in ids]
        metrics = make_real_metrics(args, paragraphs) if args.real else make_metrics(args.number)
        for kind in args.kinds.split(","):
            student = Student(make_model(args, kind, folder))
            for steps in map(int, args.steps.split(",")):
                size = steps * args.batch, args.length
                rows = islice(cycle(ids), size[0]) if args.real else torch.randint(0, args.vocab, size).tolist()
                samples = [{"input_ids": row[: args.length]} for row in rows]
                for budget in args.budgets.split(","):
                    compare(args, kind, student, samples, metrics, steps, budget)


def compare(args, kind, student, samples, metrics, steps, budget):
    config = InnerLoopConfig(
        batch_size=args.batch,
        micro_batch_size=args.micro_batch,
        learning_rate=1e-6,
        memory_budget="auto" if budget == "kept" else 0,
        attribution=args.attribution,
    )

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
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M-Instruct, and metrics of real texts")
    parser.add_argument("--micro-batch", type=int, help="samples of a micro-batch; by default a whole step")
    parser.add_argument("--budgets", default="kept,recomputed", help="whether graphs are kept")
    parser.add_argument("--attribution", default="metagradient", choices=("metagradient", "first_order"))
    main(parser.parse_args())
