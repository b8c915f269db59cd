"""The HTML report: complete, self-contained, and safe against what a run may have written."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
from datetime import datetime
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.small_runs import dpg_config
from tests.tiny import make_model, make_tokenizer
from trl_dpg import DPGReward, Student, cli
from trl_dpg.callbacks import describe_batch, run_config
from trl_dpg.metrics import WeightPatternMetric
from trl_dpg.reward import ScoredBatch
from trl_dpg.scripts import report


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '<img src="https://example.com/x.png"><script>alert(1)</script> $x_$ & "quotes"'
METRIC = WeightPatternMetric([[1, -1], [1, 1]])


def write_run(folder, seed=0, steps=4, per_token=True, completion=EVIL, num_samples=6):
    """The files of a run, as the trainer and `trl-dpg dpg` write them."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        scores = torch.randn(32, generator=generator, dtype=torch.float64) * 1e-3
        picture = torch.randn(2, 2, generator=generator).sign().int().tolist()
        batch = ScoredBatch(["a prompt"] * 32, [completion] * 32, scores, {"picture": picture, "scanned_text": EVIL})
        if per_token:
            batch.tokens = [re.findall(r"\W*\w*", completion)] * 32
            batch.token_scores = [torch.randn(len(batch.tokens[0]), generator=generator) for _ in range(32)]
        after = -1.0 + 0.1 * step + 0.1 * scores[0].item() * 1e3
        scalars = {"loss": 0.1, "dpg/metric_before": -1.0, "dpg/metric_after": after, "dpg/pixel_accuracy": 0.5}
        scalars |= {"dpg/student_loss/first": 3.0, "dpg/student_loss/last": 2.0, "rewards/contains/mean": 0.1}
        described = describe_batch(batch, num_samples)
        lines.append({"step": step, "epoch": 0.1, "mode": "train", "scalars": scalars, **described})
        if step % 2 == 0:
            evaluated = {f"eval_{name}": value for name, value in scalars.items()}
            lines.append({"step": step, "epoch": 0.1, "mode": "eval", "scalars": evaluated, **described})
    lines.append({"step": steps, "epoch": 0.1, "mode": "train", "scalars": {"train_runtime": 12.0}})
    (folder / "dpg_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = dpg_config(folder, seed=seed, run_name=EVIL)
    reward = DPGReward(Student(make_model(), make_tokenizer()), METRIC)
    (folder / "dpg_config.json").write_text(json.dumps(run_config(args, reward)))
    figures = {"metric": -0.5 - seed, "pixel_accuracy": 0.75, "picture": [[1, 1], [1, 1]], "samples": [EVIL] * 2}
    (folder / "summary.json").write_text(json.dumps({"trained": figures, "untrained": figures}))
    (folder / "trainer_state.json").write_text(json.dumps({"max_steps": 10}))
    return folder


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.links, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name == "src"]
        self.links += [value for name, value in attrs if name in ("href", "srcset", "data", "action", "poster")]

    def handle_data(self, data):
        self.words.append(data)


def make_report(*folders, **kwargs):
    path = report.main(report.ReportArguments(run_dir=[str(folder) for folder in folders], **kwargs))
    return path, path.read_text()


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / f"seed_{seed}", seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def page(seeds, tmp_path_factory):
    return make_report(*seeds, output_dir=str(tmp_path_factory.mktemp("report")), title="Two <b>seeds</b>")


def test_the_report_is_one_file_with_its_images_inside(page):
    path, text = page
    assert path.stat().st_size <= 5e6
    parsed = Page(text)
    assert parsed.links == [] and "url(" not in report.STYLE and "@import" not in report.STYLE
    assert parsed.tags.count("img") == len(parsed.sources) == 4
    for source in parsed.sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert image.format == "PNG" and min(image.size) > 50 and len(np.unique(np.asarray(image))) > 5
    names = {"curves.png", "picture.png", "score_histograms.png", "more_curves.png", "report.html"}
    assert {file.name for file in path.parent.iterdir()} == names


def test_what_a_run_wrote_is_text_and_never_markup(page):
    parsed = Page(page[1])
    assert "script" not in parsed.tags and "b" not in parsed.tags
    text = "".join(parsed.words)
    assert "Two <b>seeds</b>" in text and EVIL in text


def test_the_report_has_what_it_promises(page):
    text = "".join(Page(page[1]).words)
    for heading in ("Curves", "The picture over time", "Fresh students", "Score histograms", "Best and worst samples"):
        assert heading in text
    for part in ("Settings", "Environment", "WeightPatternMetric", "4 of 10", "12 s", "-1 (-1.5 to -0.5)", "torch"):
        assert part in text
    assert "seed" in text and "0 / 1" in text  # settings that differ are given for each run


def test_tokens_are_coloured_by_the_signs_and_sizes_of_their_scores():
    sample = {"completion": "ab<c", "tokens": ["a", "b", "<c"], "token_scores": [2.0, -1.0, 0.0]}
    assert report.heat_map(sample, 2.0) == (
        '<span style="background:rgba(31,119,180,0.75)" title="2">a</span>'
        '<span style="background:rgba(255,127,14,0.38)" title="-1">b</span>'
        '<span style="background:rgba(255,127,14,0.00)" title="0">&lt;c</span>'
    )
    assert report.heat_map({"completion": "ab<c"}, 1.0) == "ab&lt;c"


