"""
Does a GRPO run with `LengthDistributionReward` give completions a target's lengths, and do other rewards of length?

    python benchmarks/length_reward.py                        # four rewards, three seeds
    python benchmarks/length_reward.py --figure docs/images/length_reward.png

A small model counts: "1 2 3 ... k". Its k is log-normal around 12 before training. The target has two peaks, 6 and 24
tokens. TRL's GRPOTrainer trains it with one reward at a time. Each result is written to `output_dir`
when it is known. An interrupted benchmark goes on from there.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from scipy.stats import wasserstein_distance
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_cosine_scaled_reward, get_soft_overlong_punishment

from trl_dpg import toy
from trl_dpg.length_target import LengthTargets
from trl_dpg.rewards import LengthDistributionReward


MAX_LENGTH = 48
PEAKS = "quantiles:0=5,0.25=6,0.499=7,0.5=22,0.75=24,1=26"
NAMES = {
    "potential": "LengthDistributionReward",
    "distance": 'LengthDistributionReward, form="distance"',
    "cosine": "cosine-scaled",
    "overlong": "soft overlong punishment",
}


LEARNING_RATES = {"potential": 2e-3, "distance": 2e-3, "cosine": 2e-4, "overlong": 2e-4}
"""With 2e-3, cosine-scaled and overlong write a single token after 20 steps."""


def cosine(completions, completion_ids, **kwargs):
    """TRL's cosine-scaled reward, with every answer right: what is left is its length part."""
    right = [[{"content": r"\boxed{1}"}]] * len(completions)
    return get_cosine_scaled_reward(max_len=MAX_LENGTH)(right, ["1"] * len(completions), completion_ids)


def rewards(name: str) -> list:
    overlong = get_soft_overlong_punishment(max_completion_len=30, soft_punish_cache=10)
    return {
        "potential": [LengthDistributionReward(PEAKS)],
        "distance": [LengthDistributionReward(PEAKS, form="distance")],
        "cosine": [cosine],
        "overlong": [overlong],
    }[name]


def counting_model(seed: int):
    """A model that counts up to a log-normal number, and its tokenizer."""
    rng = random.Random(seed)
    words = [str(number) for number in range(1, MAX_LENGTH + 1)]
    tokenizer = toy.word_tokenizer([*words, *toy.LANGUAGE_A, ":"])
    model = toy.tiny_llama(tokenizer, 64, 2, seed, initializer_range=0.05)
    texts = []
    for _ in range(4096):
        length = round(min(max(rng.lognormvariate(np.log(12), 0.35), 2), MAX_LENGTH))
        texts.append(f"{rng.choice(toy.LANGUAGE_A)} : {' '.join(words[:length])}")
    toy.pretrain(model, tokenizer, texts, epochs=4)
    return model, tokenizer


@torch.no_grad()
def sampled_lengths(model, tokenizer, number: int, seed: int) -> np.ndarray:
    """Tokens of completions, with their end, as TRL counts them."""
    torch.manual_seed(seed)
    prompts = [f"{word} :" for word in toy.LANGUAGE_A] * (number // len(toy.LANGUAGE_A))
    ids = tokenizer(prompts, return_tensors="pt").to(model.device)
    made = model.generate(ids.input_ids, attention_mask=ids.attention_mask, do_sample=True, max_new_tokens=MAX_LENGTH)
    return (made[:, ids.input_ids.shape[1] :] != tokenizer.pad_token_id).sum(1).numpy()


def train(name: str, seed: int, steps: int) -> dict:
    model, tokenizer = counting_model(seed)
    before = sampled_lengths(model, tokenizer, 1024, seed)
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=MAX_LENGTH,
            max_steps=steps,
            learning_rate=LEARNING_RATES[name],
            loss_type="dr_grpo",
            scale_rewards="batch",
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            seed=seed,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=rewards(name),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [f"{word} :" for word in toy.LANGUAGE_A] * 64}),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    after = sampled_lengths(trainer.model, tokenizer, 1024, seed + 1)
    curve = [line["completions/mean_length"] for line in trainer.state.log_history if "reward" in line]
    seconds = trainer.state.log_history[-1]["train_runtime"]
    return {"before": before.tolist(), "after": after.tolist(), "mean_length": curve, "seconds": seconds}


def distance(lengths: list[int]) -> float:
    """Wasserstein-1 in log-length to the target."""
    return wasserstein_distance(np.log(lengths), np.log(LengthTargets.read(PEAKS)["all"].spread(10_000)))


def draw(results: dict[str, dict], path: Path) -> None:
    """Histograms of the lengths of all seeds, before and after, and the target."""
    names = list(dict.fromkeys(key.rsplit("-", 1)[0] for key in results))
    figure = Figure(figsize=(3.3 * len(names), 2.8), layout="constrained")
    edges = np.arange(0.5, MAX_LENGTH + 1.5)
    target = LengthTargets.read(PEAKS)["all"].spread(10_000)
    for axis, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        runs = [result for key, result in results.items() if key.rsplit("-", 1)[0] == name]
        before, after = (np.concatenate([run[part] for run in runs]) for part in ("before", "after"))
        axis.hist(before, edges, density=True, histtype="step", color="0.6", label="before")
        axis.hist(after, edges, density=True, color="tab:blue", alpha=0.7, label="after")
        axis.hist(target, edges, density=True, histtype="step", color="tab:orange", label="target")
        axis.set_title(NAMES[name], fontsize="medium")
        axis.set_xlabel("tokens")
        axis.set_ylim(0, 0.4)
    figure.axes[0].set_ylabel("share of completions")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/length_reward"))
    parser.add_argument("--figure", type=Path, help="also draw the lengths into this PNG")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = {}
    print(f"{'reward':>18} {'seed':>4} {'W1 before':>9} {'W1 after':>9} {'change':>7} {'s':>5}", flush=True)
    for name in args.rewards:
        for seed in args.seeds:
            path = args.output_dir / f"{name}-{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(train(name, seed, args.steps)))
            result = results[path.stem] = json.loads(path.read_text())
            before, after = distance(result["before"]), distance(result["after"])
            change = f"{after / before - 1:+.0%}"
            print(f"{name:>18} {seed:>4} {before:9.3f} {after:9.3f} {change:>7} {result['seconds']:5.0f}", flush=True)
    if args.figure is not None:
        draw(results, args.figure)


if __name__ == "__main__":
    main()
