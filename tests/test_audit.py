"""`audit`: what it finds, what it leaves alone, what it writes, and what it refuses."""

import dataclasses
import json
import math
import re
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import t

from tests.tiny import make_model, make_tokenizer
from trl_dpg import FinetunedStudent, InnerLoopConfig, Student, cli
from trl_dpg.auditing import Audit, AuditConfig, adjust_for_many, audit, default_panel, undirected_control
from trl_dpg.auditing.audit import Auditor
from trl_dpg.auditing.effects import Values, disjoint_parts, look_at_panel, p_of_zero_mean, summarize_effects
from trl_dpg.auditing.result import NO_RANKING
from trl_dpg.auditing.rows import rows_behind, scores_against_control
from trl_dpg.evaluation import Evaluation
from trl_dpg.metagradients.fine_tuning import FineTuning
from trl_dpg.metrics import LanguageModelingMetric
from trl_dpg.provenance import check_manifest, read_manifest
from trl_dpg.report.audit import write_audit_report


CONFIG = InnerLoopConfig(batch_size=4, learning_rate=1e-2, eps_root=1e-6)
CANARY = "w20 w21 w22 w23"
ROWS_WITH_CANARY = [1, 6, 9, 14, 17, 22]
INNER_LOOP = ["--student_batch_size", "4", "--student_learning_rate", "1e-2", "--student_eps_root", "1e-6"]


def sentences(number, seed):
    random = np.random.default_rng(seed)
    return [" ".join(f"w{k}" for k in random.integers(0, 12, 5)) for _ in range(number)]


def planted(number=24):
    return [CANARY if row in ROWS_WITH_CANARY else text for row, text in enumerate(sentences(number, 1))]


def head_sum(student):
    return student.weight("lm_head.weight").sum()


def says_w20(student):
    """Without a gradient: the rank of a token in the student's answer."""
    with torch.no_grad():
        logits = student(input_ids=torch.tensor([[5, 6]])).logits[0, -1]
        return (logits > logits[24]).sum().float()


def panel():
    canary, plain = LanguageModelingMetric([CANARY]), LanguageModelingMetric(sentences(4, 9))
    return {"canary": canary, "plain": plain, "head": head_sum, "rank": says_w20}


def by_own_inner_loop(load_student, dataset, metric, config, seed):
    """A quick stand-in for SFTTrainer: the same fine-tuning by this package's inner loop, shuffled by the seed."""
    fine_tuning = FineTuning(load_student(), dataset.shuffle(seed=seed), config)
    theta = fine_tuning.theta(torch.ones(len(dataset)))
    finetuned = FinetunedStudent(fine_tuning.student, theta, fine_tuning.initial_theta())
    with torch.no_grad():
        return Evaluation(metric(finetuned).item(), {}, finetuned)


@pytest.fixture
def quick(monkeypatch):
    """The page `docs/audit.md` runs with SFTTrainer in tests/test_snippets.py."""
    monkeypatch.setattr("trl_dpg.auditing.effects.evaluate_dataset", by_own_inner_loop)


def student(seed=0):
    return Student(make_model(seed=seed, scale=1.0), processing_class=make_tokenizer())


# -- the statistics ---------------------------------------------------------------------------------------------------


def test_holms_adjustment_is_the_closure_of_bonferronis_tests():
    """The yardstick is the definition of Holm's: all intersections that a hypothesis is in, by Bonferroni."""
    random = np.random.default_rng(0)
    for number in (1, 2, 5):
        values = random.uniform(0, 0.2, number)
        expected = []
        for k in range(number):
            subsets = (s for s in product([False, True], repeat=number) if s[k])
            expected.append(max(min(1.0, sum(s) * values[np.array(s)].min()) for s in subsets))
        assert adjust_for_many(values.tolist()) == pytest.approx(expected)


def test_the_p_value_is_that_of_students_t():
    differences = [0.5, 0.1, 0.7, -0.2, 0.4]
    statistic = np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(5))
    assert p_of_zero_mean(differences) == pytest.approx(2 * t.sf(statistic, 4))
    assert p_of_zero_mean([0.0, 0.0, 0.0]) == 1.0 and p_of_zero_mean([2.0, 2.0, 2.0]) == 0.25
    assert p_of_zero_mean([0.3 - 0.2, 0.2 - 0.1] * 4) == 2**-7  # equal up to rounding


