"""
A student in 4 bits, with LoRA adapters, beside the generator on one GPU (or a CPU).

    python examples/qlora_student.py --model Qwen/Qwen3-0.6B --student Qwen/Qwen3-1.7B
"""

from dataclasses import dataclass

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import TrlParser

from trl_dpg import DPGConfig, DPGTrainer
from trl_dpg.metrics import LanguageModelingMetric


@dataclass
class Arguments:
    model: str = "Qwen/Qwen3-0.6B"
    student: str = "Qwen/Qwen3-1.7B"
    prompts: str = "trl-lib/tldr"


def main(arguments: Arguments, training_args: DPGConfig) -> None:
    training_args.student_micro_batch_size = 2  # samples at a time: memory only, never the numbers
    training_args.student_eps_root = 1e-7  # adapters' gradients are small at their start: keep the scores smooth
    trainer = DPGTrainer(
        model=arguments.model,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        student=arguments.student,
        student_peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        student_quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,  # bfloat16 is faster on GPUs, its scores less accurate
        ),
        target_metric=LanguageModelingMetric(["Hola, me llamo Inés.", "¿Dónde está la biblioteca?"]),
        args=training_args,
        train_dataset=load_dataset(arguments.prompts, split="train").select_columns("prompt"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*TrlParser((Arguments, DPGConfig)).parse_args_and_config())
