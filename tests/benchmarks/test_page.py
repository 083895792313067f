"""Tables land between their own marks, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.page import check_places, put
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
    put(page, "training:memory", "| new |\n")
    assert page.read_text() == TEXT.replace("older", "| new |")
    put(page, "data", "| a |\n\n| b |")
    assert page.read_text() == TEXT.replace("older", "| new |").replace("old", "| a |\n\n| b |", 1)


@pytest.mark.parametrize(
    ("text", "part"),
    [(TEXT, "search"), (TEXT, "training"), ("<!-- data -->\n", "data"), ("<!-- data -->\n" + TEXT, "data")],
)
def test_a_page_without_a_place_is_refused_before_anything_runs(tmp_path, text, part):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(InputError, match=f"no place for {part}"):
        check_places(page, [part])
    with pytest.raises(InputError, match="no such file"):
        check_places(tmp_path / "other.md", [part])


def test_the_readme_has_a_place_for_what_it_shows():
    readme = Path(__file__).resolve().parents[2] / "README.md"
    shown = [
        line[5:-4]
        for line in readme.read_text().splitlines()
        if line.startswith("<!-- ") and "end" not in line
    ]
    assert {"objectives", "data", "overhead", "training:hh_rlhf"} <= set(shown)
    check_places(readme, shown)
