"""
How does a metagradient compare with bergson's MAGIC trainer?

`metagradient`, recomputing all (`memory_budget=0`) and retaining graphs (`"auto"`), against bergson's `Trainer.train`,
`compute_query_gradients` and `Trainer.backward`, called as its `magic` command calls them. Same weights (saved once,
loaded by both), data order, AdamW, loss (mean over the tokens of a batch) and metric: minus the loss on a held-out
batch. bergson's scores are derivatives of that loss itself, so they are multiplied by -1; no other factor lies between
the two.

Timed on both sides: the T steps from loaded weights with whatever is kept or saved of them (bergson writes checkpoints
into a temporary folder, see TMPDIR, and deletes all but the last), the metric of the fine-tuned model with its
gradient, and the scores; neither the metric at the start nor loading. bergson runs eager attention, its own choice.
Peak memory is counted from before the run, with the weights loaded and a one-step, one-sample run done; on the CPU it
is resident memory (Linux only), on CUDA what tensors take. The errors are relative L2 errors of our scores against
bergson's; the Pearson correlation is the lower of the two.

bergson needs its own virtual environment; `--setup` makes it, with the versions of torch, transformers and peft that
are installed here.

    python benchmarks/against_bergson.py --setup                    # once
    python benchmarks/against_bergson.py                            # reference model on the CPU
    python benchmarks/against_bergson.py --device cuda --hidden 2048 --layers 16 --vocab 128256
    python benchmarks/against_bergson.py --real --kinds lora --steps 4 --length 48  # SmolLM2, real paragraphs

With `--real`, the model is SmolLM2-135M-Instruct and the samples are paragraphs of the Declaration of Human Rights in
Spanish and English, cut off at `--length` tokens (`trl_dpg.declaration`, downloaded once). The metric reads Spanish
paragraphs. Paragraphs are of different lengths, and the loss of both sides is the mean over all tokens of a batch.
"""

import argparse
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path

from _side_by_side import HEADER, WORKER, add_arguments, describe, measure, row, save_inputs, save_real_inputs

from trl_dpg.declaration import MODEL


BERGSON = "bergson==2.5.1"


def setup(folder):
    venv.create(folder, with_pip=True)
    (folder / ".gitignore").write_text("*\n")
    pip = [folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # In one command with bergson: afterwards, its torchvision would replace torch by a newer one.
    pinned = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "transformers", "peft")]
    subprocess.run([*pip, "install", *pinned, BERGSON], check=True)
    # Text models use neither, and both fail on import beside another build of torch (a CPU one, say).
    subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio"], check=True)


def main(args):
    if args.setup:
        return setup(args.venv)
    if not args.venv.exists():
        sys.exit(f"There is no virtual environment {args.venv}: run with --setup first, or pass --venv.")
    print(describe(args, MODEL if args.real else None))
    print(HEADER)
    commands = {name: [sys.executable, WORKER, name] for name in ("recompute", "retention")}
    commands["bergson"] = [args.venv / "bin" / "python", WORKER.with_name("_bergson_worker.py")]
    for kind in args.kinds.split(","):
        for steps in map(int, args.steps.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                (save_real_inputs if args.real else save_inputs)(args, kind, steps, Path(folder))
                settings = vars(args) | {"kind": kind, "folder": folder, "venv": str(args.venv)}
                measured = measure(commands, settings, args.repeat)
            print(row(kind, steps, measured, "bergson"), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="create the virtual environment and exit")
    parser.add_argument("--venv", type=Path, default=Path(".venv-bergson"))
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M-Instruct and real paragraphs")
    parser.add_argument("--save-mode", default="sqrt", choices=("sqrt", "all", "log"), help="bergson's checkpoints")
    add_arguments(parser, steps="1,8")
    main(parser.parse_args())
