"""
Score the samples of an existing dataset by what they do for a metric of a student that is fine-tuned on them.

    trl-dpg attribute --dataset_name samples.jsonl --student_model_name_or_path gpt2 --metric language_modeling \
        --metric_kwargs '{"dataset": "benchmark.jsonl"}' --keep_top 0.3 --output_dir attribution

The dataset is shuffled by `seed` and cut into chunks of `dataset_chunk` samples. Each chunk is one inner loop from the
student's start, and the scores of its samples are its metagradients, see [`metagradient`]. Scores of different chunks
compare because start, number of steps and batch size are the same, and the company a sample is in is alike. For that
reason the last chunk is filled up with samples of other chunks, whose scores there are thrown away. What is left is
chance: a sample's company, and the step it is trained in. One chunk is therefore scored again in another order, and
the rank correlation tells how much of the scores is chance. `num_repeats` scores all samples in as many orders and
takes the mean. A dataset of one chunk is trained on in its own order, the first time.

Several processes (`--num_processes`) share the chunks out.

Files in `output_dir`:

- `attribution.jsonl`, the journal: the settings, then a line for each finished chunk. The same command goes on where
  it was stopped; one that is done only writes the files again, e.g. with another `keep_top`, or adds repeats.
- `scored.parquet` (or `.jsonl`): the dataset in its order and with all its columns, and `dpg_score` (float32). With
  `per_token`, also `dpg_token_scores`: a list, one score for each of the student's tokens, cut off at
  `student_max_length`.
- `top.parquet` (or `.jsonl`), with `keep_top`: the share of best rows, in the dataset's order.
- `summary.json`: counts, quantiles of the scores, the metric before and after, seconds (of all processes together).
- `attribution.lock`: keeps two commands from writing at once.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from trl_dpg.config import StudentArguments

from .utils import (
    FORMATS,
    MetricArguments,
    ToyWorldArguments,
    UsageError,
    at_least,
    check_student,
    load_data,
    make_folder,
    make_metric,
    process_state,
    toy_world,
)


MEMORY_ONLY = (  # settings that may change when a run is resumed
    "student_micro_batch_size",
    "student_memory_budget",
    "student_gradient_checkpointing",
    "student_checkpoint_interval",
    "student_offload_trajectory",
)
SAMPLES_PER_CHUNK = 256
ROWS_PER_WRITE = 1000
RESULTS = ("scored.parquet", "scored.jsonl", "top.parquet", "top.jsonl")
RELIABLE = 0.8
"""Correlation of a ranking with another like it, from which on `attribute` has nothing to say against it."""


@dataclass
class AttributeArguments(MetricArguments, ToyWorldArguments):
    """
    Script arguments of `trl-dpg attribute`.

    Args:
        dataset_name (`str`):
            The samples: a Hub id, or a file (json, jsonl, parquet, csv, txt).
        dataset_config (`str`, *optional*):
            Configuration of a dataset of the Hub.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split, e.g. `"train[:10000]"`. Not a recipe's `dataset_train_split`, which is of its prompts.
        dataset_text_field (`str`, *optional*):
            The column that holds the text. Without it: `input_ids` (with `labels`, if there), `messages`, `prompt` and
            `completion`, or `text`, the first that the dataset has.
        dataset_chunk (`int`, *optional*):
            Samples the student is fine-tuned on at a time, a multiple of `student_batch_size`. Without it, the
            smallest from 256 on.
        num_repeats (`int`, *optional*, defaults to `1`):
            Score all samples in as many random orders, and take the mean.
        output_dir (`str`, *optional*, defaults to `"attribution"`):
            Where the results are written. With a recipe made for `trl-dpg dpg`, name another folder than its.
        output_format (`str`, *optional*, defaults to `"parquet"`):
            `"parquet"` or `"jsonl"`.
        keep_top (`float`, *optional*):
            Also write this share of the samples, the best.
        num_shown (`int`, *optional*, defaults to `3`):
            How many of the best and of the worst samples are printed.
        overwrite (`bool`, *optional*, defaults to `False`):
            Throw away what an earlier run with other settings left in `output_dir`.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "The samples: a Hub id, or a file (json, jsonl, parquet, csv, txt)."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset, e.g. 'train[:10000]'."})
    dataset_text_field: str | None = field(
        default=None,
        metadata={
            "help": "The column that holds the text. By default the first there is of `input_ids`, `messages`, "
            "`prompt` and `completion`, `text`."
        },
    )
    dataset_chunk: int | None = field(
        default=None,
        metadata={
            "help": "Samples the student is fine-tuned on at a time, a multiple of `student_batch_size`. By default "
            f"the smallest from {SAMPLES_PER_CHUNK} on."
        },
    )
    num_repeats: int = field(
        default=1, metadata={"help": "Score all samples in as many random orders, and take the mean."}
    )
    output_dir: str = field(default="attribution", metadata={"help": "Where the results are written."})
    output_format: str = field(default="parquet", metadata={"help": "'parquet' or 'jsonl'."})
    keep_top: float | None = field(
        default=None, metadata={"help": "Also write this share of the samples, the best, e.g. 0.3."}
    )
    num_shown: int = field(default=3, metadata={"help": "How many of the best and worst samples are printed."})
    overwrite: bool = field(
        default=False, metadata={"help": "Throw away what a run with other settings left in `output_dir`."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name is None:
            raise UsageError("--dataset_name is required: samples by Hub id or file (json, jsonl, parquet, csv, txt).")
        if self.keep_top is not None and not 0 < self.keep_top <= 1:
            raise UsageError(f"--keep_top is a share, above 0 and at most 1, got {self.keep_top}. E.g. 0.3.")
        at_least(1, num_repeats=self.num_repeats)
        at_least(0, num_shown=self.num_shown)
        if self.output_format not in ("parquet", "jsonl"):
            raise UsageError(f"--output_format must be 'parquet' or 'jsonl', got {self.output_format!r}.")


@dataclass
class AttributeStudentArguments(StudentArguments):
    """[`StudentArguments`], the student among them."""

    def __post_init__(self):
        super().__post_init__()
        if self.per_token and self.attribution != "metagradient":
            raise UsageError("--per_token needs --attribution metagradient: the naive baseline has no token scores.")


# -- the samples -----------------------------------------------------------------------------------------------------


def load_samples(script_args: AttributeArguments):
    """The dataset as it is, and the view of it that the student reads."""
    name = str(script_args.dataset_name)
    dataset = load_data(name, script_args.dataset_config, script_args.dataset_split)
    taken = [column for column in ("dpg_score", "dpg_token_scores") if column in dataset.column_names]
    if taken:
        raise UsageError(f"--dataset_name {name!r} has scores already, in {taken}. Rename or remove these columns.")

    text = script_args.dataset_text_field
    formats = FORMATS if text is None else ((text,),)
    columns = next((list(columns) for columns in formats if set(columns) <= set(dataset.column_names)), None)
    if columns is None:
        raise UsageError(
            f"--dataset_name {name!r} has the columns {dataset.column_names}; expected "
            + (f"{text!r}." if text else "`text`, `prompt` and `completion`, `messages`, or `input_ids`.")
            + " Name the column with the text by --dataset_text_field."
        )
    if text is not None or columns == ["text"]:
        dtype = dataset.features[columns[0]].dtype
        if dtype not in ("string", "large_string"):
            raise UsageError(
                f"The column {columns[0]!r} holds no text but {dtype}. Name the one that does by --dataset_text_field."
            )
    if columns == ["input_ids"] and "labels" in dataset.column_names:
        columns.append("labels")
    samples = dataset.select_columns(columns)
    return dataset, samples if text in (None, "text") else samples.rename_column(text, "text")


def plan_chunks(num_samples: int, size: int, seed: int, num_repeats: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
    """
    Which rows are trained on together, in the order of training.

    Returns:
        `list[tuple[np.ndarray, np.ndarray]]`: Rows `[size]` of each chunk, and which of them it scores (`bool`), the
        chunks of one repeat after those of the other. A row is scored in exactly one chunk of each repeat. Further
        repeats do not change the earlier ones.
    """
    rng = np.random.default_rng(seed)
    chunks = []
    for repeat in range(num_repeats):
        whole = num_samples <= size  # one chunk of all rows, as many as there are
        order = np.arange(num_samples) if whole and repeat == 0 else rng.permutation(num_samples)
        for start in range(0, num_samples, size):
            rows = order[start : start + size]
            scored = np.ones(len(rows), dtype=bool)
            if not whole and len(rows) < size:
                filled = rng.permutation(np.concatenate([rows, order[: size - len(rows)]]))
                rows, scored = filled, np.isin(filled, rows)
            chunks.append((rows, scored))
    return chunks


def digest(dataset) -> str:
    """A hash of a dataset's contents, read in passing."""
    import pyarrow as pa

    sha = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(ROWS_PER_WRITE):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        sha.update(sink.getvalue())
    return sha.hexdigest()


# -- the journal -----------------------------------------------------------------------------------------------------


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal, settings first; a last line that was cut short by the end of a process is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def read_chunks(path: Path, num_chunks: int) -> Iterator[dict[str, Any]]:
    """The first chunks of a journal, each once."""
    seen = set()
    for record in read_journal(path):
        if record.get("chunk", num_chunks) < num_chunks and record["chunk"] not in seen:
            seen.add(record["chunk"])
            yield record


def append(path: Path, record: dict[str, Any]) -> None:
    """Write a line; when this returns it is on the disk."""
    with path.open("ab") as file:
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other commands from a journal while this one writes it."""
    from filelock import FileLock, Timeout

    if not process_state().is_main_process:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            f"Another trl-dpg attribute is at work in --output_dir {str(path.parent)!r}. Choose another folder."
        ) from error
    with lock:
        yield


def open_journal(path: Path, settings: dict[str, Any], overwrite: bool) -> dict[int, float | None]:
    """
    Start a journal, or go on with the one there is.

    Returns:
        `dict[int, float | None]`: The chunks that are done, each with its metric before.

    Raises:
        `UsageError`: If there is one of other settings, or the folder belongs to another command.
    """
    output_dir = path.parent
    if not path.exists() and (output_dir / "summary.json").exists():
        raise UsageError(
            f"--output_dir {str(output_dir)!r} has the summary.json of another command. Choose another folder."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    path.touch()
    with path.open("rb+") as file:
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
    lines = read_journal(path)
    found = next(lines, None)
    settings = json.loads(json.dumps(settings, default=str))
    done = {line["chunk"]: line["metric_before"] for line in lines}
    if found == settings:
        return done
    if found is not None and done and not overwrite:
        names = [name for name in {**settings, **found} if settings.get(name) != found.get(name)]
        changes = ", ".join(f"{name} (was {found.get(name)!r}, is {settings.get(name)!r})" for name in names)
        raise UsageError(
            f"--output_dir {str(output_dir)!r} has scores of other settings: {changes}. Choose another folder, or "
            "throw them away by --overwrite."
        )
    for name in (*RESULTS, "summary.json"):
        (output_dir / name).unlink(missing_ok=True)
    path.write_bytes(b"")
    append(path, settings)
    return {}


# -- scoring ---------------------------------------------------------------------------------------------------------


def score_chunk(student, samples, rows, scored, metric, config, metric_before) -> dict[str, Any]:
    """One inner loop on some rows, as the journal records it. Nothing is trained if all of them are empty."""
    from trl_dpg import metagradient

    started = time.perf_counter()
    columns = samples[rows.tolist()]
    examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    tokenized = student.tokenize(examples, config.max_length)
    record: dict[str, Any] = {
        "rows": rows[scored].tolist(),
        "scores": [0.0] * int(scored.sum()),
        "num_tokens": [len(sample.input_ids) for sample, mine in zip(tokenized, scored, strict=True) if mine],
        "num_empty": sum(not sample.num_supervised for sample, mine in zip(tokenized, scored, strict=True) if mine),
        "num_truncated": sum(sample.truncated for sample, mine in zip(tokenized, scored, strict=True) if mine),
        "metric_before": None,
        "metric_after": None,
    }
    token_scores = [[0.0] * length for length in record["num_tokens"]]
    if any(sample.num_supervised for sample in tokenized):
        ids = [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in tokenized]
        out = metagradient(student, ids, metric, config, metric_before=metric_before)
        record |= {"metric_before": out.metric_before, "metric_after": out.metric_after}
        record["scores"] = out.scores[scored].tolist()
        if out.token_scores is not None:
            padded = zip(out.token_scores[scored].tolist(), record["num_tokens"], strict=True)
            token_scores = [values[:length] for values, length in padded]
    if config.per_token:
        record["token_scores"] = token_scores
    return record | {"seconds": time.perf_counter() - started}


def score_samples(student, samples, metric, config, chunks, path: Path, done: dict[int, float | None]) -> None:
    """
    Score the chunks that are not done yet; each goes to the journal as soon as it is.

    Raises:
        `UsageError`: If the student or the metric are not what they were when the journal was begun.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    earlier = next((value for value in done.values() if value is not None), None)
    metric_before = None
    todo = [k for k in range(len(chunks)) if k not in done]
    state = process_state()
    if done and todo and state.is_main_process:
        print(f"Resuming: {len(done)} of {len(chunks)} chunks are there already.", file=sys.stderr)
    sizes = [int(scored.sum()) for _, scored in chunks]
    initial = sum(sizes) - sum(sizes[k] for k in todo)
    bar = tqdm(desc="Scoring", total=sum(sizes), initial=initial, unit="sample", disable=not state.is_main_process)
    with bar:
        for start in range(0, len(todo), state.num_processes):
            records = []
            for k in todo[start + state.process_index :][:1]:  # this process's, if there is one left
                rows, scored = chunks[k]
                record = score_chunk(student, samples, rows, scored, metric, config, metric_before)
                metric_before = record["metric_before"] if metric_before is None else metric_before
                if None not in (earlier, metric_before) and not math.isclose(earlier, metric_before, rel_tol=1e-3):  # type: ignore
                    raise UsageError(
                        f"The metric of the student at its start is {metric_before:.6g}, but was {earlier:.6g} when "
                        f"--output_dir {str(path.parent)!r} was begun: the student or the metric's data have changed. "
                        "Choose another folder, or throw the old scores away by --overwrite."
                    )
                records.append({"chunk": k, **record})
            for record in gather_object(records):
                if state.is_main_process:
                    append(path, record)
                bar.update(sizes[record["chunk"]])


# -- the results -----------------------------------------------------------------------------------------------------


def summarize(path: Path, num_samples: int, chunks_per_repeat: int, num_repeats: int):
    """
    What a finished journal says.

    Returns:
        `tuple[np.ndarray, np.ndarray, dict[str, Any]]`: Scores `[N]` and numbers of tokens `[N]` in the dataset's
        order, and figures for `summary.json`.
    """
    num_chunks = chunks_per_repeat * num_repeats
    repeats = np.full((max(num_repeats, 2), num_samples), np.nan, dtype=np.float32)
    num_tokens = np.zeros(num_samples, dtype=np.int64)
    totals = {"num_empty": 0, "num_truncated": 0, "seconds": 0.0}
    before, after = [], []
    for record in read_chunks(path, max(num_chunks, chunks_per_repeat + 1)):
        repeats[record["chunk"] // chunks_per_repeat, record["rows"]] = record["scores"]
        if record["chunk"] >= num_chunks:
            continue  # only compared
        num_tokens[record["rows"]] = record["num_tokens"]
        totals = {name: value + record[name] for name, value in totals.items()}
        if record["metric_after"] is not None:
            before.append(record["metric_before"])
            after.append(record["metric_after"])
    scores = repeats[:num_repeats].mean(axis=0)
    compared = repeats[:, ~np.isnan(repeats).any(axis=0) & repeats.any(axis=0)]  # empty samples score 0 in any order
    correlation = rank_correlation(compared)
    quantiles = np.quantile(scores, (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)).tolist()
    figures = {
        "num_samples": num_samples,
        "num_chunks": num_chunks,
        "num_repeats": num_repeats,
        "num_tokens": int(num_tokens.sum()),
        "num_empty": totals["num_empty"] // num_repeats,
        "num_truncated": totals["num_truncated"] // num_repeats,
        "seconds": totals["seconds"],
        "samples_per_second": num_samples * num_repeats / totals["seconds"],
        "metric_before": before[0] if before else None,
        "metric_after": sum(after) / len(after) if after else None,
        "score": {
            "mean": float(scores.mean()),
            "std": float(scores.std()),
            **dict(zip(("min", "q05", "q25", "median", "q75", "q95", "max"), quantiles, strict=True)),
            "rank_correlation": correlation,
            "num_compared": compared.shape[1],
        },
        "settings": next(read_journal(path)),
    }
    return scores, num_tokens, figures


def rank_correlation(repeats: np.ndarray) -> float | None:
    """Spearman's correlation of scores `[R, N]`, the mean over all pairs; `None` if all of one are equal."""
    if repeats.shape[1] < 2 or (repeats.max(axis=1) == repeats.min(axis=1)).any():
        return None
    ranks = rankdata(repeats, axis=1)
    return float(np.asarray(np.corrcoef(ranks))[np.triu_indices(len(repeats), k=1)].mean())


def chance(figures: dict[str, Any]) -> str:
    """How much of the ranking is chance, and what to do about it."""
    correlation, repeats = figures["score"]["rank_correlation"], figures["num_repeats"]
    if figures["score"]["min"] == figures["score"]["max"]:
        return "All scores are equal and rank nothing. Does the student learn (--student_learning_rate)?"
    if correlation is None:
        return "All samples are in one batch, or too few to say how much of their ranking is chance."
    text = f"Rank correlation of {figures['score']['num_compared']} scores in two random orders: {correlation:.2f}."
    if figures["num_chunks"] == repeats:
        text += " (They are one chunk, the same company in both.)"
    agreement = max(correlation, 0.0)  # scores that disagree are no more reliable than those of chance
    reliability = repeats * agreement / (1 + (repeats - 1) * agreement)  # of a mean, Spearman-Brown
    if reliability >= RELIABLE:
        return text
    text += "\nMuch of the ranking is chance. Raise --student_eps_root or --student_batch_size (docs/attribution.md)"
    if correlation > 0.01:
        enough = math.ceil(RELIABLE / (1 - RELIABLE) * (1 / correlation - 1) - 1e-9)
        text += f", or take the mean of more orders: --num_repeats {enough} for {RELIABLE}"
    return text + "."


def gather_token_scores(path: Path, num_chunks: int, num_repeats: int, offsets: np.ndarray) -> np.ndarray:
    """Token scores, all `[offsets[-1]]` in the dataset's order, in a file that is mapped to memory."""
    file = path.with_name("token_scores.tmp")
    flat = np.memmap(file, dtype=np.float32, mode="w+", shape=(int(offsets[-1]),))
    file.unlink()  # it goes with the process
    for record in read_chunks(path, num_chunks):
        for row, values in zip(record["rows"], record["token_scores"], strict=True):
            flat[offsets[row] : offsets[row + 1]] += np.asarray(values, dtype=np.float32) / num_repeats
    return flat


def write_results(dataset, output_dir: Path, output_format: str, scores, kept, token_scores, offsets) -> list[Path]:
    """
    Write the dataset with its scores, a few rows at a time.

    Args:
        dataset ([`~datasets.Dataset`]): N rows.
        output_dir (`Path`): Where to.
        output_format (`str`): `"parquet"` or `"jsonl"`.
        scores (`np.ndarray` of shape `[N]`): The column `dpg_score`.
        kept (`np.ndarray` of shape `[N]`, `bool`, or `None`): The rows of `top`.
        token_scores (`np.ndarray` or `None`): The column `dpg_token_scores`, all lists one after the other.
        offsets (`np.ndarray` of shape `[N + 1]`): Where each row's list begins in it.

    Returns:
        `list[Path]`: The files. Each appears under its name only when it is complete.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, List, Value

    added = {"dpg_score": Value("float32")} | (
        {} if token_scores is None else {"dpg_token_scores": List(Value("float32"))}
    )
    schema = Features(dict(dataset.features) | added).arrow_schema
    masks = {"scored": None} if kept is None else {"scored": None, "top": kept}
    files = [output_dir / f"{name}.{output_format}" for name in masks]
    parts = [file.with_name(f"{file.name}.tmp") for file in files]
    if output_format == "parquet":
        writers = [pq.ParquetWriter(part, schema) for part in parts]
    else:
        writers = [part.open("w", encoding="utf-8") for part in parts]
    arrow = dataset.with_format("arrow")
    for start in range(0, len(dataset), ROWS_PER_WRITE):
        rows = slice(start, min(start + ROWS_PER_WRITE, len(dataset)))
        columns = [*arrow[rows].columns, pa.array(scores[rows])]
        if token_scores is not None:
            ends = offsets[rows.start : rows.stop + 1]
            values = pa.array(token_scores[ends[0] : ends[-1]])
            columns.append(pa.ListArray.from_arrays(pa.array(ends - ends[0], pa.int32()), values))
        table = pa.table(columns, names=schema.names).cast(schema)
        for writer, mask in zip(writers, masks.values(), strict=True):
            chosen = table if mask is None else table.filter(pa.array(mask[rows]))
            if output_format == "parquet":
                writer.write_table(chosen)
            else:
                lines = (json.dumps(row, ensure_ascii=False, default=str) for row in chosen.to_pylist())
                writer.writelines(line + "\n" for line in lines)
    for writer, part, file in zip(writers, parts, files, strict=True):
        writer.close()
        os.replace(part, file)
    return files


def preview(row: dict[str, Any], student, width: int = 90) -> str:
    """A sample on one line."""
    if "input_ids" in row:
        decoded = student.processing_class is not None
        text = student.processing_class.decode(row["input_ids"]) if decoded else str(row["input_ids"])
    else:
        parts = [row[name] for name in ("messages", "prompt", "completion", "text") if name in row]
        messages = [part if isinstance(part, list) else [{"content": part}] for part in parts]
        text = " | ".join(str(message["content"]) for part in messages for message in part)
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def render(figures: dict[str, Any], files: list[Path]) -> str:
    """A few lines for the terminal."""
    lines = [
        f"{figures['num_samples']} samples in {figures['seconds']:.0f} s; metric {figures['metric_before']:.6g} "
        f"before, {figures['metric_after']:.6g} after (mean of {figures['num_chunks']} students)",
        chance(figures),
    ]
    for name in ("best", "worst"):
        lines += ["", f"{name:5}  {'row':>8}  {'dpg_score':>11}  sample"] if figures[name] else []
        lines += [f"{'':5}  {row['row']:>8}  {row['dpg_score']:>11.4g}  {row['sample']}" for row in figures[name]]
    return "\n".join([*lines, "", f"Written: {', '.join(map(str, files))}"])


def main(script_args: AttributeArguments, student_args: AttributeStudentArguments) -> None:
    state = process_state()
    script_args.set_threads()
    config = student_args.inner_loop_config()
    size = script_args.dataset_chunk or math.ceil(SAMPLES_PER_CHUNK / config.batch_size) * config.batch_size
    if size < 1 or size % config.batch_size:
        raise UsageError(
            f"--dataset_chunk ({size}) must be a multiple of --student_batch_size ({config.batch_size}), so that "
            f"every sample weighs the same in its batch. E.g. {max(size // config.batch_size, 1) * config.batch_size}."
        )
    output_dir = make_folder("output_dir", script_args.output_dir)
    with toy_world(script_args, student_args.seed, student_args, output_dir=script_args.output_dir):
        check_student(student_args)
        dataset, samples = load_samples(script_args)
    settings = {
        "metric": script_args.metric,
        "metric_kwargs": script_args.metric_kwargs,
        "dataset_chunk": size,
        **{name: value for name, value in asdict(student_args).items() if name not in MEMORY_ONLY},
        "dataset_columns": samples.column_names,
        "dataset_rows": len(samples),
        "dataset_digest": digest(samples),
    }
    path = output_dir / "attribution.jsonl"
    repeats = script_args.num_repeats
    chunks = plan_chunks(len(samples), size, student_args.seed, max(repeats, 2))
    chunks_per_repeat = len(chunks) // max(repeats, 2)
    if repeats == 1:  # one chunk more is scored in another order, to compare
        chunks = chunks[: chunks_per_repeat + (len(samples) > config.batch_size)]
    with locked(path):
        with state.main_process_first():
            done = open_journal(path, settings, script_args.overwrite)
        metric = make_metric(script_args)
        student = student_args.load_student()
        score_samples(student, samples, metric, config, chunks, path, done)
        if state.is_main_process:
            finish(script_args, path, dataset, samples, student, config.per_token, chunks_per_repeat)


def finish(
    script_args: AttributeArguments, path: Path, dataset, samples, student, per_token: bool, chunks_per_repeat: int
) -> None:
    """Write the results of a finished journal."""
    repeats = script_args.num_repeats
    scores, num_tokens, figures = summarize(path, len(samples), chunks_per_repeat, repeats)
    if figures["num_empty"] == len(samples):
        raise UsageError(
            f"None of the {len(samples)} samples of --dataset_name has a token to learn from. Name the column with "
            "the text by --dataset_text_field."
        )
    ranking = np.argsort(-scores, kind="stable")
    kept = None
    if script_args.keep_top is not None:
        if len(scores) > 1 and scores.min() == scores.max():
            raise UsageError(f"--keep_top: all {len(scores)} scores are equal. {chance(figures)}")
        kept = np.zeros(len(scores), dtype=bool)
        kept[ranking[: max(1, round(script_args.keep_top * len(scores)))]] = True
        figures["num_kept"] = int(kept.sum())
    shown = min(script_args.num_shown, len(scores))
    for name, rows in (("best", ranking[:shown]), ("worst", ranking[::-1][:shown])):
        figures[name] = [
            {"row": row, "dpg_score": float(scores[row]), "sample": preview(samples[row], student)}
            for row in rows.tolist()
        ]
    offsets = np.concatenate([[0], num_tokens.cumsum()])
    token_scores = None
    if per_token:
        token_scores = gather_token_scores(path, chunks_per_repeat * repeats, repeats, offsets)
    files = write_results(dataset, path.parent, script_args.output_format, scores, kept, token_scores, offsets)
    for name in RESULTS:
        if path.with_name(name) not in files:
            path.with_name(name).unlink(missing_ok=True)  # of an earlier command; it would contradict the summary
    summary = path.with_name("summary.json")
    summary.write_text(json.dumps(figures, indent=2, ensure_ascii=False))
    print(render(figures, [*files, summary]))


def make_parser(prog: str | None = None):
    from trl import TrlParser

    return TrlParser((AttributeArguments, AttributeStudentArguments), prog=prog)


if __name__ == "__main__":
    from trl_dpg import cli

    cli.run("attribute", sys.argv[1:])
