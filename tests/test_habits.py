"""The files around the code agree with it: citation, changelog, workflow, documentation, CONTRIBUTING."""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import datasets
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.tiny import make_model
from trl_dpg import FinetunedStudent, Student, metrics, rewards
from trl_dpg.cli import COMMANDS
from trl_dpg.practice import lengths, mixing, teaching


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCS = "\n".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
API = (ROOT / "docs" / "api.md").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def test_the_citation_is_of_this_version_and_of_the_methods_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    (paper,) = citation["references"]
    assert "2604.08423" in paper["url"] and len(paper["authors"]) == 8


def test_the_changelog_starts_with_unreleased_and_goes_back_in_time():
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert len(headings) == text.count("\n## "), "a heading has another form than [version] - date"
    names = [name for name, _ in headings]
    assert names[0] == "Unreleased" and not headings[0][1]
    versions = [Version(name) for name in names[1:]]
    assert versions == sorted(versions, reverse=True)
    dates = [date for _, date in headings[1:]]
    assert all(dates) and dates == sorted(dates, reverse=True)
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(names) == set(re.findall(r"^\[(.+?)\]: https://", text, re.MULTILINE)), "each heading has its link"


def test_the_workflow_tests_the_python_versions_that_the_classifiers_name():
    prefix = "Programming Language :: Python :: 3."
    named = [f"3.{text.removeprefix(prefix)}" for text in PROJECT["classifiers"] if text.startswith(prefix)]
    assert WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"] == named
    allowed = SpecifierSet(PROJECT["requires-python"])
    earlier = f"3.{int(named[0].split('.')[1]) - 1}"
    assert all(version in allowed for version in named) and earlier not in allowed


def test_the_oldest_versions_of_the_workflow_are_the_lower_bounds(capsys):
    exec((ROOT / ".github" / "oldest.py").read_text(), {"__file__": str(ROOT / ".github" / "oldest.py")})
    pinned = {(pin := Requirement(line)).name: pin.specifier for line in capsys.readouterr().out.split()}
    bounds = {
        requirement.name: specifier.version
        for requirement in map(Requirement, PROJECT["dependencies"])
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    assert {"torch", "transformers", "trl"} <= set(bounds)
    assert {name: str(pinned[name]) for name in bounds} == {name: f"=={version}" for name, version in bounds.items()}


def test_the_templates_can_be_read_and_ask_for_the_environment():
    templates = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*")}
    assert set(templates) == {"bug_report.yml", "feature_request.yml", "config.yml"}
    fields = {field["id"]: field for field in templates["bug_report.yml"]["body"] if "id" in field}
    assert "trl-dpg env" in fields["environment"]["attributes"]["label"] and "env" in COMMANDS
    assert fields["environment"]["validations"]["required"] and fields["reproduction"]["validations"]["required"]


@pytest.mark.parametrize("name", [name for module in (metrics, rewards) for name in module.__all__])
def test_every_metric_and_reward_is_in_the_documentation(name):
    if isinstance(vars(metrics).get(name) or vars(rewards)[name], type):  # and not a constant
        assert re.search(rf"\b{name}\b", DOCS), f"docs/api.md does not mention {name}"


@pytest.mark.parametrize("module", [rewards, lengths, mixing, teaching], ids=lambda module: module.__name__)
def test_every_public_name_of_practice_is_in_the_api(module):
    sections = re.findall(r"^::: (\S+)(?:\n    options:\n      members: \[(.*)\])?$", API, re.MULTILINE)
    members = dict(sections)[module.__name__].split(", ")
    assert sorted(set(module.__all__) - set(members)) == []
    assert {"trl_dpg.length_target", "trl_dpg.thinking", "trl_dpg.student_text"} <= {name for name, _ in sections}


def test_every_command_is_in_the_table_of_the_readme():
    rows = re.findall(r"^\| (`[^|]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    listed = [command for row in rows for command in re.findall(r"`([a-z_]+)`", row)]
    assert [command for command in listed if command in COMMANDS] == list(COMMANDS)


def test_the_worked_example_in_contributing_is_a_metric():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (metric, test) = (
        re.search(rf"    ```python\n((?:(?!```).)*{start}.*?)    ```", text, re.DOTALL).group(1)
        for start in ("class WeightMeanMetric", "def test_weight_mean")
    )
    student = Student(make_model())
    theta = student.initial_theta()
    scope = {
        "__package__": "trl_dpg.metrics",
        "finetuned": lambda: FinetunedStudent(student, (theta + 0.01).requires_grad_(), theta),
        "pytest": pytest,
    }
    for block in (metric, test):
        exec(re.sub(r"^    ", "", block, flags=re.MULTILINE), scope)
    scope["test_weight_mean_is_minus_the_squared_distance"]()


def test_the_tests_leave_the_users_datasets_alone():
    place = "import datasets; print(datasets.config.HF_DATASETS_CACHE)"
    in_a_process = subprocess.run([sys.executable, "-c", place], capture_output=True, text=True, check=True)
    assert in_a_process.stdout.strip() == str(datasets.config.HF_DATASETS_CACHE)
    assert Path(datasets.config.HF_DATASETS_CACHE).parent == Path(tempfile.gettempdir())


def test_what_contributing_and_the_readme_link_to_exists():
    for page in ("CONTRIBUTING.md", "README.md"):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / page).read_text()):
            assert (ROOT / target).exists(), f"{page} links to {target}"
