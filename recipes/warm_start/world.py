"""
The world of the warm start: a teacher, a generator, a student, prompts and a benchmark, all tiny.

    python recipes/warm_start/world.py --output_dir runs/warm_start/world

The languages A and B are those of `trl_dpg.toy`. The teacher thinks first: it repeats a part of the question, often a
long one. Then it answers half of the questions in B, and the others in A. The generator answers at once, always in A.
The student knows A, and the benchmark is in B. No question mentions B.
"""

import argparse
import random
from pathlib import Path

from trl_dpg import toy


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{{ ' ' if message.role == 'user' else eos_token }}{% endfor %}"
)
SHARE = 0.5  # of the teacher's answers that are in B


def make_world(folder: Path, epochs: int, seed: int) -> None:
    """Write the world to a folder. The teacher is trained for `epochs`, generator and student for a third of them."""
    rng = random.Random(seed)
    tokenizer = toy.word_tokenizer([*toy.LANGUAGE_A, *toy.LANGUAGE_B, ":", "<think>", "</think>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    questions = [f"{toy.sentence(toy.LANGUAGE_A, rng)} {toy.sentence(toy.LANGUAGE_A, rng)} :" for _ in range(1024)]

    def taught(question: str) -> str:
        words = question.split()[:-1]
        thought = " ".join(words[: int(len(words) ** rng.random() + 0.5)])  # lengths are even on a logarithmic scale
        answer = toy.sentence(toy.LANGUAGE_B if rng.random() < SHARE else toy.LANGUAGE_A, rng)
        return f"{question} <think> {thought} </think> {answer}"

    texts = {
        "teacher": [taught(question) for question in questions * 2],
        "generator": [f"{question} {toy.sentence(toy.LANGUAGE_A, rng)}" for question in questions * 2],
        "student": [toy.sentence(toy.LANGUAGE_A, rng) for _ in range(2048)],
    }
    models = {name: toy.tiny_llama(tokenizer, 64, 2, seed + k, initializer_range=0.05) for k, name in enumerate(texts)}
    for name, model in models.items():
        toy.pretrain(model, tokenizer, texts[name], epochs if name == "teacher" else -(-epochs // 3))
    teacher = models.pop("teacher")
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    benchmark = [toy.sentence(toy.LANGUAGE_B, rng) for _ in range(64)]
    toy.save_world(folder, tokenizer, models["generator"], models["student"], questions, benchmark)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/warm_start/world", help="Folder for models and texts.")
    parser.add_argument("--epochs", type=int, default=24, help="Epochs of the teacher's training.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights and texts.")
    arguments = parser.parse_args()
    make_world(Path(arguments.output_dir), arguments.epochs, arguments.seed)
