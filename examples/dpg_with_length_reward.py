"""
Data that helps a student *and* keeps to a length: DPG's reward beside one for the number of tokens.

Reasoning traces of a strong teacher tend to be long. A reward that is flat up to a budget, and falls beyond it,
lets DPG choose what is worth its tokens.

    python examples/dpg_with_length_reward.py --model Qwen/Qwen3-0.6B --student HuggingFaceTB/SmolLM2-135M --budget 96
"""

from dataclasses import dataclass

from datasets import load_dataset
from trl import TrlParser

from trl_dpg import DPGConfig, DPGTrainer
from trl_dpg.metrics import LanguageModelingMetric


@dataclass
class Arguments:
    model: str = "Qwen/Qwen3-0.6B"
    student: str = "HuggingFaceTB/SmolLM2-135M"
    prompts: str = "trl-lib/DeepMath-103K"
    budget: int = 96
    length_weight: float = 0.3


def main(arguments: Arguments, training_args: DPGConfig) -> None:
    dataset = load_dataset(arguments.prompts, split="train")
    # What the student should know in the end: held-out problems with their solutions
    held_out = dataset.select(range(16))
    metric = LanguageModelingMetric(
        [{"prompt": row["prompt"][0]["content"], "completion": row["solution"]} for row in held_out]
    )

    def length(completion_ids, **kwargs):
        """0 within the budget; -1 at twice the budget."""
        return [min(0.0, 1 - len(ids) / arguments.budget) for ids in completion_ids]

    training_args.reward_weights = [1.0, arguments.length_weight]  # DPG's reward comes first, on unit scale
    trainer = DPGTrainer(
        model=arguments.model,
        student=arguments.student,
        target_metric=metric,
        reward_funcs=length,
        args=training_args,
        train_dataset=dataset.select(range(16, len(dataset))),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*TrlParser((Arguments, DPGConfig)).parse_args_and_config())
