"""
Sample a synthetic dataset from a trained generator.

    trl-dpg generate --model_name_or_path runs/new_language --dataset_name prompts.jsonl --output_dir runs/data
    trl sft --dataset_name runs/data --model_name_or_path <student> --output_dir runs/student

A recipe of `trl-dpg dpg` can give the prompts and the sampling settings (`--config`). Several processes share the
prompts. The command writes `train.parquet` and a dataset card with generator, prompts and sampling settings. With
`--hub_dataset_id`, it also pushes them.

Until the dataset is written, `generate.jsonl` in the same folder has the texts of each finished batch. If the command
was stopped, the same command goes on from there. vLLM samples all texts at once and has no such journal.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..files import written_whole
from ..ranks import from_all_ranks
from ..redaction import redacted
from .arguments import SAMPLING, GeneratorArguments, ToyWorldArguments, UsageError, at_least
from .data import completion_reader, make_completer, make_folder, one_process, process_state, read_prompts
from .generate_journal import SampleJournal
from .manifest import leave_manifest
from .toy_world import toy_world


FILES = ["README.md", "train.parquet", "manifest.json", "manifest_rows.npz"]


@dataclass
class GenerateArguments(GeneratorArguments, ToyWorldArguments):
    """
    Arguments of `trl-dpg generate`.

    The prompts are texts or conversations. With `train_on="completion"`, the dataset that is written has the columns
    `text` (on which SFTTrainer trains) and `source_prompt`. Otherwise it has `prompt` and `completion`. If the texts
    have reasoning and `student_text` is `"answer"`, the reasoning is in a column `reasoning`.

    Args:
        num_samples (`int`, *optional*):
            Number of texts. If there are fewer prompts, they are repeated. By default, one text for each prompt.
        output_dir (`str`, *optional*, defaults to `"trl-dpg-data"`):
            Folder for the dataset.
        batch_size (`int`, *optional*, defaults to `256`):
            Prompts at a time.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sampling.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace `train.parquet` and `README.md` in `output_dir`.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Sample by vLLM, which must be installed.
        hub_dataset_id (`str`, *optional*):
            Hub id to push the dataset to.
        private (`bool`, *optional*, defaults to `False`):
            Push it as a private dataset.
    """

    _argument_group_name: ClassVar[str] = "generator, prompts and sampling"

    num_samples: int | None = field(
        default=None, metadata={"help": "Number of texts; one for each prompt by default."}
    )
    output_dir: str = field(default="trl-dpg-data", metadata={"help": "Folder for the dataset."})
    batch_size: int = field(default=256, metadata={"help": "Prompts at a time."})
    seed: int = field(default=42, metadata={"help": "Seed of the sampling."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the dataset in output_dir."})
    use_vllm: bool = field(default=False, metadata={"help": "Sample by vLLM, which must be installed."})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Hub id to push the dataset to."})
    private: bool = field(default=False, metadata={"help": "Push it as a private dataset."})

    def __post_init__(self):
        super().__post_init__()
        at_least(1, num_samples=self.num_samples, batch_size=self.batch_size)


def main(script_args: GenerateArguments) -> None:
    script_args.set_threads()
    state = process_state()
    output_dir = make_folder("output_dir", script_args.output_dir)
    if any((output_dir / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UsageError(f"--output_dir: {script_args.output_dir!r} has a model, whose card would be overwritten.")
    there = [name for name in FILES if (output_dir / name).exists()]
    if there and not script_args.overwrite:
        raise UsageError(
            f"--output_dir: {script_args.output_dir!r} has {' and '.join(there)} already. Choose another folder, or "
            "set --overwrite."
        )
    model = script_args.model_name_or_path or f"of the toy world {script_args.toy_world}"
    with toy_world(script_args, script_args.seed):
        rows = read_prompts(script_args, script_args.num_samples or 0)
        if script_args.use_vllm:
            texts = sample_by_vllm(script_args, rows)
            write(script_args, output_dir, rows, texts)
        else:
            settings = sample_settings(script_args, rows, model)
            with SampleJournal(output_dir / "generate.jsonl", settings, script_args.overwrite) as journal:
                texts = sample(script_args, rows, journal)
                if state.is_main_process:
                    write(script_args, output_dir, rows, texts)
                    journal.remove()
        if state.is_main_process:
            leave_manifest(output_dir, "generate", asdict(script_args), prompts=rows)
    if script_args.hub_dataset_id is not None and state.is_main_process:
        push(script_args, output_dir)


def sample_settings(script_args: GenerateArguments, rows: list, model: str) -> dict[str, Any]:
    """What the texts depend on. Several processes, or another number of them, sample the same texts."""
    names = ["model_revision", "dtype", "batch_size", "seed", "max_completion_length", *SAMPLING]
    names += ["generation_kwargs", "chat_template_kwargs", "toy_world_kwargs"]
    files = [path.stat() for path in sorted(Path(model).glob("*.safetensors"))]
    sha = hashlib.sha256(json.dumps(rows, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace"))
    return {
        "model_name_or_path": model,
        "weights": [[file.st_size, file.st_mtime_ns] for file in files],
        "prompts": [len(rows), sha.hexdigest()],
    } | {name: vars(script_args)[name] for name in names}


def write(script_args: GenerateArguments, output_dir: Path, rows: list, texts: list[str]) -> None:
    """Write the dataset and its card."""
    from datasets import Dataset

    from trl_dpg.generation import prompt_completion_pairs

    rows, texts, reasoning, line = read(script_args, rows, texts)
    if script_args.train_on == "completion":
        dataset = Dataset.from_dict({"text": texts, "source_prompt": rows})
    else:
        dataset = Dataset.from_list(prompt_completion_pairs(rows, texts))
    if line is not None:
        print(line)
        if script_args.student_text == "answer":
            dataset = dataset.add_column("reasoning", reasoning)
    with written_whole(output_dir / "train.parquet") as part:
        dataset.to_parquet(part)
    dataset_card(script_args, len(texts), line).save(output_dir / "README.md")
    print(f"{len(texts)} texts: {output_dir / 'train.parquet'}")


def push(script_args: GenerateArguments, output_dir: Path) -> None:
    """Push the dataset and its card to the Hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    name = str(script_args.hub_dataset_id)
    repo = api.create_repo(name, repo_type="dataset", private=script_args.private, exist_ok=True)
    api.upload_folder(repo_id=repo.repo_id, repo_type="dataset", folder_path=output_dir, allow_patterns=FILES)
    print(f"Pushed to {repo}")


