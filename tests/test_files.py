"""Files that are whole at any moment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bilevel.files import remove_unfinished, write_whole


def test_the_bytes_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, order = tmp_path / "kept.txt", []
    target.write_text("old")
    fsync, replace = os.fsync, os.replace

    def seen_fsync(number: int) -> None:
        order.append(("fsync", target.read_text()))
        fsync(number)

    def seen_replace(*names: Any) -> None:
        order.append(("replace", target.read_text()))
        replace(*names)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write_whole(target, "new")
    assert order == [("fsync", "old"), ("replace", "old")]
    assert target.read_text() == "new"


def test_a_file_that_cannot_be_written_keeps_its_content_names_itself_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "kept.txt"
    target.write_text("old")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*kept\.txt"):
        write_whole(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    left = [tmp_path / ".a.json.123.tmp", tmp_path / "inside" / ".b.pt.7.tmp"]
    own = [tmp_path / "a.json", tmp_path / "notes.tmp", tmp_path / "inside" / "b.pt"]
    for path in left + own:
        path.write_text("")
    remove_unfinished(tmp_path)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in own)
