import pytest

from benchmarks import scale
from benchmarks.measure import fit_exponent
from tbpo_ray.config.loading import load_config
from tbpo_ray.data.reader import OPEN_FILES
from tbpo_ray.errors import InputError


def test_the_fit_finds_the_power():
    sizes = [10, 100, 1000, 10_000]
    assert fit_exponent(sizes, [3.0 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert fit_exponent(sizes, [7.0] * 4) == pytest.approx(0.0)
    assert fit_exponent(sizes, [0.0] * 4) == 0.0


def test_an_unknown_case_is_refused():
    with pytest.raises(InputError, match="--only scale:files"):
        scale.run(load_config(None, []), quick=True, only="files")


@pytest.mark.e2e
def test_it_runs_and_reports():
    rows = scale.run(load_config(None, []), quick=True)
    assert len(rows) == 4 * (len(scale.READING) + len(scale.STUDY))
    by_what = {(row["what"], row["size"]): row["value"] for row in rows}
    for pairs in scale.QUICK_PAIRS:
        assert 0 < by_what["open files", pairs] <= OPEN_FILES
        assert 1 <= by_what["bytes decoded over bytes used", pairs] < 200
    page = scale.markdown(rows)
    assert "| open files |" in page and "| 16,384 |" in page and "| share of wall time |" in page
