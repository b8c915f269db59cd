"""Rows of samples: their columns, their text, and how they are read."""

import json

import pytest

from trl_dpg.metagradients.config import SettingsError
from trl_dpg.replay import load_rows
from trl_dpg.rows import read_rows, row_text, sample_columns
from trl_dpg.scripts.data import load_data
from trl_dpg.scripts.usage import UsageError


def test_the_columns_of_samples_are_the_first_format_that_is_there():
    assert sample_columns(["text", "labels", "input_ids", "id"]) == ("input_ids", "labels")
    assert sample_columns(["text", "prompt"]) == ("text",) and sample_columns(["prompt", "labels"]) is None


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "one", "id": 3}, "one"),
        ({"prompt": "one", "completion": None}, "one | "),
        ({"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}, "one | two"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "one"}]}], "completion": []}, "one"),
        ({"input_ids": [5, 6], "labels": [5, 6]}, "[5, 6]"),
    ],
)
def test_a_row_is_shown_as_one_text(row, text):
    assert row_text(row) == text


def test_files_are_read_by_their_pattern_and_what_cannot_be_read_is_said(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert read_rows(f"{tmp_path}/*.jsonl")["text"] == ["a", "b"]
    (tmp_path / "broken.json").write_text("{")
    for file, message in (("none.csv", "there is no file"), ("broken.json", "could not be read .split 'train'.")):
        with pytest.raises(ValueError, match=message):
            read_rows(str(tmp_path / file))
        with pytest.raises(SettingsError, match=f"`replay_dataset`: .*{message}"):
            load_rows(str(tmp_path / file))
        with pytest.raises(UsageError, match=f"--control: .*{message}"):
            load_data(str(tmp_path / file), flag="control")
