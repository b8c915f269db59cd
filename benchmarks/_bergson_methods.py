"""Scores by bergson's commands for `attribution.py`; runs in bergson's own virtual environment."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np


EKFAC = ["--method", "kfac", "--hessian_cfg.ev_correction", "true", "--hessian_dtype", "fp32"]


def magic(settings):
    """bergson's MAGIC: the metagradient of the same fine-tuning."""
    import torch
    from _bergson_worker import load

    torch.set_num_threads(1)
    data = json.loads(Path(settings["folder"], "data.json").read_text())
    return load(settings)(data)().tolist()


def command(name, settings):
    """A pipeline of bergson's command line, on the gradients of the fine-tuned adapters. One score for each sample."""
    folder = Path(settings["folder"])
    run = folder / f"{name}_{settings['learning_rate']:g}"
    flags = [
        "--model",
        folder / settings["end"],
        "--data.dataset",
        folder / "samples.jsonl",
        "--token_batch_size",
        1024,
    ]
    flags += ["--query.dataset", folder / "queries.jsonl", "--query.aggregation", "mean", "--overwrite", "true"]
    extra = {"trackstar": ["--target_downweight_components", 100], "ekfac": EKFAC}[name]
    subprocess.run([sys.executable, "-m", "bergson", name, run, *map(str, [*flags, *extra])], check=True)
    from bergson.data import load_scores

    return np.asarray(load_scores(run / "scores")[:], dtype=float).reshape(-1).tolist()


def main():
    settings = json.loads(sys.argv[-1])
    name = settings["method"]
    scores = magic(settings) if name == "magic" else command(name, settings)
    Path(settings["folder"], f"{name}.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