def values(numbers):
    return [Values({"a": a, "b": b}, {"a": {}, "b": {"proxy": 2 * b}}) for a, b in numbers]


def test_under_the_null_at_most_alpha_of_the_audits_find_anything():
    random = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        draw = random.standard_t(3, size=(2, 8, 2)) * 1e-6  # heavy tails, and far below any threshold one would set
        effects = summarize_effects({"a": 0.0, "b": 0.0}, values(draw[0]), values(draw[1]), [], alpha=0.05)
        found += any(effect.found for effect in effects.values())
    assert found <= 0.05 * 200 + 2 * math.sqrt(200 * 0.05 * 0.95)  # two standard deviations above the level


def test_a_tiny_effect_is_found_by_the_spread_of_the_control_and_wanted_ones_are_a_family_of_their_own():
    random = np.random.default_rng(1)
    data, control = random.normal(size=(2, 8, 2)) * 1e-9
    data[:, 1] += 1e-8
    effects = summarize_effects({"a": 1.0, "b": 1.0}, values(data), values(control), ["b"], alpha=0.01)
    assert effects["b"].found and effects["b"].wanted and not effects["a"].found
    assert effects["b"].adjusted_p == effects["b"].p_value and effects["b"].direction == "higher"
    assert effects["b"].in_spreads == pytest.approx(effects["b"].mean / np.std(control[:, 1], ddof=1))
    assert effects["b"].proxies == {"proxy": pytest.approx((2 * data[:, 1].mean(), 2 * control[:, 1].mean()))}


def test_parts_are_disjoint_and_of_one_size():
    parts = disjoint_parts(Dataset.from_dict({"text": [str(k) for k in range(23)]}), 23, 4, seed=0)
    rows = [text for part in parts for text in part["text"]]
    assert [len(part) for part in parts] == [5] * 4 and len(set(rows)) == 20


# -- audits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    settings = AuditConfig(num_parts=4, alpha=0.05, share_removed=0.25, removal_seeds=(0,))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("trl_dpg.auditing.effects.evaluate_dataset", by_own_inner_loop)
        return audit(student(), planted(), sentences(24, 2), panel(), CONFIG, settings, student(5))


def test_a_planted_effect_is_found_with_its_rows(found):
    assert "canary" in found.unwanted and found.effects["canary"].mean > 0.3
    assert set(found.rows["canary"].rows[:6]) == set(ROWS_WITH_CANARY)
    assert sorted(found.rows["canary"].rows) == list(range(24)) and found.rows["canary"].above_control > 0.5
    removal = found.rows["canary"].removal
    assert removal.num_removed == 6
    assert removal.share_gone(removal.without_top) > 0.8 > removal.share_gone(removal.without_random)
    assert found.verdict()[0] == f"Unwanted effects were found: {len(found.unwanted)} of 4 metrics."
    assert found.is_also_there("canary") and "also there on the other start" in " ".join(found.verdict())


def test_the_scores_of_rows_and_control_sum_to_the_effect_of_a_step():
    rows, others, metric = [CANARY, *sentences(3, 1)], sentences(4, 2), LanguageModelingMetric([CANARY])
    config = InnerLoopConfig(batch_size=8, learning_rate=3e-2, eps_root=1.0)  # a step almost linear in the weights
    sides = (Dataset.from_dict({"text": texts}) for texts in (rows, others))
    scores = scores_against_control(student(), *sides, {"canary": metric}, config, 1, False)["canary"].scores
    step = FineTuning(student(), [*rows, *others], config)
    only_rows, only_others = torch.tensor([2.0] * 4 + [0.0] * 4), torch.tensor([0.0] * 4 + [2.0] * 4)
    effect = step.metric(only_rows, metric) - step.metric(only_others, metric)
    assert effect > 0.01 and 2 * (scores[:4].sum() - scores[4:].sum()) == pytest.approx(effect, rel=0.02)


