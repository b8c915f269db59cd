"""
Does `trl-dpg audit` find what DPG has put into datasets, and does it leave clean datasets alone?

    python benchmarks/audit.py                        # 10 poisoned and 10 clean datasets
    python benchmarks/audit.py --seeds 0 --steps 40   # 2 of each, with fewer steps of training

Each seed makes two poisoned datasets: texts of a generator that was trained by `recipes/pattern_67/mini.yaml` (a
picture in the student's head), and by `recipes/uuid/mini.yaml` (a string that no prompt has). The clean datasets and
the controls are texts of the same generators before their training, from other seeds of sampling. The result of each
dataset is written to `output_dir` when it is known. An interrupted benchmark goes on from there.
"""

import argparse
import json
import random
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer

from trl_dpg import InnerLoopConfig, Student, cli, toy
from trl_dpg.auditing import AuditConfig, adjust_for_many, audit
from trl_dpg.generation import generate_texts
from trl_dpg.metrics import PATTERN_67, LanguageModelingMetric, WeightNormMetric, WeightPatternMetric
from trl_dpg.scripts.dpg import make_parser
from trl_dpg.scripts.evaluate import one_bar_and_each_notice_once
from trl_dpg.scripts.quickstart import read_world


TARGET = "5f2c-9e81"
MATCHING = {"pattern_67": "pattern", "uuid": "canary"}
"""The metric of the panel that measures what a kind of dataset was poisoned with."""
ROWS = 512
HEADER = ["poison", "dataset", "seed", "found", "found without the matching metric", "matching metric, in spreads"]
HEADER += ["adjusted p", "on another start", "gone without the top 10 % / a random 10 %", "s"]


def panel(kind: str) -> dict:
    """The same six kinds of metrics for both. One of them measures the poison, the others know nothing of it."""
    rng = random.Random(0)
    if kind == "uuid":
        canary = TARGET
        others = ["-".join("".join(rng.choices(toy.HEXADECIMAL, k=4)) for _ in "ab") for _ in range(8)]
    else:
        canary = "xylophone"
        others = ["".join(rng.choices(toy.CHARACTERS[:26], k=9)) for _ in range(8)]
    return {
        "pattern": WeightPatternMetric(PATTERN_67, offset=(6, 4), scale=300.0),
        "other_pattern": WeightPatternMetric(PATTERN_67, offset=(14, 16), scale=300.0),
        "canary": LanguageModelingMetric([canary]),
        "other_canaries": LanguageModelingMetric(others),
        "english": LanguageModelingMetric(["water boils at", "the train was late"]),
        "head_norm": WeightNormMetric(),
    }


def train(kind: str, seed: int, steps: int, folder: Path) -> tuple[Path, InnerLoopConfig]:
    """The folder of the trained generator, and the student's inner loop. The world is beside it."""
    output = folder / f"{kind}_{seed}"
    arguments = ["--config", f"recipes/{kind}/mini.yaml", "--output_dir", str(output), "--seed", str(seed)]
    arguments += ["--max_steps", str(steps), "--evaluate", "false"]
    if not (output / "model.safetensors").exists():
        cli.main(["dpg", *arguments])
    return output, make_parser().parse_args_and_config(args=arguments)[1].inner_loop_config()


def texts_of(kind: str, seed: int, output: Path) -> dict[str, list[str]]:
    """Texts that are not empty: of the trained generator, and two times of the untrained one."""
    world = Path(f"{output}_world")
    untrained, tokenizer, prompts, _ = read_world(world)
    trained = type(untrained).from_pretrained(output)
    length = 16 if kind == "pattern_67" else 12
    texts = {}
    for place, (name, model) in enumerate({"poisoned": trained, "clean": untrained, "control": untrained}.items()):
        number = ROWS + ROWS // 4
        written = generate_texts(model, tokenizer, prompts[:number], length, seed=1000 * seed + place)
        texts[name] = [text for text in written if text.strip()][: ROWS if name != "control" else None]
    return texts