def read(script_args: GenerateArguments, rows: list, texts: list[str]):
    """
    Prompts and texts as a student reads them, the texts' reasoning, and a line on it (`None` without reasoning).

    Texts of which it reads nothing, because their thought has no end, are left out.
    """
    from trl_dpg.student_text import thinking_line

    reader = completion_reader(script_args)
    readings = reader.read(rows, texts)
    line = thinking_line(readings, reader)
    kept = [(row, reading) for row, reading in zip(rows, readings, strict=True) if reading.finished or reading[0]]
    if not kept:
        raise UsageError(
            f"None of the {len(texts)} texts finishes its thought within --max_completion_length "
            f"{script_args.max_completion_length}. Raise it, or set --unfinished_thoughts as_is."
        )
    if len(kept) < len(readings):
        line = f"{line} {len(readings) - len(kept)} texts were left out."
    readings = [reading for _, reading in kept]
    return (
        [row for row, _ in kept],
        [reading.completion for reading in readings],
        [reading.reasoning for reading in readings],
        line,
    )


def sample(script_args: GenerateArguments, prompts: list, journal: SampleJournal) -> list[str]:
    """A text for each prompt. Several processes share the batches. Those in the journal are not sampled again."""
    import torch

    state, size = process_state(), script_args.batch_size
    starts = range(0, len(prompts), size)
    todo = [batch for batch in range(len(starts)) if batch not in journal.texts]
    if len(todo) < len(starts) and state.is_main_process:
        print(f"{len(starts) - len(todo)} of {len(starts)} batches are there already.", file=sys.stderr)
    complete = make_completer(script_args) if todo else None

    def texts_of(batches: list[int]) -> dict[int, list[str]]:
        with torch.inference_mode():
            rows = {batch: prompts[starts[batch] : starts[batch] + size] for batch in batches}
            return {batch: complete(own, batch_seed(script_args.seed, batch)) for batch, own in rows.items()}  # type: ignore[misc]

    for first in range(0, len(todo), state.num_processes):
        mine = todo[first + state.process_index :][:1]  # the batch of this process, if one is left
        parts = from_all_ranks(partial(texts_of, mine), "Sampling a batch")
        found = {batch: texts for part in parts for batch, texts in part.items()}
        from_all_ranks(partial(journal.store, found), "Writing the journal")
    return [text for batch in range(len(starts)) for text in journal.texts[batch]]


def batch_seed(seed: int, batch: int) -> int:
    """The seed of a batch. Other batches have others, also those of neighbouring seeds."""
    import numpy as np

    return int(np.random.SeedSequence([seed % 2**64, batch]).generate_state(1)[0])


def sample_by_vllm(script_args: GenerateArguments, prompts: list) -> list[str]:
    """A text for each prompt, by vLLM."""
    from trl_dpg.generation import generate_texts_by_vllm

    one_process("generate", "vLLM finds the GPUs itself.")
    marked = {"skip_special_tokens": False} if completion_reader(script_args).needs_special_tokens else {}
    try:
        return generate_texts_by_vllm(
            str(script_args.model_name_or_path),
            prompts,
            script_args.max_completion_length,
            dtype=script_args.dtype or "auto",
            seed=script_args.seed,
            chat_template_kwargs=script_args.chat_template_kwargs,  # type: ignore[arg-type]  # a dict once parsed
            generation_kwargs=marked | dict(script_args.generation_kwargs or {}),  # type: ignore[arg-type]
            revision=script_args.model_revision,
            trust_remote_code=script_args.trust_remote_code,
            **script_args.sampling(),
        )
    except ImportError as error:
        raise UsageError(f"--use_vllm: {error}") from error


def dataset_card(script_args: GenerateArguments, number: int, thoughts: str | None = None):
    """The dataset card: where the texts come from, and the sampling settings."""
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
    settings = json.dumps(redacted(asdict(script_args)), indent=2)
    return DatasetCard(f"""---
{data.to_yaml()}
---

# Synthetic data by {Path(str(script_args.model_name_or_path)).name}

{number:,} texts sampled from the generator `{script_args.model_name_or_path}` with the prompts of
`{script_args.dataset_name}`. A generator trained by Dataset Policy Gradients (Thrush et al.,
[arXiv 2604.08423](https://arxiv.org/abs/2604.08423)) writes data that moves a metric of the model fine-tuned on it;
its own model card names metric and student.
{f"{chr(10)}{thoughts}{chr(10)}" if thoughts else ""}
## Sampling settings

```json
{settings}
```
""")


def make_parser(prog: str | None = None):
    from trl import TrlParser

    return TrlParser(GenerateArguments, prog=prog)


if __name__ == "__main__":
    from trl_dpg.scripts import launcher

    launcher.run("generate", make_parser, main, sys.argv[1:])