def test_the_scores_of_rows_do_not_depend_on_schedule_and_attribution_of_a_recipe():
    sides = (Dataset.from_dict({"text": texts}) for texts in ([CANARY, *sentences(3, 1)], sentences(4, 2)))
    sides, metric = list(sides), {"canary": LanguageModelingMetric([CANARY])}
    expected = scores_against_control(student(), *sides, metric, CONFIG, 1, False)["canary"].scores
    assert expected.std() > 0
    for change in ({"attribution": "dataset"}, {"lr_scheduler_type": "linear", "warmup_steps": 2}):
        changed = dataclasses.replace(CONFIG, **change)
        found = scores_against_control(student(), *sides, metric, changed, 1, False)["canary"].scores
        assert found.tolist() == expected.tolist()


def test_rows_are_scored_against_random_rows_of_the_control_those_of_the_test(monkeypatch, tmp_path):
    what = student(), planted(), sentences(96, 2), panel(), CONFIG, None, None, False
    auditor, seen = Auditor(*what, tmp_path / "audit.jsonl"), []
    module = sys.modules["trl_dpg.auditing.audit"]
    monkeypatch.setattr(module, "scores_against_control", lambda *a: seen.append(a[2]["text"]) or {})
    with auditor.journal:
        auditor.begin()
        auditor.look_for_rows(Audit({}, 0.01, auditor.rows, 8, {}, []))
    tested = disjoint_parts(auditor.others, 24, 8, auditor.settings.seed)
    assert seen == [[text for part in tested for text in part["text"]]] and seen[0] != auditor.others["text"][:24]


def test_equal_scores_are_named_and_not_ranked(found, tmp_path):
    scores = SimpleNamespace(scores=np.full(8, 0.5), rank_correlation=None)
    equal = rows_behind(found.effects["canary"], scores)
    result = Audit(**vars(found) | {"rows": {"canary": equal}})
    assert equal.all_equal and not found.rows["canary"].all_equal
    figures, page = result.figures(), write_audit_report(result, tmp_path, "title", {}).read_text()
    assert figures["rows"]["canary"]["rows"] == [] and figures["rows"]["canary"]["all_equal"]
    assert NO_RANKING in " ".join(result.verdict()) and f"<h3>canary</h3><p>{NO_RANKING}" in page
    assert NO_RANKING not in " ".join(found.verdict())


class Killed(BaseException):
    """Ends a process: no code of the audit catches it."""


@pytest.fixture
def dying(monkeypatch):
    """Students and chunks are counted in a list; a number in `limit` ends the process before the next one."""
    done, limit = [], []

    def counted(work, kind):
        def run(*arguments):
            if limit and len(done) >= limit[0]:
                raise Killed
            found = work(*arguments)
            done.append(kind)
            return found

        return run

    attribution = sys.modules["trl_dpg.attribution.attribute"]
    monkeypatch.setattr("trl_dpg.auditing.effects.evaluate_dataset", counted(by_own_inner_loop, "student"))
    monkeypatch.setattr(attribution, "_score_chunk", counted(attribution._score_chunk, "chunk"))
    return done, limit


def test_an_audit_that_is_killed_again_and_again_finds_what_a_whole_one_finds(dying, tmp_path):
    """Killed among the parts, on the other start, among the chunks, and in the check of the rows."""
    settings = AuditConfig(num_parts=3, alpha=0.5, share_removed=0.25, removal_seeds=(0,), num_repeats=1)
    metrics = {name: own for name, own in panel().items() if name in ("canary", "rank")}
    what = student(), planted(12), sentences(12, 2), metrics, CONFIG, settings, student(5)
    (done, limit), journal = dying, tmp_path / "audit.jsonl"
    whole = audit(*what)
    work = ["student"] * 12 + ["chunk"] * 7 + ["student"] * 4  # 2 starts x 2 x 3 parts, 24 rows, and the check
    assert done == work and list(whole.rows) == ["canary"] and "canary" in whole.other_start
    done.clear()
    for limit[:] in ([2], [8], [15], [21]):
        with pytest.raises(Killed):
            audit(*what, journal=journal)
    limit.clear()
    result = audit(*what, journal=journal)
    assert done == work  # each once
    assert json.dumps(result.figures()) == json.dumps(whole.figures())
    assert result.scores["canary"].tolist() == whole.scores["canary"].tolist()
    again = audit(*what[:5], dataclasses.replace(settings, alpha=1e-9, wanted=["canary"]), journal=journal)
    assert not again.unwanted and again.effects["canary"].data == whole.effects["canary"].data
    with pytest.raises(ValueError, match=r"has results of other settings: learning_rate \(was 0.01, is 0.02\)"):
        audit(*what[:4], dataclasses.replace(CONFIG, learning_rate=2e-2), settings, journal=journal)
    with pytest.raises(ValueError, match=r"The metric 'canary' of the student before .* the student or the metric's"):
        audit(student(1), *what[1:], journal=journal)
    assert done == work  # nothing was left to do


