"""The files of block-wise distillation: rows where they were written, parts in any order."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import cria_files
from config import UserError
from cria_files import SavedRows, part_path, read_tensor_file, unsealed


def test_files_keep_what_is_known_of_them(tmp_path):
    """A row once written is where it was; a part's place in the sequence is checked."""
    writer = cria_files.RowWriter(tmp_path / "rows", 5)
    x = torch.randn(5, 3, 2)
    writer.add(0, [7, 9], x[:2])
    with pytest.raises(AssertionError):
        writer.add(3, [4], x[:1])
    writer.add(2, [9, 1, 3], x[2:])
    assert writer.parts == 1 and cria_files.RowWriter(tmp_path / "rows", 5).done == 5
    reader = SavedRows(tmp_path / "rows")
    assert reader.read([3, 9, 7]).equal(x[[4, 1, 0]])  # of two the first
    with pytest.raises(UserError, match="row 2 among them"):
        reader.read([7, 2])
    path = part_path(tmp_path / "rows", 0)
    assert unsealed(path.with_suffix(".json"))["rows"] == [7, 9, 9, 1, 3]
    assert read_tensor_file(path)["hidden"].equal(x)


@pytest.mark.parametrize("written", [(2, 0), (0, 2), (1, 2), (2, 1, 0)])
def test_parts_may_be_finished_in_any_order(tmp_path, written, monkeypatch):
    """What was killed between goes on from the first part that is missing; those behind it are
    written again, and are not read before."""
    monkeypatch.setattr(cria_files, "PART_BYTES", 2 * 3 * 2 * 4)  # two rows
    x, folder, waiting = torch.randn(6, 3, 2), tmp_path / "rows", []
    writer = cria_files.RowWriter(folder, 6, waiting.append)
    for at in range(6):
        writer.add(at, [10 + at], x[at : at + 1])
    assert writer.done == 6 and not folder.exists() and len(waiting) == 3
    for part in written:
        waiting[part]()
    whole = next(n for n in range(4) if n not in written)  # parts in one row from the first on
    again = cria_files.RowWriter(folder, 6)
    assert again.done == 2 * whole
    assert len(list(folder.glob("*.json"))) == whole
    with pytest.raises(UserError, match="row 15 among them") if whole < 3 else nullcontext():
        SavedRows(folder).read([15])
    for at in range(6):
        again.add(at, [10 + at], x[at : at + 1])
    assert SavedRows(folder).read([10, 11, 12, 13, 14, 15]).equal(x)


def test_an_error_behind_the_scenes_is_raised(tmp_path):
    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), cria_files.Background() as background:
        background.put(fail)
