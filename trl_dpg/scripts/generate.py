"""
Sample a synthetic dataset from a trained generator.

    trl-dpg generate --model_name_or_path runs/new_language --dataset_name prompts.jsonl --output_dir runs/data
    trl sft --dataset_name runs/data --model_name_or_path <student> --output_dir runs/student

A recipe of `trl-dpg dpg` will do for prompts and sampling (`--config`). Several processes share the prompts out.
Writes `train.parquet` and a dataset card that records generator, prompts and sampling settings; `--hub_dataset_id`
also pushes them.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from .utils import DatasetArguments, PromptArguments, UsageError, make_prompts, one_process, process_state


@dataclass
class GenerateArguments(PromptArguments, DatasetArguments):
    """
    Arguments of `trl-dpg generate`. The dataset is of prompts (texts or conversations).

    Args:
        model_name_or_path (`str`):
            The generator's path or Hub id, or those of its adapters.
        num_samples (`int`, *optional*):
            How many texts; the prompts are gone through again as often as it takes. One for each prompt by default.
        output_dir (`str`, *optional*, defaults to `"trl-dpg-data"`):
            Where the dataset is written.
        train_on (`str`, *optional*, defaults to `"completion"`):
            `"completion"`: a column `text`, which SFTTrainer trains on alone, beside `source_prompt`.
            `"prompt_completion"`: the columns `prompt` and `completion`.
        max_completion_length (`int`, *optional*, defaults to `256`):
            In tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling.
        top_k (`int`, *optional*, defaults to `0`):
            The most probable tokens only; 0: all.
        batch_size (`int`, *optional*, defaults to `256`):
            Prompts at a time.
        seed (`int`, *optional*, defaults to `42`):
            Of the sampling.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the generator's weights.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Sample by vLLM, where it is installed.
        hub_dataset_id (`str`, *optional*):
            Push the dataset there.
        private (`bool`, *optional*, defaults to `False`):
            As a private one.
    """

    _argument_group_name: ClassVar[str] = "generator, prompts and sampling"

    model_name_or_path: str | None = field(default=None, metadata={"help": "The generator's path or Hub id."})
    num_samples: int | None = field(default=None, metadata={"help": "How many texts; one for each prompt by default."})
    output_dir: str = field(default="trl-dpg-data", metadata={"help": "Where the dataset is written."})
    train_on: str = field(default="completion", metadata={"help": "Columns: 'completion' or 'prompt_completion'."})
    max_completion_length: int = field(default=256, metadata={"help": "Longest text, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling."})
    top_k: int = field(default=0, metadata={"help": "The most probable tokens only; 0: all."})
    batch_size: int = field(default=256, metadata={"help": "Prompts at a time."})
    seed: int = field(default=42, metadata={"help": "Seed of the sampling."})
    dtype: str = field(default="auto", metadata={"help": "Type of the generator's weights."})
    use_vllm: bool = field(default=False, metadata={"help": "Sample by vLLM, where it is installed."})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Push the dataset there."})
    private: bool = field(default=False, metadata={"help": "Push it as a private one."})

    def __post_init__(self):
        for name in ("model_name_or_path", "dataset_name"):
            if vars(self)[name] is None:
                raise UsageError(f"--{name} is required.")
        if self.train_on not in ("completion", "prompt_completion"):
            raise UsageError(f"--train_on must be 'completion' or 'prompt_completion', got {self.train_on!r}.")
        for name in ("num_samples", "max_completion_length", "batch_size"):
            if vars(self)[name] is not None and vars(self)[name] < 1:
                raise UsageError(f"--{name} must be at least 1, got {vars(self)[name]}.")
        if self.temperature <= 0:
            raise UsageError(f"--temperature must be positive, got {self.temperature}.")


def main(script_args: GenerateArguments) -> None:
    from datasets import Dataset
    from huggingface_hub import HfApi
    from transformers import AutoTokenizer

    from trl_dpg.evaluation import prompt_completion_pairs

    output_dir = Path(script_args.output_dir)
    if any((output_dir / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UsageError(f"--output_dir: {script_args.output_dir!r} holds a model, whose card would be overwritten.")
    state = process_state()
    data = script_args.load()
    tokenizer = AutoTokenizer.from_pretrained(script_args.model_name_or_path)
    prompts = make_prompts(data, script_args, tokenizer)["prompt"]
    number = script_args.num_samples or len(prompts)
    rows = [prompts[index % len(prompts)] for index in range(number)]
    texts = sample(script_args, rows)
    if not state.is_main_process:
        return
    if script_args.train_on == "completion":
        dataset = Dataset.from_dict({"text": texts, "source_prompt": rows})
    else:
        dataset = Dataset.from_list(prompt_completion_pairs(rows, texts))
    output_dir.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(output_dir / "train.parquet")
    dataset_card(script_args, number).save(output_dir / "README.md")
    print(f"{number} texts: {output_dir / 'train.parquet'}")
    if script_args.hub_dataset_id is not None:
        api = HfApi()
        repo = api.create_repo(
            script_args.hub_dataset_id, repo_type="dataset", private=script_args.private, exist_ok=True
        )
        files = ["README.md", "train.parquet"]
        api.upload_folder(repo_id=repo.repo_id, repo_type="dataset", folder_path=output_dir, allow_patterns=files)
        print(f"Pushed to {repo}")


def sample(script_args: GenerateArguments, prompts: list) -> list[str]:
    """A text for each prompt."""
    sampling = {name: vars(script_args)[name] for name in ("temperature", "top_p", "top_k")}
    if script_args.use_vllm:
        one_process("generate", "vLLM finds the GPUs itself.")
        try:
            from vllm import LLM, SamplingParams
        except ModuleNotFoundError as missing:
            raise UsageError("--use_vllm needs vLLM: pip install vllm.") from missing
        sampling["top_k"] = sampling["top_k"] or -1  # vLLM's word for all
        llm = LLM(script_args.model_name_or_path, dtype=script_args.dtype, seed=script_args.seed)
        parameters = SamplingParams(max_tokens=script_args.max_completion_length, **sampling)
        answer = llm.generate if isinstance(prompts[0], str) else llm.chat
        return [output.outputs[0].text for output in answer(prompts, parameters)]

    import torch
    from accelerate.utils import gather_object

    from trl_dpg.evaluation import generate_texts, load_generator

    state = process_state()
    model, tokenizer = load_generator(str(script_args.model_name_or_path), script_args.dtype)
    with torch.inference_mode(), state.split_between_processes(prompts) as mine:
        texts = generate_texts(
            model,
            tokenizer,
            mine,
            script_args.max_completion_length,
            batch_size=script_args.batch_size,
            seed=script_args.seed + state.process_index,
            **sampling,
        )
    return gather_object(texts)


def dataset_card(script_args: GenerateArguments, number: int):
    """What the texts are and how they were made."""
    from huggingface_hub import DatasetCard, DatasetCardData

    size = next(
        (name for limit, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K")) if number < limit),
        "100K<n<1M" if number < 10**6 else "n>1M",
    )
    data = DatasetCardData(
        task_categories=["text-generation"],
        tags=["trl", "dpg", "synthetic"],
        size_categories=[size],
    )
    settings = json.dumps(asdict(script_args), indent=2)
    return DatasetCard(f"""---
{data.to_yaml()}
---

# Synthetic data by {Path(str(script_args.model_name_or_path)).name}

{number:,} texts sampled from the generator `{script_args.model_name_or_path}` with the prompts of
`{script_args.dataset_name}`. A generator trained by Dataset Policy Gradients (Thrush et al.,
[arXiv 2604.08423](https://arxiv.org/abs/2604.08423)) writes data that moves a metric of the model fine-tuned on it;
its own model card names metric and student.

## Sampling settings

```json
{settings}
```
""")


def make_parser(prog: str | None = None):
    from trl import TrlParser

    return TrlParser(GenerateArguments, prog=prog)


if __name__ == "__main__":
    from trl_dpg import cli

    cli.run("generate", sys.argv[1:])
