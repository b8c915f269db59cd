"""
The README and the docs: every block of code in them runs, or is read by the parser of the command it belongs to.

Models and datasets of the Hub are tiny ones, in folders of the same names under the directory that the blocks run in.
"""

import ast
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
import textwrap
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch
import trl
import yaml
from accelerate import PartialState
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset

import trl_dpg
from tests.teacher_server import Server
from tests.tiny import QUIET, make_model, make_tokenizer, on_two_processes
from trl_dpg import cli
from trl_dpg.scripts.registry import make_rewards


ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
BLOCKS = {
    page: [(language, textwrap.dedent(code)) for _, language, code in FENCE.findall(text)]
    for page, text in PAGES.items()
}
LANGUAGES = {"python", "yaml", "bash", "diff", "bibtex", "text"}
"""A block in another language is one that nothing here checks."""

MODELS = ("gpt2", "HuggingFaceTB/SmolLM2-135M", "meta-llama/Llama-3.2-1B-Instruct", "Qwen/Qwen3-0.6B", "runs/spanish")
FILES = ("samples.jsonl", "samples.parquet", "texts.jsonl", "benchmark.jsonl", "spanish.jsonl", "articles.jsonl")
FILES += ("other.jsonl", "corpus.parquet")
TEXTS = [f"w{k} w{k + 1} w{k + 2} w5" for k in range(16)]
MANY = [f"w{k % 9} w{k % 7} w{k % 5} w{k % 11}" for k in range(120)]
PROMPTS = Dataset.from_dict({"prompt": ["w1 w2", "w3"] * 8, "solution": ["w1"] * 16})
ONE_STEP = dict(max_steps=1, max_completion_length=4, **QUIET)
GIVEN = {  # names that a page's Python takes for granted
    "attribution.md": {"dataset": Dataset.from_dict({"text": TEXTS}), "benchmark": TEXTS[:2]},
    "distill.md": {"dataset": Dataset.from_dict({"text": MANY}), "benchmark": TEXTS[:2]},
    "goals.md": {"spanish": TEXTS[:2], "english": TEXTS[2:5]},
    "audit.md": {name: Dataset.from_dict({"text": TEXTS}) for name in ("dataset", "control")},
    "provenance.md": {},
    "concepts.md": {"texts": TEXTS, "spanish": TEXTS[:2], "english": TEXTS[2:5]},
    "serve.md": {"dataset": PROMPTS},
    "README.md": {"texts": TEXTS, "benchmark": TEXTS[:2], "dataset": PROMPTS},
    "batch_rewards.md": {"dataset": PROMPTS},
    "lengths.md": {"dataset": PROMPTS},
    "mix.md": {"texts": TEXTS},
    "tune.md": {"texts": TEXTS, "benchmark": TEXTS[:2]},
}
SMALL = {  # further flags, with which a command takes seconds
    "attribute": "--student_batch_size 8 --num_repeats 1 --overwrite",
    "evaluate": "--seeds 0 --num_samples 8 --student_batch_size 8",
    "audit": "--num_parts 3",
    "generate": "--num_samples 8 --max_completion_length 4 --use_vllm false --overwrite",
    "verify": "--num_directions 3 --num_samples 16 --student_batch_size 8 --max_completion_length 4 "
    "--compare_precision false --try_remedies false",
    "tune": "--num_samples 16 --student_batch_size 8 --max_completion_length 4",
    "report": "",
    "lengths": "",
    "mix": "--num_samples 8 --overwrite --ngram 40",
}
PROMPTS_HERE = ["--dataset_name", "articles.jsonl", "--dataset_train_split", "train"]
SMALL_DPG = "--max_steps 1 --per_device_train_batch_size 32 --num_generations 16 --student_batch_size 16"
SMALL_DPG += " --evaluate false --report_to none"


def blocks(page, language):
    return [code for name, code in BLOCKS[page] if name == language]


def pages_with(language):
    return [page for page in PAGES if blocks(page, language)]