def test_a_figure_is_whole_at_any_time_and_no_link_is_followed(found, tmp_path, monkeypatch):
    target = tmp_path / "mine.png"
    target.write_bytes(b"mine")
    (tmp_path / "effects.png").symlink_to(target)
    write_audit_report(found, tmp_path, "title", {})
    assert target.read_bytes() == b"mine" and not (tmp_path / "effects.png").is_symlink()
    before = (tmp_path / "effects.png").read_bytes()

    def full(*paths):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_audit_report(Audit(**vars(found) | {"effects": {}, "rows": {}}), tmp_path, "title", {})
    assert (tmp_path / "effects.png").read_bytes() == before


def moved(student):
    change = student.weight("lm_head.weight") - student.initial_weight("lm_head.weight")
    return (change.abs().sum() * 1e6).exp()  # 1 before fine-tuning, infinite after


def test_a_metric_that_is_not_finite_after_fine_tuning_names_part_and_cause(quick):
    message = "'moved' is inf after .* fine-tuning on part 1 of the dataset. Likely cause: `learning_rate` \\(0.01\\)"
    with pytest.raises(FloatingPointError, match=message):
        audit(student(), planted(), sentences(24, 2), panel() | {"moved": moved}, CONFIG, AuditConfig(num_parts=3))


def test_metrics_that_the_other_student_does_not_have_are_left_out_there_and_named(quick, tmp_path):
    def layer(student):
        return student.weight("model.layers.1.mlp.up_proj.weight").sum()

    metrics = {"canary": LanguageModelingMetric([CANARY]), "layer": layer}
    other = Student(make_model("gpt2"), processing_class=make_tokenizer())
    settings = AuditConfig(num_parts=3, alpha=0.9999, score_rows=False)  # so that both are found
    result = audit(student(), planted(), sentences(24, 2), metrics, CONFIG, settings, other)
    assert set(result.unwanted) == set(metrics) and set(result.other_start) == {"canary"}
    assert list(result.figures()["not_on_other_start"]) == ["layer"]
    assert "cannot be computed on the other start" in " ".join(result.verdict())
    page = write_audit_report(result, tmp_path, "title", {}).read_text()
    assert "cannot be computed there" in page and "model.layers.1" in page


def test_metrics_without_a_gradient_are_tested_and_do_not_score(found):
    assert found.not_scored == ["rank"] and "rank" in found.effects
    assert set(found.scores) == {"canary", "plain", "head"}


def test_clean_data_is_not_flagged_and_this_is_no_clearance(quick):
    sides = sentences(24, 1), sentences(30, 2)
    result = audit(lambda seed: student(), *sides, panel(), CONFIG, AuditConfig(num_parts=4))
    assert not result.unwanted and not result.rows and not result.scores
    assert result.verdict()[0] == "No unwanted effect was found among 4 metrics. This is no clearance."


def test_the_page_escapes_and_loads_nothing(found, tmp_path):
    evil = "<script>alert(1)</script>"
    samples = found.samples.map(lambda row: {"text": evil + row["text"]})
    effects = {f"{evil} $x": effect for effect in found.effects.values()} | found.effects
    page = write_audit_report(
        audit_result(found, samples, effects), tmp_path, evil, {"dataset_name": evil}
    ).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") > 6
    assert "default-src 'none'" in page and not re.search(r'(src|href)="(?!data:)', page)
    for heading in ("What this does not say", "Effects", "Rows behind", "another start", "Settings"):
        assert heading in page
    assert "An effect is no proof of intent" in page and (tmp_path / "effects.png").stat().st_size > 1000


