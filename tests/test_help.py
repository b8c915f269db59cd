"""`--help` of the commands, and the lists of metrics and rewards."""

import inspect
import json
import re

import pytest
import yaml

from trl_dpg import cli
from trl_dpg.metrics import CombinedMetric, LanguageModelingMetric, WeightPatternMetric
from trl_dpg.scripts.arguments import METRICS, REWARDS, MetricArguments
from trl_dpg.scripts.catalogue import document
from trl_dpg.scripts.help import FIRST, WORDS
from trl_dpg.scripts.registry import call_with, make_metric, make_rewards, resolve


def printed(capsys, *command, status=None):
    if status is None:
        cli.main([*command])
    else:
        with pytest.raises(SystemExit) as raised:
            cli.main([*command])
        assert raised.value.code == status
    captured = capsys.readouterr()
    return captured.err if status == 2 else captured.out


def flags(text):
    return re.findall(r"^  --(\w+)", text, re.MULTILINE)


def test_help_of_dpg_leads_with_the_twenty_fields_one_needs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = printed(capsys, "dpg", "--help", status=0)
    assert flags(text) == [name for names in FIRST["dpg"].values() for name in names]
    assert len(flags(text)) == 20 and len(text.splitlines()) <= 80
    assert [title for title in FIRST["dpg"] if f"\n{title}:\n" in text] == ["run", "generator", "student", "metric"]
    assert "`trl-dpg dpg --help all` lists all" in text and set(WORDS) < set(flags(text))


@pytest.mark.parametrize("command", FIRST)
def test_help_is_short_and_help_all_has_the_rest(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    short = printed(capsys, command, "-h", status=0)
    full = printed(capsys, command, "--help_all", status=0)
    assert printed(capsys, command, "--help", "all", status=0) == full
    assert len(short.splitlines()) <= 80 and set(flags(short)) < set(flags(full))
    others = [flag for flag in flags(full) if flag != "help" and not (flag[:3] == "no_" and flag[3:] in flags(full))]
    assert f"of {len(others)} arguments" in " ".join(short.split())


def test_help_with_a_word_lists_the_arguments_that_have_it(capsys):
    assert flags(printed(capsys, "dpg", "--help", "momentum", status=0)) == ["student_momentum"]
    assert "student_eps_root" in flags(printed(capsys, "dpg", "--help", "student", status=0))
    assert "no argument has 'xyz' in its name" in printed(capsys, "dpg", "--help", "xyz", status=2)


def test_a_recipe_before_help_does_not_hide_it(capsys):
    text = printed(capsys, "dpg", "--config", "recipes/new_language/smollm2.yaml", "--help", status=0)
    assert "output_dir" in flags(text)


@pytest.mark.parametrize(("command", "known"), [("metrics", METRICS), ("rewards", REWARDS)])
def test_the_list_has_every_name_and_argument(command, known, capsys):
    text = printed(capsys, command)
    for name in known:
        assert f"\n{name}\n" in f"\n{text}"
        details = printed(capsys, command, name)
        for argument in document(resolve(name, known, "metric"))[1]:
            assert f"{argument.name} ({argument.kind})" in text and argument.name in details


def takes(name):
    """Parameters of a known metric or reward, also those that it passes on."""
    function = resolve(name, METRICS | REWARDS, "metric")
    parameters = dict(inspect.signature(function).parameters)
    if parameters.pop("kwargs", None) is not None:
        others = {
            "language_modeling": [LanguageModelingMetric],
            "lm_eval": [LanguageModelingMetric, LanguageModelingMetric.from_lm_eval],
            "qr_code": [WeightPatternMetric],
        }
        for other in others[name]:
            parameters = dict(inspect.signature(other).parameters) | parameters
    return {key: value for key, value in parameters.items() if key not in ("kwargs", "self")}


@pytest.mark.parametrize("name", METRICS | REWARDS)
def test_the_arguments_in_the_list_are_those_of_the_signature(name):
    parameters = takes(name)
    if name == "lm_eval":  # makes the dataset
        del parameters["dataset"]
    if name == "qr_code":  # makes the pattern
        del parameters["pattern"]
    arguments = {argument.name: argument.kind for argument in document(resolve(name, METRICS | REWARDS, "metric"))[1]}
    assert set(arguments) == set(parameters)
    for key, kind in arguments.items():
        default = parameters[key].default
        if default is inspect.Parameter.empty:
            assert "optional" not in kind, key
        elif default is not None and "defaults to" in kind:
            assert kind.split("defaults to ")[1] == (f'"{default}"' if isinstance(default, str) else str(default)), key


def example(text):
    return yaml.safe_load(text.split("In a recipe:\n")[1])


@pytest.mark.parametrize("name", METRICS)
def test_the_example_of_a_metric_is_valid(name, capsys, tmp_path, monkeypatch):
    recipe = example(printed(capsys, "metrics", name))
    (tmp_path / "benchmark.jsonl").write_text(json.dumps({"text": "Buenos días."}) + "\n")
    monkeypatch.chdir(tmp_path)
    if name == "lm_eval":  # its task would be downloaded
        assert set(recipe["metric_kwargs"]) <= {argument.name for argument in document(resolve(name, METRICS, ""))[1]}
        return
    metric = make_metric(MetricArguments(**recipe))
    if name == "combined":
        assert isinstance(metric, CombinedMetric) and metric.weights == [1.0, 0.01, 0.0]


@pytest.mark.parametrize("name", REWARDS)
def test_the_example_of_a_reward_is_valid(name, capsys):
    recipe = example(printed(capsys, "rewards", name))
    assert len(recipe["reward_weights"]) == 1 + len(recipe["reward_funcs"])
    if name in ("language_id", "embedding_similarity"):  # their models would be downloaded
        inspect.signature(resolve(name, REWARDS, "")).bind(**recipe["reward_kwargs"][name])
        return
    (reward,) = make_rewards(recipe["reward_funcs"], recipe["reward_kwargs"])
    assert reward.__name__ == name


def test_a_metric_of_ones_own_is_explained_by_its_docstring(capsys):
    assert "Weighted sum of metrics." in printed(capsys, "metrics", "trl_dpg.metrics.CombinedMetric")
    assert "Did you mean 'qr_code'" in printed(capsys, "metrics", "qr_cod", status=2)


@pytest.mark.parametrize("name", ["language_modeling", "weight_pattern"])
def test_arguments_that_do_not_fit_point_to_the_list(name):
    with pytest.raises(ValueError, match=f"`trl-dpg metrics {name}` lists its arguments"):
        call_with(resolve(name, METRICS, "metric"), {"no_such": 1}, "metric_kwargs", name)


def test_help_of_metric_points_to_the_list(capsys):
    assert "trl-dpg metrics" in printed(capsys, "verify", "--help", "metric", status=0)


def metric_of_a_user(scale, **kwargs):
    """
    A metric.

    Args:
        scale (`float`): Its scale.
        kwargs: Further arguments of the tokenizer.
    """


def test_further_arguments_in_a_users_docstring_are_shown_as_they_are(capsys):
    cli.main(["metrics", "tests.test_help.metric_of_a_user"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert {"scale (float)", "kwargs (any)", "Further arguments of the tokenizer."} <= set(lines)
