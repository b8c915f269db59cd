"""
A metric of one's own: after the fine-tuning, the student should prefer the chosen answers over the rejected ones.

The data never shows the student a comparison: the generator finds texts that lead it there.

    python examples/preference_metric.py --model Qwen/Qwen3-0.6B --student HuggingFaceTB/SmolLM2-135M
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from datasets import load_dataset
from trl import TrlParser

from trl_dpg import DPGConfig, DPGTrainer


@dataclass
class Arguments:
    model: str = "Qwen/Qwen3-0.6B"
    student: str = "HuggingFaceTB/SmolLM2-135M"
    prompts: str = "trl-lib/tldr"
    preferences: str = "trl-lib/ultrafeedback_binarized"
    num_pairs: int = 16


def log_likelihood(student, text):
    """Σ log p(token | tokens before it), in nats; differentiable in the student."""
    ids = student.processing_class(text, return_tensors="pt", truncation=True, max_length=256).input_ids
    logits = student(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, ids[0, 1:, None].to(logits.device)).sum()


def main(arguments: Arguments, training_args: DPGConfig) -> None:
    pairs = load_dataset(arguments.preferences, split="train").select(range(arguments.num_pairs))
    texts = [["\n".join(m["content"] for m in row[side]) for side in ("chosen", "rejected")] for row in pairs]

    def margin(student):
        """The mean log-odds of the chosen answers, through a sigmoid: one clear win cannot outweigh all others."""
        margins = [log_likelihood(student, chosen) - log_likelihood(student, rejected) for chosen, rejected in texts]
        return F.logsigmoid(torch.stack(margins)).mean()

    trainer = DPGTrainer(
        model=arguments.model,
        student=arguments.student,
        target_metric=margin,
        args=training_args,
        train_dataset=load_dataset(arguments.prompts, split="train").select_columns("prompt"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*TrlParser((Arguments, DPGConfig)).parse_args_and_config())
