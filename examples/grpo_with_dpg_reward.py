"""
DPG in a plain GRPO script: the reward alone, in TRL's own trainer.

    python examples/grpo_with_dpg_reward.py --model Qwen/Qwen3-0.6B --student HuggingFaceTB/SmolLM2-135M
"""

from dataclasses import dataclass

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, TrlParser

from trl_dpg import DPGReward, InnerLoopConfig, Student
from trl_dpg.metrics import LanguageModelingMetric


@dataclass
class Arguments:
    model: str = "Qwen/Qwen3-0.6B"
    student: str = "HuggingFaceTB/SmolLM2-135M"
    prompts: str = "trl-lib/tldr"
    benchmark: str = "Salesforce/wikitext"
    benchmark_config: str | None = "wikitext-2-raw-v1"


def main(arguments: Arguments, training_args: GRPOConfig) -> None:
    prompts = load_dataset(arguments.prompts, split="train").select_columns("prompt")
    texts = load_dataset(arguments.benchmark, arguments.benchmark_config, split="validation")["text"]
    metric = LanguageModelingMetric([text for text in texts if len(text) > 100][:64])

    # The only lines that are not GRPO's own
    student = Student(arguments.student)
    reward = DPGReward(student, metric, InnerLoopConfig(learning_rate=1e-5, batch_size=8))

    trainer = GRPOTrainer(model=arguments.model, reward_funcs=[reward], args=training_args, train_dataset=prompts)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*TrlParser((Arguments, GRPOConfig)).parse_args_and_config())