def commands(page):
    """The commands of a page's bash blocks: words without environment variables and comments."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[sum("=" in word for word in line[:1]) :] for line in words if line]


def inline(page, first):
    """Commands in a page's running text, as words. Those with placeholders are left out."""
    spans = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", FENCE.sub("", PAGES[page]))
    found = [span for span in spans if span.split()[0] == first]
    return [shlex.split(span) for span in found if not re.search(r"[<>]|\.\.\.", span)]


def every(first):
    """All commands of all pages that begin with a word."""
    return [
        (page, words)
        for page in PAGES
        for words in commands(page) + inline(page, first)
        if words[0] == first and len(words) > 1
    ]


def make_place(folder):
    """A directory with all that the docs name: models, datasets, recipes."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    for number, name in enumerate(MODELS):
        make_model(seed=number, scale=1.0).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in FILES:
        dataset = Dataset.from_dict({"text": MANY if name.startswith("corpus") else TEXTS})
        dataset.to_parquet(folder / name) if name.endswith("parquet") else dataset.to_json(folder / name)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    first, *_ = blocks("training.md", "yaml")
    recipe = yaml.safe_load(first) | {"metric_kwargs": {"dataset": "spanish.jsonl"}, "bf16": False}
    for name in ("recipe.yaml", "my_recipe.yaml"):
        (folder / name).write_text(yaml.safe_dump(recipe))
    (folder / "scores.yaml").write_text(blocks("attribution.md", "yaml")[0])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    make_place(folder)
    (folder / "runs" / "tuned").mkdir(parents=True)  # `tune` writes such a recipe
    shutil.copy(ROOT / "recipes" / "pattern_67" / "mini.yaml", folder / "runs" / "tuned" / "tuned.yaml")
    return folder


# -- what the pages are made of ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_in_a_language_that_is_tested(page):
    assert {language for language, _ in BLOCKS[page]} <= LANGUAGES
    rest = FENCE.sub("", PAGES[page])
    assert "```" not in rest, "a block that is not closed"
    assert not re.search(r"^    (trl-dpg|trl|python|make|pip|accelerate) ", rest, re.MULTILINE), "use a bash block"


@pytest.mark.parametrize("page", PAGES)
def test_pages_speak_of_no_acceptance_limits_and_no_local_paths(page):
    assert not re.search(r"\bbars?\b", PAGES[page], re.IGNORECASE)
    local = r"(?<![\w./:])(/(home|root|work|tmp|Users|mnt|opt|usr|var)\b|~/|[A-Z]:\\)[^\s`]*"
    assert not re.search(local, PAGES[page])


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page):
    folders = "benchmarks|docs|examples|recipes|tests|trl_dpg"
    named = re.findall(rf"(?<![\w/])(?:{folders})/[\w/.-]+\.(?:py|yaml|md|png)", PAGES[page])
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGES[page])
    folder = ROOT if page == "README.md" else ROOT / "docs"
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [link for link in links if not (folder / link).exists()] == []


def test_the_error_messages_of_the_docs_are_those_of_the_code():
    constants = []
    for path in (ROOT / "trl_dpg").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                values = [value.value if isinstance(value, ast.Constant) else "\0" for value in node.values]
                constants.append("".join(map(str, values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                constants.append(re.sub(r"\{[^}]*\}", "\0", node.value))
    rows = re.findall(r"^\| `([^`]+)`", PAGES["errors.md"], re.MULTILINE)
    assert len(rows) > 5
    for message in rows:
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
        assert any(pattern.search(constant) for constant in constants), message


def test_the_papers_authors_are_those_of_the_trainers_card():
    (bibtex,) = blocks("README.md", "bibtex")
    assert bibtex.split() == trl_dpg.DPGTrainer._paper["citation"].split()
    assert "Tatsunori Hashimoto" in bibtex and "others" not in bibtex


# -- Python -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_hub(place, monkeypatch):
    """The Hub's models and datasets are tiny, and trainers take one step."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: PROMPTS)
    monkeypatch.setattr("trl.rewards.accuracy_reward", lambda completions, **kwargs: [1.0] * len(completions))
    assert trl_dpg.DPGTrainer  # its module must see TRL's own configuration when it is imported
    monkeypatch.setattr(trl_dpg, "DPGConfig", partial(trl_dpg.DPGConfig, **ONE_STEP))
    monkeypatch.setattr(trl, "GRPOConfig", partial(trl.GRPOConfig, **ONE_STEP))