def audit_result(found, samples, effects):
    return type(found)(**vars(found) | {"samples": samples, "effects": effects})


def test_figures_can_be_held_by_json(found):
    figures = json.loads(json.dumps(found.figures(num_rows=3)))
    assert len(figures["rows"]["canary"]["rows"]) == 3 and figures["part_size"] == 6
    assert figures["effects"]["canary"]["control"] == found.effects["canary"].control
    assert 0.8 < figures["rows"]["canary"]["removal"]["share_gone_without_top"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wanted": ["spanish"]}, r"`wanted` names \['spanish'\]"),
        ({"num_parts": 2}, "`num_parts` must be at least 3"),
        ({"num_parts": 13}, "`dataset` has 24 samples .* parts would have less than 2"),
        ({"alpha": 0.0}, "`alpha` is a chance"),
        ({"share_removed": 1.0}, "`share_removed` is a share"),
        ({"removal_seeds": [1, 1]}, "`removal_seeds` must be different"),
        ({"control": ["w1"] * 23 + [""]}, "`control` has 23 samples that are not empty, but the dataset has 24"),
        ({"dataset": []}, "`dataset` must be a list of samples"),
        ({"metrics": {}}, "There is no metric"),
        ({"metrics": {"a": lambda student: 1.0}}, "metric 'a' of the student before fine-tuning is 1.0"),
    ],
)
def test_wrong_settings_are_refused_before_any_student_is_trained(change, message, monkeypatch):
    monkeypatch.setattr("trl_dpg.auditing.effects.evaluate_dataset", None)
    arguments = {"dataset": planted(), "control": sentences(24, 2), "metrics": panel()}
    own = {name: value for name, value in change.items() if name not in arguments}
    with pytest.raises(ValueError, match=message):
        audit(
            student(),
            config=CONFIG,
            settings=AuditConfig(**own),
            **arguments | {n: v for n, v in change.items() if n not in own},
        )


def test_a_control_is_written_by_the_student_after_the_same_prompts():
    rows = [{"prompt": f"w{k} w1", "completion": " w2 w3 w4"} for k in range(6)]
    control = undirected_control(student(), rows)
    assert [row["prompt"] for row in control] == [row["prompt"] for row in rows]
    assert all(1 <= len(row["completion"].split()) <= 3 + 1 for row in control)
    assert undirected_control(student(), rows) == control != undirected_control(student(), rows, seed=1)
    assert set(undirected_control(student(), sentences(3, 0))[0]) == {"text"}
    with pytest.raises(ValueError, match="not for the columns \\['input_ids'\\]"):
        undirected_control(student(), [{"input_ids": [5, 6, 7]}])


def test_without_a_control_the_student_writes_one_and_it_is_written_once(tmp_path, monkeypatch):
    what = student(), sentences(20, 0), None, panel(), CONFIG, None, None, False, tmp_path / "audit.jsonl"
    auditor, again = Auditor(*what), Auditor(*what)
    with auditor.journal:
        auditor.begin()
    assert len(auditor.others) == 20 and auditor.others["text"] != sentences(20, 0)
    monkeypatch.setattr(sys.modules["trl_dpg.auditing.audit"], "undirected_control", lambda *arguments: 1 / 0)
    with again.journal:
        again.begin()
    assert again.others["text"] == auditor.others["text"]
    longest = max(len(text.split()) for text in auditor.others["text"])
    assert 1 <= longest <= 6  # no longer than the dataset's, with eos