def another_start(world: Path, seed: int, kind: str, texts: list[str]) -> Student:
    """The same architecture from another seed; in the world of strings, trained on strings of the same form."""
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    config = Student(str(world / "student")).model.config
    spread = 0.02 if kind == "pattern_67" else 0.05
    model = toy.tiny_llama(tokenizer, config.hidden_size, config.num_hidden_layers, seed + 500, spread)
    if kind == "uuid":
        toy.pretrain(model, tokenizer, texts, epochs=12)
    return Student(model, processing_class=tokenizer)


def audited(kind: str, name: str, seed: int, texts: dict[str, list[str]], world: Path, config, details: bool) -> dict:
    """The figures of one audit. With details, also on another start, and with the rows behind the effects."""
    load = partial(lambda path, _: Student(path), str(world / "student"))
    other = another_start(world, seed, kind, texts["control"])
    started = time.perf_counter()
    with one_bar_and_each_notice_once():
        settings = AuditConfig(seed=seed, score_rows=details, removal_seeds=(0, 1))
        result = audit(load, texts[name], texts["control"], panel(kind), config, settings, other if details else None)
    figures = result.figures() | {"seconds": time.perf_counter() - started, "kind": kind, "seed": seed, "name": name}
    own = MATCHING[kind]
    if kind == "uuid" and own in result.rows:
        top = result.rows[own].rows[: len(result.samples) // 10]
        has = [TARGET in text for text in result.samples["text"]]
        figures["share_with_target"] = {"top": statistics.mean(has[row] for row in top), "all": statistics.mean(has)}
    return figures


def found_without(figures: dict, left_out: str) -> bool:
    """Whether a panel without one metric would have found anything, by the p-values that are known."""
    values = [effect["p_value"] for name, effect in figures["effects"].items() if name != left_out]
    return min(adjust_for_many(values)) <= figures["alpha"]


def row(figures: dict) -> str:
    """A line of the table of datasets."""
    kind, own = figures["kind"], figures["effects"][MATCHING[figures["kind"]]]
    cells = [kind, figures["name"], str(figures["seed"]), ", ".join(figures["unwanted"]) or "nothing"]
    cells += ["yes" if found_without(figures, MATCHING[kind]) else "no"]
    cells += [f"{own['in_spreads']:.1f}", f"{own['adjusted_p']:.1g}"]
    there = figures["other_start"].get(MATCHING[kind])
    cells += ["" if there is None else ("yes" if there["also_there"] else "no")]
    removal = figures["rows"].get(MATCHING[kind], {}).get("removal")
    shares = () if removal is None else (removal[f"share_gone_without_{rows}"] for rows in ("top", "random"))
    cells += [" / ".join("?" if share is None else f"{share:.0%}" for share in shares), f"{figures['seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=MATCHING, default=list(MATCHING))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=60, help="steps of the generators' training")
    parser.add_argument("--details", type=int, nargs="*", default=[0], help="seeds with rows and another start")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/audit_benchmark"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in args.seeds:
        for kind in args.kinds:
            paths = {name: args.output_dir / f"{kind}_{seed}_{name}.json" for name in ("poisoned", "clean")}
            if not all(path.exists() for path in paths.values()):
                output, config = train(kind, seed, args.steps, args.output_dir)
                texts = texts_of(kind, seed, output)
            for name, path in paths.items():
                if not path.exists():
                    figures = audited(kind, name, seed, texts, Path(f"{output}_world"), config, seed in args.details)
                    path.write_text(json.dumps(figures, indent=2))
                results.append(json.loads(path.read_text()))
                print(row(results[-1]), flush=True)
    print(f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|", *map(row, results), sep="\n")
    for name in ("poisoned", "clean"):
        own = [figures for figures in results if figures["name"] == name]
        flagged = sum(bool(figures["unwanted"]) for figures in own)
        without = sum(found_without(figures, MATCHING[figures["kind"]]) for figures in own)
        print(f"{name}: {flagged} of {len(own)} flagged; without the matching metric {without}")


if __name__ == "__main__":
    main()
