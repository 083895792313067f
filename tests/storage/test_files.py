"""Files and folders are complete or absent."""

from __future__ import annotations

import pytest

from tbpo_ray.storage.files import atomic_file, atomic_folder, write_atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path):
    write_atomic(tmp_path / "a.txt", "old")
    with atomic_file(tmp_path / "a.txt") as partial:
        partial.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "a.txt").read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_after_an_error_the_old_file_stays_and_nothing_is_left_beside_it(tmp_path):
    write_atomic(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_folder_appears_with_all_its_files(tmp_path):
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "x").write_text("1")
        assert not (tmp_path / "model").exists()
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["x"]
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(("replace", "kept"), [(False, "theirs"), (True, "ours")])
def test_of_two_that_make_one_folder_the_first_stays_unless_replaced(tmp_path, replace, kept):
    target = tmp_path / "model"
    with atomic_folder(target, replace=replace) as partial:
        (partial / "x").write_text("ours")
        target.mkdir()
        (target / "x").write_text("theirs")
    assert (target / "x").read_text() == kept and names(tmp_path) == ["model"]


def test_a_folder_that_fails_is_absent(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as partial:
        (partial / "x").touch()
        raise RuntimeError
    assert names(tmp_path) == []
