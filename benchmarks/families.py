"""
Does data that was made for two families of students help a third one more than data made for one of them?

    python benchmarks/families.py --output-dir runs/families_benchmark

For each seed, the toy world `families` is made anew, and the generator is trained for `llama` alone, for `gpt2` alone,
and for both, by the mean of their scores and by the lowest. Each trained generator then writes new texts, and fresh
students of all three families are trained on them by stock SFTTrainer. `neox` was never seen by a generator. The
gain is Φ, minus the loss in language B, after the fine-tuning minus before. `--no-dialects`: the generator knows no
dialects of B, so families differ in tokens and architecture alone. One thread; all figures in `figures.json`.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from datasets import disable_progress_bars, load_dataset
from transformers.utils import logging

from trl_dpg import DPGConfig, DPGTrainer, InnerLoopConfig, Student, toy
from trl_dpg.evaluation import evaluate_dataset, generate_texts, load_generator, metric_before
from trl_dpg.metrics import LanguageModelingMetric


MADE_FOR = {
    "untrained": None,
    "llama": (["llama"], "mean"),
    "gpt2": (["gpt2"], "mean"),
    "both, mean": (["llama", "gpt2"], "mean"),
    "both, worst": (["llama", "gpt2"], "worst"),
}
STUDENTS = ("llama", "gpt2", "neox")
HELD_OUT = "neox"
QUIET = dict(report_to="none", save_strategy="no", bf16=False, disable_tqdm=True, gradient_checkpointing=False)


def rows(world: Path, name: str):
    return load_dataset("json", data_files=str(world / f"{name}.jsonl"), split="train")


def train(world: Path, folder: Path, students: list[str], aggregation: str, metric, args, seed: int) -> None:
    """Train the world's generator for some students, and save it."""
    config = DPGConfig(
        str(folder),
        student_models=[str(world / name) for name in students],
        student_aggregation=aggregation,
        student_batch_size=args.num_completions,
        student_learning_rate=1e-3,
        student_eps_root=1e-5,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.num_completions,
        num_generations=8,
        max_completion_length=8,
        lr_scheduler_type="constant",
        seed=seed,
        logging_steps=args.steps,
        **QUIET,
    )
    trainer = DPGTrainer(
        str(world / "generator"), target_metric=metric, args=config, train_dataset=rows(world, "prompts")
    )
    trainer.train()
    trainer.save_model(str(folder))


def shares(texts: list[str]) -> dict[str, float]:
    """Shares of the words that are B's, its capitals, its accents and A's."""
    words = [word for text in texts for word in text.split()]
    known = {"A": set(toy.LANGUAGE_A), "B": set(toy.LANGUAGE_B), "capitals": {word.upper() for word in toy.LANGUAGE_B}}
    found = {name: sum(word in own for word in words) / max(1, len(words)) for name, own in known.items()}
    return found | {"accents": sum(not word.isascii() for word in words) / max(1, len(words))}


def judge(world: Path, path: str, metric, args, seed: int) -> dict:
    """The gains of fresh students on new texts of a generator, and the words of the texts."""
    model, tokenizer = load_generator(path)
    prompts = list(rows(world, "prompts")["prompt"])[: args.num_texts]
    texts = generate_texts(model, tokenizer, prompts, 8, seed=1000 + seed)
    config = InnerLoopConfig(learning_rate=3e-3, eps_root=1e-9, batch_size=32)
    gains = {}
    for name in STUDENTS:
        before = metric_before(Student(str(world / name)), metric)
        after = evaluate_dataset(lambda name=name: Student(str(world / name)), texts, metric, config, seed).metric
        gains[name] = after - before
    return {"gain": gains, "words": shares(texts)}


def main(args) -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.disable_progress_bar()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, dict] = {}
    for seed in args.seeds:
        world = folder / f"world_{seed}"
        toy.families_world(world, seed, dialects=args.dialects)
        metric = LanguageModelingMetric(rows(world, "benchmark"))
        for name, made_for in MADE_FOR.items():
            path = world / "generator"
            if made_for is not None:
                path = folder / f"{name.replace(', ', '_')}_{seed}"
                train(world, path, *made_for, metric, args, seed)
            figures.setdefault(name, {})[seed] = own = judge(world, str(path), metric, args, seed)
            words = ", ".join(f"{kind} {share:.0%}" for kind, share in own["words"].items())
            gains = ", ".join(f"{student} {gain:.3f}" for student, gain in own["gain"].items())
            print(f"seed {seed}, made for {name}: gain of {gains}; words: {words}", flush=True)
            (folder / "figures.json").write_text(json.dumps({"settings": vars(args), "figures": figures}, indent=2))
    print("\n| made for | " + " | ".join(f"gain of {name}" for name in STUDENTS) + f" | {HELD_OUT} by seed |")
    print("|---" * (2 + len(STUDENTS)) + "|")
    for name, seeds in figures.items():
        means = [statistics.mean(own["gain"][student] for own in seeds.values()) for student in STUDENTS]
        each = ", ".join(f"{own['gain'][HELD_OUT]:.3f}" for own in seeds.values())
        print(f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in means) + f" | {each} |")
    for name in ("both, mean", "both, worst"):
        gains = [{own: figures[own][seed]["gain"][HELD_OUT] for own in MADE_FOR} for seed in args.seeds]
        wins = [own[name] > max(own["llama"], own["gpt2"]) for own in gains]
        print(f"{name}: more for {HELD_OUT} than data for either one in {sum(wins)} of {len(wins)} seeds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="runs/families_benchmark")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40, help="steps of each generator")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the generators")
    parser.add_argument("--num-completions", type=int, default=128, help="completions of a step")
    parser.add_argument("--num-texts", type=int, default=256, help="new texts for the fresh students")
    parser.add_argument("--no-dialects", dest="dialects", action="store_false")
    main(parser.parse_args())