@pytest.mark.parametrize("page", pages_with("python"))
def test_the_python_of_a_page_runs(page, tiny_hub):
    scope = dict(GIVEN.get(page, {}))
    with Server(lambda request, number: {"content": "42"}) as server:
        scope["server"] = server.url
        for code in blocks(page, "python"):
            exec(code, scope)
    if page == "README.md":
        assert scope["out"].scores.shape == (len(TEXTS),) and scope["args"].student_lora_r == 16
        few = trl_dpg.InnerLoopConfig(batch_size=8)
        assert trl_dpg.metagradient(scope["student"], TEXTS, scope["prefers_tea"], few).scores.isfinite().all()
        assert scope["trainer"].reward_func_names == ["dpg"]
    elif page == "attribution.md":
        assert len(scope["best"]) == 5 and scope["result"].scores.shape == (len(TEXTS),)
    elif page == "distill.md":
        assert scope["scores"].shape == (len(MANY),) and scope["regressor"].described.num_held_out == 15
    elif page == "audit.md":
        assert not scope["result"].unwanted  # dataset and control are the same
    elif page == "concepts.md":
        assert scope["out"].scores["spanish"].shape == scope["out"].scores["english"].shape == (len(TEXTS),)
    elif page == "teach.md":
        assert scope["taught"].there == 2 == scope["taught"].results.correct
    elif page == "batch_rewards.md":
        assert scope["trainer"].state.global_step == 1
        common, rare = scope["novelty"](["w1 w2", "w1 w2", "w1 w2", "w3 w4"])[2:]
        assert 0 < common < rare
    elif page == "lengths.md":
        assert scope["trainer"].state.log_history[0]["length_distribution/wasserstein"] > 0
    elif page == "mix.md":
        assert len(scope["mixture"].dataset) == 8
    elif page == "thinking.md":
        assert scope["thought"] == ("Two and two.", "Four.", True) and scope["config"].student_text == "answer"
    else:
        assert page in GIVEN, "say here what the page should have made"


def side(sign):
    (diff,) = blocks("README.md", "diff")
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in ("", " ", sign))


def test_at_most_four_lines_change():
    (diff,) = blocks("README.md", "diff")
    for sign in "+-":
        assert 1 <= sum(line.startswith(sign) for line in diff.splitlines()) <= 4


@pytest.mark.parametrize("sign", ["-", "+"], ids=["before", "after"])
def test_both_sides_of_the_diff_train(sign, tiny_hub):
    config = trl.GRPOConfig if sign == "-" else trl_dpg.DPGConfig
    script = side(sign).replace("train_dataset=dataset,", "train_dataset=dataset, args=args,")
    scope = {"args": config("out", per_device_train_batch_size=8)}
    exec(script, scope)
    assert scope["trainer"].state.global_step == 1


def test_the_batch_reward_of_the_docs_sees_all_ranks(tmp_path):
    process = on_two_processes("tests.test_snippets", str(tmp_path))
    assert process.returncode == 0, process.stderr[-3000:]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    scope = {}
    exec(blocks("batch_rewards.md", "python")[0], scope)
    alone = scope["novelty"](TEXTS)
    assert results[0]["rewards"] + results[1]["rewards"] == pytest.approx(alone)
    assert [result["first"] for result in results] == [8, 8]
    assert {result["error"] for result in results} == {"The reward failed on rank 0: ZeroDivisionError('no judge')"}


