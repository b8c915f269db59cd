"""
How long does `trl-dpg mix` take for 20,000 samples, and how much nearer are their lengths to a target?

    python benchmarks/mix.py --tokenizer ~/.cache/trl-dpg/SmolLM2-135M-Instruct --output-dir runs/mix

The samples have three difficulties, and reasoning with log-normal lengths, of words of this repository's docs. The
command chooses 5,000 of them. Its time is that of a process of its own. A second run finds the samples in the
cache of datasets; `HF_DATASETS_CACHE` names another one.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path


MEDIANS = {"easy": 100, "medium": 200, "hard": 400}
"""Median of the reasoning in words, by difficulty."""
TARGET = {name: f"lognormal:{1.5 * median:g},0.4" for name, median in MEDIANS.items()}
DOCS = Path(__file__).parents[1] / "docs"


def write_samples(path: Path, number: int) -> None:
    """Samples with lengths of their own distribution, sigma 0.8."""
    rng = random.Random(0)
    words = re.findall(r"\S+", "\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))))
    beside = path.with_name(f"{path.name}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        for k in range(number):
            name = rng.choice(list(MEDIANS))
            length = max(round(MEDIANS[name] * rng.lognormvariate(0, 0.8)), 5)
            start = rng.randrange(len(words))
            reasoning = " ".join(words[(start + place) % len(words)] for place in range(length))
            row = {"prompt": f"What is {k} times {rng.randrange(100)}?", "completion": f"It is {k}."}
            row |= {"reasoning": reasoning, "difficulty": name, "finish_reason": "stop", "correct": k % 10 > 0}
            file.write(json.dumps(row) + "\n")
    os.replace(beside, path)


def main(args) -> None:
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    samples = folder / f"samples_{args.num_rows}.jsonl"
    if not samples.exists():
        write_samples(samples, args.num_rows)
    print(f"{args.num_rows} samples, {samples.stat().st_size / 1e6:.0f} MB")
    command = [sys.executable, "-m", "trl_dpg.cli", "mix", "--dataset_name", str(samples), "--overwrite"]
    command += ["--num_samples", str(args.num_rows // 4), "--target", json.dumps(TARGET)]
    for unit, tokenizer in (("words", []), ("tokens", ["--tokenizer", args.tokenizer])):
        if unit == "tokens" and args.tokenizer is None:
            continue
        output_dir = folder / unit
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        run = [*command, *tokenizer, *args.arguments, "--output_dir", str(output_dir)]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL, env=os.environ)
        seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        figures = json.loads((output_dir / "mix.json").read_text())
        old, new = (figures[when]["wasserstein"] for when in ("before", "after"))
        print(f"{unit}: {seconds:.1f} s, {cpu:.1f} CPU seconds; W1 {old:.3f} to {new:.4f} ({new / old - 1:+.1%})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rows", type=int, default=20_000)
    parser.add_argument("--tokenizer", help="path or Hub id; without it, only words are counted")
    parser.add_argument("--output-dir", default="runs/mix")
    parser.add_argument("arguments", nargs="*", help="further arguments of the command, after --")
    main(parser.parse_args())
