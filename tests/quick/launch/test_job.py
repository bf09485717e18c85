"""The table that a run ends with."""

import io
from pathlib import Path

import pytest

from labtrain.launch.job import print_table
from labtrain.training.fit import Result


@pytest.mark.parametrize("stages", [("train",), ("train", "val", "test", "val/a_dataset_with_a_long_name")])
def test_no_title_and_no_row_is_folded(stages: tuple[str, ...]) -> None:
    """In a pipe, whose width rich takes for 80 columns: a title that is wider than its table, a row that is than 80."""
    metric = f"an_accuracy_{'of_some_kind_' * 3}"
    folder = Path("runs", "a_long_[name]" * 4, "1c84bac278aa")
    metrics = {f"{stage}/{metric if stage != 'train' else 'acc'}": 0.5 for stage in stages}
    file = io.StringIO()
    print_table(Result(run_dir=folder, metrics=metrics, weights_digest="0" * 64, steps=20), file)
    title, _, headings, _, *rows, _ = file.getvalue().splitlines()
    assert title == f"{folder}, 20 steps"
    assert headings.replace("┃", " ").split() == ["metric", *stages]
    assert [row.split()[1] for row in rows] == list(dict.fromkeys(name.rpartition("/")[2] for name in metrics))
    assert len({len(line) for line in (headings, *rows)}) == 1