def test_bands_reach_from_the_lowest_to_the_highest_run_where_all_have_a_value():
    axis = Figure().subplots()
    report.plot_mean_and_range(axis, [{1: 0.0, 2: 1.0, 3: 5.0}, {1: 2.0, 2: 5.0}], "x", "k")
    assert axis.lines[0].get_xydata().tolist() == [[1, 1.0], [2, 3.0]]
    band = axis.collections[0].get_paths()[0].vertices
    assert (band[:, 0].min(), band[:, 0].max(), band[:, 1].min(), band[:, 1].max()) == (1, 2, 0.0, 5.0)


def test_steps_are_spread_with_the_first_and_the_last():
    assert report.spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert report.spread([1, 2], 4) == [1, 2]


def test_a_bare_log_of_a_run_that_goes_on_is_enough(tmp_path):
    """No other file, no samples, and a last line that is only half written."""
    folder = write_run(tmp_path / "run", steps=1, per_token=False, num_samples=0)
    for name in ("dpg_config.json", "summary.json", "trainer_state.json"):
        (folder / name).unlink()
    first = json.loads((folder / "dpg_log.jsonl").read_text().split("\n")[0])
    first["readout"] = {}
    (folder / "dpg_log.jsonl").write_text(json.dumps(first) + '\n{"step": 2, "ep')
    path, text = make_report(folder)
    assert path == folder / "report" / "report.html"
    assert "not finished; last log line" in text and "picture" not in text and "Best and worst" not in text


def test_long_texts_and_long_runs_stay_below_five_megabytes(tmp_path):
    folder = write_run(tmp_path / "run", steps=12, completion="a long <story> " * 400, num_samples=16)
    assert make_report(folder)[0].stat().st_size <= 5e6


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_chromium_shows_all_images_and_asks_for_nothing(page, tmp_path):
    """The page itself, with a script that writes down what the browser did with it."""
    script = """<script>addEventListener("load", () => {
        const images = [...document.images].map(image => image.complete ? image.naturalWidth : 0)
        const requests = performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 60))
        const seen = {images, requests, title: document.title}
        document.body.innerHTML = "<pre>" + btoa(JSON.stringify(seen)) + "</pre>"
    })</script>"""
    copy = tmp_path / "page.html"
    copy.write_text(
        page[1].replace("default-src 'none'", "script-src 'unsafe-inline'").replace("</body>", script + "</body>")
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --dump-dom --virtual-time-budget=10000"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'chromium'}", copy.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    seen = json.loads(base64.b64decode(re.search(r"<pre>([\w+/=]+)</pre>", shown)[1]))
    assert len(seen["images"]) == 4 and min(seen["images"]) > 50
    assert [request for request in seen["requests"] if not request.startswith("data:")] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--run_dir is required"),
        (["--run_dir", "{0}/nowhere"], "There is no folder '{0}/nowhere'"),
        (["--run_dir", "{0}"], "has no dpg_log.jsonl. Did you mean {0}/broken, {0}/empty?"),
        (["--run_dir", "{0}/broken"], "Line 1 of '{0}/broken/dpg_log.jsonl' is not JSON"),
        (["--run_dir", "{0}/empty"], "No step has been logged"),
    ],
)
def test_wrong_usage_names_the_flag_and_the_remedy(arguments, message, tmp_path, capsys):
    for name, content in (("broken", "not json\n"), ("empty", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dpg_log.jsonl").write_text(content)
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *(argument.format(tmp_path) for argument in arguments)])
    assert stop.value.code == 2 and message.format(tmp_path) in capsys.readouterr().err


def test_help_names_every_argument(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", "--help"])
    assert stop.value.code == 0
    assert {"--run_dir", "--output_dir", "--title"} <= set(capsys.readouterr().out.replace(",", " ").split())


def test_runs_of_different_metrics_are_refused(tmp_path, capsys):
    runs = [write_run(tmp_path / name, per_token=False) for name in ("pictures", "none")]
    log = runs[1] / "dpg_log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line | {"readout": {}}) + "\n" for line in lines))
    with pytest.raises(SystemExit) as raised:
        cli.main(["report", "--run_dir", *map(str, runs), "--output_dir", str(tmp_path / "report")])
    assert raised.value.code == 2 and "runs of different metrics" in capsys.readouterr().err


def test_of_a_run_that_stopped_the_time_of_its_last_log_line_is_given(tmp_path):
    log = write_run(tmp_path / "run") / "dpg_log.jsonl"
    log.write_text("".join(line for line in log.open() if "train_runtime" not in line))
    noon = datetime(2026, 1, 2, 12, 30).timestamp()
    os.utime(log, (noon, noon))
    text = make_report(tmp_path / "run")[1]
    assert "not finished; last log line 2026-01-02 12:30" in text and "running" not in text
