"""Files that are whole at any moment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bilevel.core.files import read_mark, remove_files, remove_unfinished, write_mark, write_whole


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
    inside = tmp_path / "inside"
    inside.mkdir()
    dead = 2**22 + 1  # above the largest number of a process
    left = tmp_path / f".a.json.bilevel-{dead}.tmp"
    kept = [
        *(tmp_path / name for name in ("a.json", "notes.tmp", ".a.json.123.tmp", ".vim.swap.tmp", ".notes.2024.tmp")),
        tmp_path / f".b.json.bilevel-{os.getppid()}.tmp",
        inside / f".b.pt.bilevel-{dead}.tmp",
    ]
    for path in [left, *kept]:
        path.write_text("")
    link = tmp_path / f".c.json.bilevel-{dead}.tmp"
    link.symlink_to(tmp_path / "a.json")
    remove_unfinished(tmp_path)
    assert not left.exists()
    assert all(path.exists() for path in [link, *kept])
    remove_unfinished(tmp_path, inside)
    assert not kept[-1].exists()


def test_a_mark_names_files_of_the_folder_alone(tmp_path: Path) -> None:
    assert read_mark(tmp_path) is None
    names = ["a.json", "figures/b.png", "../other.txt", "/etc/passwd", "x/../../y", "a/b/c", ""]
    write_mark(tmp_path, "run", names, {"more": 1})
    assert read_mark(tmp_path) == {
        "program": "bilevel", "kind": "run", "writes": ["a.json", "figures/b.png"], "more": 1
    }  # fmt: skip
    for text in ("", "[]", '{"program": "other", "kind": "run", "writes": []}', '{"program": "bilevel"}', "[" * 10_000):
        (tmp_path / ".bilevel.json").write_text(text)
        assert read_mark(tmp_path) is None


def test_files_are_removed_but_no_links_no_folders_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / "b").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "d")
    (tmp_path / "d").write_text("")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "one").write_text("")
    (tmp_path / "f").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "one").write_text("")
    remove_files(tmp_path, ["a", "b", "c", "e/one", "f/one"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c", "d", "f"]
    assert (tmp_path / "b" / "one").exists()
