"""Metrics and rewards by their names or dotted import paths."""

import difflib
import importlib
import inspect
import os
import sys
from typing import Any

from .arguments import METRICS, REWARDS, DPGScriptArguments, MetricArguments, UsageError, from_json
from .data import load_data


LISTED = {"metrics": METRICS, "rewards": REWARDS}
"""The commands that list metrics and rewards."""


def resolve(name: str, known: dict[str, str], flag: str) -> Any:
    """The object with a known name or a dotted import path."""
    path = known.get(name, name)
    module, _, attribute = path.rpartition(".")
    if not module:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"--{flag}: unknown name {name!r}.{hint} Choose one of {', '.join(known)}, or a dotted path.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the user's own modules, as in TRL's scripts
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UsageError(f"--{flag}: could not import {path!r} ({error}).") from error


def language_modeling(
    dataset: str | None = None,
    config: str | None = None,
    split: str = "train",
    texts: list | None = None,
    **kwargs,
):
    """
    Minus the language-modelling loss on a dataset: the mean over all its supervised tokens, in nats. It is the
    [`LanguageModelingMetric`] of one of `dataset` and `texts`.

    Args:
        dataset (`str`, *optional*):
            A Hub id, or a file (json, jsonl, parquet, csv, txt), with samples in any format of SFTTrainer. The loss of
            a prompt-completion pair is that of its completion.
        config (`str`, *optional*):
            Configuration of a dataset of the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Its split, e.g. `"test[:500]"`.
        texts (`list`, *optional*):
            The samples themselves, in the place of a dataset.
        kwargs:
            `batch_size`, `max_length` and `add_eos` of [`LanguageModelingMetric`].
    """
    from trl_dpg.metrics import LanguageModelingMetric

    inspect.signature(LanguageModelingMetric).bind_partial(None, **kwargs)  # before anything is loaded
    if (dataset is None) == (texts is None):
        raise UsageError("--metric_kwargs: language_modeling needs one of `dataset` (a file or Hub id) and `texts`.")
    if dataset is not None:
        texts = load_data(dataset, config, split, flag="metric_kwargs")
    return LanguageModelingMetric(texts, **kwargs)


def lm_eval(**kwargs):
    """
    Minus the loss of the correct answers of a task of lm-eval given their contexts, in nats per token. Needs the
    `lm-eval` extra. The task's dataset is downloaded.

    Args:
        kwargs:
            Those of [`LanguageModelingMetric.from_lm_eval`].
    """
    from trl_dpg.metrics import LanguageModelingMetric

    return LanguageModelingMetric.from_lm_eval(**kwargs)


def combined(
    metrics: list[dict[str, Any]],
    score_parts: bool | None = None,
    constraints: dict[str, float | dict[str, float]] | None = None,
):
    """
    Weighted sum of metrics, a [`CombinedMetric`], some of which must not fall.

    Args:
        metrics (`list[dict]`):
            The metrics: entries with `metric` (a name or dotted path), and perhaps `metric_kwargs`, `weight` (1 by
            default; 0 with a constraint) and `name` (in logs; that of the metric by default).
        score_parts (`bool`, *optional*):
            Whether the samples are scored by each part as well, for logs. By default where this costs next to nothing:
            with one student step, and with first-order attribution. Elsewhere, each part takes about a second
            derivative of its own.
        constraints (`dict`, *optional*):
            Limits for some of the metrics, by their names: the student's fine-tuning may lower each by this much at
            most. A number, or a mapping with `eps` and perhaps `step_size`, `damping` and `multiplier`.
    """
    from trl_dpg.metrics import CombinedMetric, Constraint

    if not isinstance(metrics, list) or not metrics:
        raise UsageError("--metric_kwargs: combined needs `metrics`, a list of metrics.")
    for entry in metrics:
        known = {"metric", "metric_kwargs", "weight", "name"}
        if not isinstance(entry, dict) or "metric" not in entry or set(entry) - known:
            raise UsageError(
                "--metric_kwargs: an entry of combined's `metrics` has `metric` and perhaps `metric_kwargs`, `weight` "
                f"and `name`, got {entry!r}."
            )
    parts = [named_metric(str(entry["metric"]), entry.get("metric_kwargs")) for entry in metrics]
    names = [entry.get("name", entry["metric"]) for entry in metrics]
    if not isinstance(constraints or {}, dict):
        raise UsageError(
            "--metric_kwargs: combined's `constraints` must be a mapping from names of its metrics, got "
            f"{constraints!r}."
        )
    limits = {
        name: call_with(Constraint, own if isinstance(own, dict) else {"eps": own}, "metric_kwargs", "constraints")
        for name, own in (constraints or {}).items()
    }
    weights = [None if entry.get("weight") is None else float(entry["weight"]) for entry in metrics]
    return CombinedMetric(parts, weights, score_parts, names, limits)


def make_metric(arguments: MetricArguments):
    """The target metric that the arguments name."""
    return named_metric(str(arguments.metric), from_json("metric_kwargs", arguments.metric_kwargs))


def make_held_out_metrics(arguments: DPGScriptArguments) -> dict[str, Any]:
    """The metrics of the fresh students by name."""
    return make_metrics("held_out_metrics", arguments.held_out_metrics or {})


def make_metrics(flag: str, entries: Any) -> dict[str, Any]:
    """Several metrics by name, from their entries in a flag."""
    metrics = {}
    for name, entry in entries.items():
        try:
            metrics[name] = named_metric(str(entry["metric"]), entry.get("metric_kwargs"))
        except UsageError as error:
            raise UsageError(f"--{flag}: {name!r}: {error}") from error
    return metrics


def named_metric(name: str, kwargs: dict[str, Any] | None) -> Any:
    """The metric with a known name or a dotted import path."""
    metric = resolve(name, METRICS, "metric")
    if kwargs or name in METRICS or isinstance(metric, type):
        return call_with(metric, kwargs or {}, "metric_kwargs", name)
    return metric


def make_rewards(names: list[str] | None, kwargs: dict | None) -> list:
    """The further rewards by their names. `kwargs` has the arguments of some of them."""
    kwargs = kwargs or {}
    found = {name: resolve(name, REWARDS, "reward_funcs") for name in names or []}
    strangers = set(kwargs) - set(found)
    if strangers:
        raise UsageError(f"--reward_kwargs has arguments for {sorted(strangers)}, which are not in --reward_funcs.")
    return [
        call_with(reward, kwargs.get(name, {}), "reward_kwargs", name)
        if name in kwargs or isinstance(reward, type)
        else reward
        for name, reward in found.items()
    ]


def call_with(function: Any, kwargs: dict[str, Any], flag: str, name: str) -> Any:
    """`function(**kwargs)`. Arguments that it does not take or refuses are usage errors of a flag."""
    listed = next((command for command, known in LISTED.items() if name in known), None)
    hint = f" `trl-dpg {listed} {name}` lists its arguments." if listed else ""
    try:
        inspect.signature(function).bind(**kwargs)
    except TypeError as error:
        raise UsageError(f"--{flag} does not fit {name!r}: {error}.{hint}") from error
    try:
        return function(**kwargs)
    except UsageError:
        raise
    except TypeError as error:
        raise UsageError(f"--{flag} of {name!r}: {error}.{hint}") from error
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(f"--{flag} of {name!r}: {error}") from error
