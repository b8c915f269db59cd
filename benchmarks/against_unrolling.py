"""
What does a metagradient save over differentiating through the unrolled fine-tuning?

`metagradient`, recomputing all (`memory_budget=0`) and retaining graphs (`"auto"`), against one autograd graph over
the same T AdamW steps: with torchopt's differentiable AdamW (`pip install torchopt`), and by hand in plain PyTorch as
the `higher` package does it, both with the math attention kernel. Same weights, data, AdamW, float32 and metric: minus
the loss on a held-out batch.

Timed on every side: the T steps from loaded weights, the metric of the fine-tuned model and the scores; not the metric
at the start. Peak memory is counted from before the run, with the weights loaded and a one-step, one-sample run done;
on the CPU it is resident memory (Linux only), on CUDA what tensors take. The errors are relative L2 errors of our
scores against the rival's; the Pearson correlation is the lower of the two.

    python benchmarks/against_unrolling.py                          # reference model on the CPU
    python benchmarks/against_unrolling.py --device cuda --hidden 2048 --layers 16 --vocab 128256
"""

import argparse
import sys
import tempfile
from pathlib import Path

from _side_by_side import HEADER, WORKER, add_arguments, describe, measure, row, save_inputs


def main(args):
    print(describe(args))
    print(HEADER)
    rivals = args.rivals.split(",")
    for kind in args.kinds.split(","):
        for steps in map(int, args.steps.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                save_inputs(args, kind, steps, Path(folder))
                commands = {name: [sys.executable, WORKER, name] for name in ("recompute", "retention", *rivals)}
                measured = measure(commands, vars(args) | {"kind": kind, "folder": folder}, args.repeat)
            for name in rivals:
                print(row(kind, steps, measured, name), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", default="torchopt,by hand")
    add_arguments(parser, steps="8")
    main(parser.parse_args())
