"""Manifests: what they hold, and what `trl-dpg check` finds."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_dpg import cli
from trl_dpg.provenance import (
    check_manifest,
    compare_rows,
    model_state,
    model_states,
    revision_of,
    row_hashes,
    write_manifest,
)


ROWS = [{"text": f"text {k}", "score": k / 3, "tags": ["a"] * (k % 3)} for k in range(8)]
SETTINGS = {"metric": "language_modeling", "seed": 7, "api_key": "sk-secret", "hub_token": "hf_" + "a" * 34}


def save(rows, path):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(params=["parquet", "jsonl"])
def folder(request, tmp_path):
    save(ROWS, tmp_path / f"train.{request.param}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("---\ntags: [trl]\n---\n\n# A dataset\n")
    (tmp_path / "_dpg.lock").touch()
    write_manifest(tmp_path, "generate", SETTINGS, prompts="1234")
    assert check_manifest(tmp_path) == []
    return tmp_path


def table(folder):
    (path,) = folder.glob("train.*")
    return path


def test_a_manifest_has_hashes_settings_and_versions_but_no_credentials(folder):
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    assert "sk-secret" not in text and "hf_aaa" not in text
    assert manifest["settings"] | {"seed": 7, "metric": "language_modeling"} == manifest["settings"]
    assert manifest["command"] == "generate" and manifest["inputs"] == {"prompts": "1234"}
    assert {"trl-dpg", "torch", "python"} <= set(manifest["versions"])
    assert set(manifest["files"]) == {table(folder).name, "model/model.safetensors"}
    own = manifest["files"][table(folder).name]
    assert own["sha256"] == hashlib.sha256(table(folder).read_bytes()).hexdigest() and own["rows"] == 8
    first = hashlib.sha256(json.dumps(ROWS[0], sort_keys=True).encode()).digest()
    assert row_hashes(table(folder))[0] == int.from_bytes(first[:8], "little")


CHANGES = {
    "changed": (lambda rows: [*rows[:3], rows[3] | {"score": 9.0}, *rows[4:]], ["row 3 is changed"]),
    "removed": (lambda rows: rows[:2] + rows[3:], ["row 2 is missing"]),
    "added": (lambda rows: [*rows[:1], {"text": "new", "score": 0.0, "tags": []}, *rows[1:]], ["row 1 is new"]),
    "doubled": (lambda rows: [*rows, rows[0]], ["row 8 is new"]),
    "swapped": (lambda rows: [rows[1], rows[0], *rows[2:]], ["rows 0, 1 are in another order"]),
    "both": (
        lambda rows: [rows[2], rows[1], rows[0], *rows[3:7]],
        ["row 7 is missing", "rows 0, 2 are in another order"],
    ),
    "all": (lambda rows: [row | {"score": -1.0} for row in rows], ["rows 0, 1, 2, 3, 4 and 3 more are changed"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_row_that_differs_is_named(name, folder):
    change, lines = CHANGES[name]
    save(change(ROWS), table(folder))
    assert check_manifest(folder) == [f"{table(folder).name}: {line}" for line in lines]


def test_missing_and_new_files_links_and_other_contents_are_named(folder):
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(b"weightz")
    (folder / "more.jsonl").write_text("no row of a table")
    assert check_manifest(folder) == [
        "model/model.safetensors: the contents differ (7 bytes then, 7 now)",
        "more.jsonl: the file is new",
    ]
    weights.write_bytes(b"weights")
    path = table(folder)
    elsewhere = folder / f"elsewhere{path.suffix}"
    path.rename(elsewhere)
    assert check_manifest(folder)[0] == f"{path.name}: the file is missing"
    path.symlink_to(elsewhere)  # its target has the right contents, but may change unseen
    assert check_manifest(folder)[0] == f"{path.name}: was a file, is a link to {str(elsewhere)!r}"
    write_manifest(folder, "generate", {})
    assert check_manifest(folder) == []
    assert "rows" not in json.loads((folder / "manifest.json").read_text())["files"][path.name]


def test_hashes_that_were_changed_as_well_are_noticed(folder):
    save(ROWS[1:], table(folder))
    with (folder / "manifest_rows.npz").open("wb") as file:
        np.savez(file, **{"0": row_hashes(table(folder))})
    (line,) = check_manifest(folder)
    assert "manifest_rows.npz has changed, too" in line


def test_the_same_rows_in_another_file_are_the_same_rows(tmp_path):
    save(ROWS, tmp_path / "a.parquet")
    write_manifest(tmp_path, "mix", {})
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", compression="zstd")
    assert check_manifest(tmp_path) == ["a.parquet: the rows are the same, their form in the file is not"]


def test_rows_are_compared_as_multisets_in_their_order():
    rng = np.random.default_rng(0)
    for _ in range(50):
        then, now = (rng.integers(0, 5, rng.integers(0, 7)).astype("<u8") for _ in range(2))
        assert (compare_rows(then, now) == []) == np.array_equal(then, now)


def test_the_card_shows_the_manifest_once(folder):
    for _ in range(2):
        write_manifest(folder, "generate", SETTINGS)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\ntags: [trl]\n---\n\n# A dataset") and card.count("## Manifest") == 1
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert digest in card and f"| `{table(folder).name}` | 8 |" in card


def test_models_are_told_apart_by_their_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"a" * 100)
    before = model_state(str(tmp_path))
    assert before["name"] == str(tmp_path) and model_state(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"b" * 100)
    assert model_state(str(tmp_path)) != before
    own = {"student_models": ["a", "b"], "student_model_init_kwargs": {"revision": "v2"}, "model_name_or_path": "c"}
    assert list(model_states(own)) == ["model_name_or_path", "student_models[0]", "student_models[1]"]
    assert revision_of("student_model_name_or_path", own) == "v2" and revision_of("model_name_or_path", own) is None
    assert revision_of("model_name_or_path", {"model_revision": "v3"}) == "v3"
    assert model_state("no/model/of the Hub") == {"name": "no/model/of the Hub", "revision": None}


def test_the_command_says_what_differs_by_its_exit_status(folder, capsys):
    cli.main(["check", str(folder)])
    assert "2 files, 8 rows" in (printed := capsys.readouterr().out) and "All files are as they were" in printed
    table(folder).unlink()
    with pytest.raises(SystemExit) as raised:
        cli.main(["check", "--folder", str(folder)])
    assert raised.value.code == 1 and "the file is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no manifest.json that can be read (No such file or directory)"),
        ("{", "is not JSON"),
        ('{"files": {}}', "is not one of trl-dpg"),
        ('{"layout": "trl-dpg manifest 1"}', "is not one of trl-dpg"),
        ('{"layout": "trl-dpg manifest 1", "command": "", "created": "", "files": []}', "is not one of trl-dpg"),
        (
            '{"layout": "trl-dpg manifest 1", "command": "", "created": "", "files": {"": {}}}',
            "is not one of trl-dpg",
        ),
    ],
)
def test_a_folder_without_a_manifest_is_refused(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(SystemExit) as raised:
        cli.main(["check", str(tmp_path)])
    assert raised.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        cli.main(["check"])
    assert "The folder is required: trl-dpg check FOLDER" in capsys.readouterr().err
