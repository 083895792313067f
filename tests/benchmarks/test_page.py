"""Tables land between their own marks, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.page import check_markers, replace_table
from tbpo_ray.errors import InputError

TEXT = """# How fast
<!-- data -->
old
<!-- end -->
between
<!-- training:memory -->
older
<!-- end -->
after
"""


def test_only_the_part_s_own_table_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(TEXT)
    replace_table(page, "training:memory", "| new |\n")
    assert page.read_text() == TEXT.replace("older", "| new |")
    replace_table(page, "data", "| a |\n\n| b |")
    assert page.read_text() == TEXT.replace("older", "| new |").replace("old", "| a |\n\n| b |", 1)


@pytest.mark.parametrize(
    ("text", "part"),
    [(TEXT, "search"), (TEXT, "training"), ("<!-- data -->\n", "data"), ("<!-- data -->\n" + TEXT, "data")],
)
def test_a_page_without_a_place_is_refused_before_anything_runs(tmp_path, text, part):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(InputError, match=f"no place for {part}"):
        check_markers(page, [part])
    with pytest.raises(InputError, match="no such file"):
        check_markers(tmp_path / "other.md", [part])


def test_the_results_have_a_place_for_what_they_show():
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "RESULTS.md"
    lines = results.read_text(encoding="utf-8").splitlines()
    shown = [line[5:-4] for line in lines if line.startswith("<!-- ") and line != "<!-- end -->"]
    assert {"methods", "objectives", "data", "overhead", "training:hh_rlhf"} <= set(shown)
    check_markers(results, shown)
    # A table without the command that makes it is worth nothing.
    for part in shown:
        assert any(f"--only {part} " in line for line in lines), part
