"""What a metric or a reward is and takes, read from its docstring and its signature."""

import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

import yaml
from trl import TrlParser

from .registry import resolve


@dataclass
class Argument:
    """
    One argument of a metric or a reward.

    Attributes:
        name (`str`): Its name.
        kind (`str`): Its type, and whether it is optional, as in the docstring.
        text (`str`): What it is.
    """

    name: str
    kind: str
    text: str

    def describe(self) -> str:
        return f"{self.name} ({self.kind})"


def document(thing: Any) -> tuple[str, list[Argument]]:
    """
    What a function or class does, and its arguments.

    The entry `kwargs` of a docstring, e.g. "`a` and `b` of [`Class`]", stands for these arguments of that class in
    `trl_dpg.metrics`. If it names none, it stands for all of them. Any other text of this entry is shown as it is.
    """
    docstring = inspect.getdoc(thing) or "No docstring."
    about, _, arguments = docstring.partition("\nArgs:\n")
    arguments = re.split(r"\n(?=\S)", arguments)[0]
    found = []
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(arguments).strip()):
        match = re.fullmatch(r"(\w+)(?: \((.*?)\))?:\s+(.*)", entry, re.DOTALL)
        if match is None:
            continue
        name, kind, text = match.groups()
        text = " ".join(text.split())
        others = _arguments_of_another(text) if name == "kwargs" else []
        found += others or [Argument(name, plain(kind or "any"), plain(text))]
    return plain(about.strip()), found


def _arguments_of_another(text: str) -> list[Argument]:
    """Those that "`a` and `b` of [`Class`]" names, from the docstring of `trl_dpg.metrics.Class`, if there is one."""
    import trl_dpg.metrics

    names, _, rest = text.rpartition(" of [`")
    thing: Any = trl_dpg.metrics
    try:
        for part in rest.partition("`]")[0].split("."):
            thing = getattr(thing, part)
    except AttributeError:  # a docstring of a user, of whose classes nothing is known
        return []
    chosen = re.findall(r"`(\w+)`", names)
    return [argument for argument in document(thing)[1] if argument.name in chosen or not chosen]


def plain(text: str) -> str:
    """A docstring's text without its marks."""
    return re.sub(r"\[?`~?\.?([^`]*)`\]?", r"\1", text).replace("*optional*", "optional")


def listing(known: dict[str, str], command: str, flag: str) -> str:
    """All metrics or rewards: the name, one sentence, and the arguments of each."""
    lines = []
    for name in known:
        about, arguments = document(resolve(name, known, flag))
        sentence = re.split(r"(?<=[.:]) ", " ".join(about.split()))[0].rstrip(":")
        lines += [name, *textwrap.wrap(sentence, 100, initial_indent="    ", subsequent_indent="    ")]
        lines += [f"      {argument.describe()}" for argument in arguments]
    return "\n".join([*lines, "", f"`trl-dpg {command} NAME` says what the arguments are, and shows an example."])


def details(name: str, known: dict[str, str], example: str, flag: str) -> str:
    """One metric or reward in full: its docstring, its arguments and an example."""
    about, arguments = document(resolve(name, known, flag))
    lines = [name, "", textwrap.indent(about, "    "), "", "Arguments:" if arguments else "It has no arguments."]
    for argument in arguments:
        lines += [f"    {argument.describe()}"]
        lines += textwrap.wrap(argument.text, 100, initial_indent="        ", subsequent_indent="        ")
    if example:
        lines += ["", "In a recipe:", textwrap.indent(example, "    ").rstrip()]
    return "\n".join(lines)


def show(name: str | None, known: dict[str, str], recipe: dict[str, Any], command: str, flag: str) -> None:
    """Print all metrics or rewards, or one in full with keys of a recipe as an example."""
    if name is None:
        print(listing(known, command, flag))
    else:
        print(details(name, known, as_yaml(recipe) if recipe else "", flag))


def name_parser(what: str, prog: str | None = None) -> TrlParser:
    """The parser of a command whose argument is a name."""
    parser = TrlParser(prog=prog, usage="%(prog)s [name]")
    parser.add_argument("name", nargs="?", help=f"a {what}'s name or dotted import path")
    return parser


def as_yaml(recipe: dict[str, Any]) -> str:
    """Keys of a recipe as YAML."""
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=100)