def on_a_rank(folder):
    """What each rank of the test above does: slices of different sizes, and an error on rank 0."""
    state = PartialState(cpu=True)
    rank = state.process_index
    novelty, _, on_first_rank = blocks("batch_rewards.md", "python")
    scope = {}
    exec(novelty, scope)
    exec(on_first_rank, scope)

    def judge():
        raise ZeroDivisionError("no judge")

    results = {"rewards": scope["novelty"](TEXTS[:6] if rank == 0 else TEXTS[6:])}
    results["first"] = scope["on_first_rank"](len, TEXTS[: 8 + 8 * rank])
    with pytest.raises(RuntimeError) as raised:
        scope["on_first_rank"](judge)
    results["error"] = str(raised.value)
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    state.wait_for_everyone()  # a rank that leaves early cuts the other off
    state.destroy_process_group()


# -- recipes and commands ---------------------------------------------------------------------------------------------


def read(argv, monkeypatch):
    """Parse a command line as `trl-dpg` does; what it would start, under accelerate or not."""
    read = []
    with monkeypatch.context() as patched:
        if argv[0] in cli.COMMANDS:
            script = importlib.import_module(f"trl_dpg.scripts.{argv[0]}")
            patched.setattr(script, "main", lambda *arguments: read.append(arguments))
        patched.setattr("accelerate.commands.launch.launch_command", read.append)
        try:
            cli.main(argv)
        except SystemExit as stopped:
            assert stopped.code == 0 and "--help" in argv, argv
            return "help"
    (arguments,) = read
    return arguments


def test_the_yaml_of_the_docs_is_read_by_the_commands(tmp_path, monkeypatch):
    """A page's blocks are one recipe, one after the other. A key that the parser does not know would be refused."""
    with_yaml = ["attribution.md", "audit.md", "goals.md", "lengths.md", "reliability.md", "thinking.md"]
    with_yaml += ["training.md", "tune.md"]
    assert pages_with("yaml") == with_yaml
    pages = ("training.md", "tune.md", "thinking.md", "reliability.md")
    settings = yaml.safe_load("\n".join(block for page in pages for block in blocks(page, "yaml")))
    (tmp_path / "audit.yaml").write_text(blocks("audit.md", "yaml")[0])
    script_args, _ = read(["audit", "--config", str(tmp_path / "audit.yaml")], monkeypatch)
    assert set(script_args.wanted) < set(script_args.metrics)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings | {"bf16": False, "output_dir": str(tmp_path)}))
    script_args, training_args, model_args, dataset_args = read(
        ["dpg", "--config", str(tmp_path / "recipe.yaml")], monkeypatch
    )
    assert dataset_args.datasets[1].data_files == "articles.jsonl" and model_args.lora_r == 32
    assert script_args.reward_funcs[0] == "language_id" and training_args.reward_weights == [1.0, 0.0, 0.2]
    assert training_args.generation_batch_size / training_args.student_batch_size == 4
    assert training_args.inner_loop_config().auto == ("learning_rate", "eps_root")
    assert (training_args.student_text, training_args.unfinished_thoughts) == ("answer", "empty")
    lengths = yaml.safe_load("\n".join(blocks("lengths.md", "yaml"))) | {"bf16": False, "output_dir": str(tmp_path)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings | lengths))
    script_args, training_args, *_ = read(["dpg", "--config", str(tmp_path / "recipe.yaml")], monkeypatch)
    (reward,) = make_rewards(script_args.reward_funcs, script_args.reward_kwargs)
    assert reward.target.of("any").median == 400 and training_args.reward_weights == [1.0, 0.5]
    goals = []
    for block in blocks("goals.md", "yaml"):  # each with another goal
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings | yaml.safe_load(block)))
        goals += [
            {**vars(arguments)} for arguments in read(["dpg", "--config", str(tmp_path / "recipe.yaml")], monkeypatch)
        ]
    assert [own["metric_kwargs"]["constraints"] for own in goals if "constraints" in (own.get("metric_kwargs") or {})]
    assert [own["metric_samples"] for own in goals if own.get("metric_samples")] == [500]


def test_every_command_line_of_the_docs_is_read(place, monkeypatch):
    monkeypatch.chdir(place)
    lines = every("trl-dpg")
    assert len(lines) > 15
    for page, (_, *argv) in lines:
        assert argv[0] in cli.COMMANDS, (page, argv)
        if "--config" in argv or "--metric" in argv or "--help" in argv:
            assert read(argv, monkeypatch), (page, argv)