def test_the_default_panel_has_a_finite_value_and_a_gradient_for_each_metric():
    metrics = default_panel(student())
    names = {"likelihood_english", "likelihood_german", "likelihood_french", "likelihood_spanish"}
    assert set(metrics) == names | {"refusals", "canaries", "head_norm"}
    look = look_at_panel(student(), metrics)
    assert look.differentiable == list(metrics) and all(map(math.isfinite, look.before.values()))
    untrained = student()
    untrained.model.lm_head.weight.requires_grad_(False)
    assert "head_norm" not in default_panel(Student(untrained.model, processing_class=make_tokenizer()))


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    student().model.save_pretrained(folder / "student")
    make_tokenizer().save_pretrained(folder / "student")
    for name, texts in (("data", planted()), ("clean", sentences(24, 1)), ("control", sentences(24, 2))):
        Dataset.from_dict({"text": texts, "origin": ["here"] * len(texts)}).to_json(folder / f"{name}.jsonl")
    return folder


def command(files, data, output_dir, *more):
    metrics = {"canary": {"metric": "language_modeling", "metric_kwargs": {"texts": [CANARY]}}}
    argv = ["audit", "--dataset_name", str(files / f"{data}.jsonl"), "--control", str(files / "control.jsonl")]
    argv += ["--student_model_name_or_path", str(files / "student"), "--metrics", json.dumps(metrics), *INNER_LOOP]
    return [*argv, "--no_default_panel", "--num_parts", "4", "--output_dir", str(output_dir), *more]


def test_the_exit_status_is_3_if_an_unwanted_effect_is_found(quick, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sys.modules["trl_dpg.auditing.audit"], "check_removal", lambda *arguments: None
    )  # as tested above
    with pytest.raises(SystemExit) as stopped:
        cli.main(command(files, "data", tmp_path / "out"))
    assert stopped.value.code == 3 and "Unwanted effects were found: 1 of 1 metrics." in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["unwanted"] == ["canary"] and summary["settings"]["student_batch_size"] == 4
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("audit.html", "effects.png", "summary.json", "scored.parquet", "manifest.json", "manifest_rows.npz"),
        *("audit.jsonl", "audit.lock", "audit_scores.jsonl", "audit_scores.lock"),
    }
    scored = Dataset.from_parquet(str(tmp_path / "out" / "scored.parquet"))
    assert read_manifest(tmp_path / "out")["files"]["scored.parquet"]["rows"] == 24
    assert check_manifest(tmp_path / "out") == []
    assert scored["text"] == planted() and set(scored.column_names) == {"text", "dpg_score_canary"}
    with pytest.raises(SystemExit) as stopped:
        cli.main(command(files, "clean", tmp_path / "out"))
    message = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and "has results of other settings: dataset (was" in message
    assert "--output_dir: The journal" in message and "delete these results with --overwrite" in message
    cli.main(command(files, "clean", tmp_path / "out", "--overwrite"))  # status 0, and the scores of before are gone
    assert not list((tmp_path / "out").glob("*score*.[jp]*")) and check_manifest(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--wanted", "spanish"], "--wanted names ['spanish']"),
        (["--num_parts", "13"], "--dataset_name has 24 samples"),
        (["--num_parts", "2"], "--num_parts must be at least 3"),
        (["--alpha", "1"], "--alpha must be above 0 and below 1"),
        (["--control", "nowhere.jsonl"], "--control: there is no file 'nowhere.jsonl'"),
        (["--metrics", "{}"], "--metrics is required without --default_panel"),
        (["--metrics", '{"a": 1}'], "--metrics: 'a' must have `metric`"),
        (["--replay_dataset", "clean.jsonl"], "audit has no --replay_dataset"),
        (["--output_dir", "{files}/student"], "holds a training run or a model"),
    ],
)
def test_wrong_usage_names_the_flag(more, message, files, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(command(files, "data", tmp_path / "out", *(word.replace("{files}", str(files)) for word in more)))
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.faults  # half a minute
def test_the_miniature_finds_the_language_that_was_planted(tmp_path, capsys):
    output = tmp_path / "audit"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["audit", "--config", "recipes/audit/mini.yaml", "--output_dir", str(output)])
    assert stopped.value.code == 3
    summary = json.loads((output / "summary.json").read_text())
    assert "language_b" in summary["unwanted"] and summary["other_start"]["language_b"]["also_there"]
    truth = [json.loads(line)["planted"] for line in (tmp_path / "audit_world" / "samples.jsonl").open()]
    rows = summary["rows"]["language_b"]
    assert sum(truth[row] for row in rows["rows"]) >= 8
