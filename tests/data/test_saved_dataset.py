"""Folders that `datasets` wrote with `save_to_disk`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from etude.data import read_rows
from etude.data.rows import format_of
from etude.errors import DataError

ROWS = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(5)]


def test_rows_come_back_in_order_with_their_number() -> None:
    Dataset.from_list(ROWS).save_to_disk("saved")
    rows = read_rows("saved")
    assert (list(rows), rows.format, rows.origin(4)) == (ROWS, "prompt_completion", ("saved", 5))
    assert format_of("saved") == "prompt_completion"


def test_a_chosen_part_is_read_and_not_the_table_behind_it() -> None:
    Dataset.from_list(ROWS).select([3, 1]).save_to_disk("saved")
    assert [row["prompt"] for row in read_rows("saved")] == ["p3", "p1"]


def test_it_stands_beside_other_files() -> None:
    Dataset.from_list(ROWS).save_to_disk("saved")
    Path("more.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    assert len(read_rows(["saved", "more.jsonl"])) == 6


def test_splits_are_named_one_at_a_time() -> None:
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:2])).save_to_disk("saved")
    with pytest.raises(DataError, match="got the splits test, train; name one: saved/SPLIT"):
        read_rows("saved")
    assert len(read_rows("saved/test")) == 2


def test_a_bad_row_is_named() -> None:
    Dataset.from_list([*ROWS, {"prompt": "p", "completion": None}]).save_to_disk("saved")
    with pytest.raises(DataError, match="saved:6 field 'completion': expected string, got null"):
        read_rows("saved")


def test_a_damaged_folder_is_an_error_of_the_data() -> None:
    Dataset.from_list(ROWS).save_to_disk("saved")
    shutil.copy("saved/state.json", "state.json")
    Path("saved/state.json").write_text("{}")
    with pytest.raises(DataError, match="saved: expected a whole data set"):
        read_rows("saved")
    shutil.copy("state.json", "saved/state.json")
    next(Path("saved").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="saved: expected a whole data set"):
        read_rows("saved")
