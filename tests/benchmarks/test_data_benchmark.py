import pytest

from benchmarks import data


@pytest.mark.e2e
def test_it_runs_and_reports(ray_session):
    result = data.run(quick=True)
    assert [row["pairs"] for row in result["prepare"]] == list(data.QUICK_SIZES)
    assert result["speed_up_per_core"] > 0 and 0 <= result["stream"]["wait_share"] < 1
    assert "1,200" in data.markdown(result)
