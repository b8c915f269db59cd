"""
Long or short windows of a text to fine-tune on? A small study of one model and one text.

    python benchmarks/long_windows.py

SmolLM2-135M-Instruct is fine-tuned with LoRA on the Declaration of Human Rights in Spanish. A quarter of its articles,
chosen by the seed, is held out. The other articles are one stream of tokens, which is cut into windows of 512 or of 64
tokens. Both have the same tokens, and a step of the fine-tuning has 512 of them: one long window or eight short ones.
The loss on the held-out articles is measured in short windows, and in one window of all their tokens.

Each fine-tuned model's figures are a file of the output folder. The same command goes on where it was stopped. The
model and the text are downloaded once (100 MB).
"""

import argparse
import json
import random
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import constants
from peft import LoraConfig

from trl_dpg import InnerLoopConfig, Student
from trl_dpg.declaration import FILES, declaration_folder, model_folder, parse_declaration
from trl_dpg.evaluation import evaluate_dataset, interval, metric_before
from trl_dpg.files import write_json
from trl_dpg.metrics import LanguageModelingMetric


LONG, SHORT = 512, 64
NUM_EPOCHS = 1
LEARNING_RATE = 1e-3


def load_student(model: str, seed: int) -> Student:
    torch.manual_seed(seed)  # of the adapters
    return Student(model, peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def streams(tokenizer, texts: Path, language: str, seed: int) -> tuple[list[int], list[int]]:
    """Tokens to learn from, a multiple of `LONG`, and held-out tokens, a multiple of `SHORT`."""
    paragraphs = parse_declaration((texts / f"{FILES[language]}.html").read_text())
    articles = sorted({article for article, _ in paragraphs})
    held_out = set(random.Random(seed).sample(articles, len(articles) // 4))
    parts: tuple[list[int], list[int]] = ([], [])
    for article in articles:
        text = "\n".join(text for (number, _), text in sorted(paragraphs.items()) if number == article)
        parts[article in held_out].extend(tokenizer(text + "\n\n", add_special_tokens=False).input_ids)
    learned, tested = parts
    return learned[: len(learned) // LONG * LONG], tested[: len(tested) // SHORT * SHORT]


def windows(stream: list[int], size: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": stream[k : k + size]} for k in range(0, len(stream), size)]


def study(model: str, texts: Path, language: str, seed: int, size: int | None) -> dict[str, float]:
    """The held-out loss, in nats a token, after fine-tuning on windows of `size` tokens. `None`: before it."""
    load = partial(load_student, model, seed)
    start = load()
    learned, tested = streams(start.processing_class, texts, language, seed)
    short = LanguageModelingMetric(windows(tested, SHORT))
    whole = LanguageModelingMetric(windows(tested, len(tested)), max_length=len(tested))
    if size is None:
        losses = {"short": -metric_before(start, short), "whole": -metric_before(start, whole)}
    else:
        config = InnerLoopConfig(
            batch_size=LONG // size, num_epochs=NUM_EPOCHS, learning_rate=LEARNING_RATE, eps_root=0.0, max_length=LONG
        )
        done = evaluate_dataset(load, Dataset.from_list(windows(learned, size)), short, config, seed)
        losses = {"short": -done.metric, "whole": -done.measure(whole)}
    return losses | {"learned": len(learned), "tested": len(tested)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/long_windows"))
    parser.add_argument("--language", choices=list(FILES), default="spa")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    cache = Path(constants.HF_HOME).parent / "trl-dpg"
    texts, model = declaration_folder(cache), str(model_folder(cache))
    arms = {"before": None, "short": SHORT, "long": LONG}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for seed in args.seeds:
        for name, size in arms.items():
            path = args.output_dir / f"{args.language}_{name}_seed_{seed}.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, study(model, texts, args.language, seed, size))
            figures[name].append(json.loads(path.read_text()))
            print(f"{name}, seed {seed}: {figures[name][-1]}", flush=True)
    for tested in ("short", "whole"):
        values = {name: [own[tested] for own in runs] for name, runs in figures.items()}
        values["long - short"] = [a - b for a, b in zip(values["long"], values["short"], strict=True)]
        cells = []
        for name, (mean, width) in zip(values, map(interval, values.values()), strict=True):
            cells.append(f"{name} {mean:.3f}" + (f" ± {width:.3f}" if width else ""))
        print(f"loss in {tested} windows: {',  '.join(cells)}")


if __name__ == "__main__":
    main()