def runnable(page):
    """A page's commands that can run here: neither on several processes nor training of a full size."""
    if page == "warm_start.md":  # each step needs the files of the one before: tests/test_warm_start.py
        return
    for words in commands(page):
        if words[0] == "trl-dpg" and not {"--num_processes", "--accelerate_config", "--help"} & set(words):
            if words[1] in SMALL:
                prompts = PROMPTS_HERE if "my_recipe.yaml" in words and words[1] in ("generate", "verify") else []
                small = SMALL[words[1]]
                if "--distill" in words:
                    small += " --distill_samples 80 --distill_floor -1"
                if "--max_tokens" in words:  # which takes the place of a number of samples
                    small = small.replace("--num_samples 8", "")
                yield [*words[1:], *small.split(), *prompts]
            elif words[1] == "dpg" and any(word.endswith("mini.yaml") for word in words):
                yield [*words[1:], *SMALL_DPG.split()]


def marked(page):
    long = page in ("audit.md", "cot_length.md", "distill.md", "goals.md")  # many regressors, or half a minute
    return pytest.param(page, marks=[pytest.mark.faults] if long else [])


@pytest.mark.parametrize("page", [marked(page) for page in pages_with("bash") if list(runnable(page))])
def test_the_commands_of_a_page_run(page, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for argv in runnable(page):
        try:
            cli.main(argv)
        except SystemExit as stopped:  # these models may well be untrustworthy
            assert (argv[0], stopped.code) in (("verify", 1), ("audit", 3)), capsys.readouterr().err
    made = {"attribution.md": "attribution/top.parquet", "training.md": "runs/spanish_data/train.parquet"}
    made |= {
        "tune.md": "runs/tuned/tune.json",
        "lengths.md": "lengths/target_lognormal.json",
        "mix.md": "mixed/mix.json",
        "logging.md": "runs/pattern_67/report/report.html",
        "experiments.md": "runs/pattern_67/summary.json",
    }
    assert (place / made.get(page, "recipes")).exists()


def test_trls_own_commands_are_read_by_trl(place, monkeypatch):
    monkeypatch.chdir(place)
    for _, (_, command, *argv) in every("trl"):
        parser = importlib.import_module(f"trl.scripts.{command}").make_parser()
        *_, unknown = parser.parse_args_and_config(args=[*argv, "--bf16", "false"], return_remaining_strings=True)
        assert not unknown


def test_flags_that_the_docs_name_exist():
    known = set(launch_command_parser()._option_string_actions) | {"--accelerate_config", "--config"}
    for command in cli.COMMANDS:
        parser = importlib.import_module(f"trl_dpg.scripts.{command}").make_parser()
        known |= set(parser._option_string_actions)
    for path in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', path.read_text()))
    for page in PAGES:
        assert set(re.findall(r"`(--[\w-]+)", FENCE.sub("", PAGES[page]))) <= known, page


def test_other_commands_are_make_pip_and_scripts():
    first_words = {words[0] for page in PAGES for words in commands(page)}
    assert first_words <= {"trl-dpg", "trl", "make", "pip", "python"}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for _, (_, target, *more) in every("make"):
        assert target in targets and not more
    readme = {target for page, (_, target) in every("make") if page == "README.md"}
    assert {"quickstart", "test"} <= readme
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for _, words in every("pip"):
        asked = re.findall(r"\[(.*)\]", " ".join(words))
        assert words[1] == "install" and set(",".join(asked).split(",")) - {""} <= extras


@pytest.mark.parametrize("script", sorted({words[1] for _, words in every("python") if words[1].endswith(".py")}))
def test_a_script_that_is_named_has_the_flags_that_are_named(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    torch.set_num_threads(threads)
    assert not stopped.value.code
    text = capsys.readouterr().out
    for _, words in every("python"):
        if words[1] == script:
            assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[\w-]+", text))


if __name__ == "__main__":
    on_a_rank(sys.argv[1])
