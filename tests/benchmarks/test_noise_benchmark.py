import pytest

from benchmarks.noise import Results, best_rate, markdown
from tbpo_ray.errors import InputError

GRID = (1.0, 2.0, 3.0, 4.0, 5.0)


def test_a_best_rate_inside_the_first_grid_costs_three_runs():
    tried = []

    def quality(rate):
        tried.append(rate)
        return -abs(rate - 3)

    assert best_rate(quality, GRID, 1) == 3
    assert tried == [2, 3, 4]


@pytest.mark.parametrize(("peak", "tried"), [(2.0, [2, 3, 4, 1]), (4.0, [2, 3, 4, 5])])
def test_the_grid_grows_toward_a_best_rate_at_its_edge(peak, tried):
    seen = []

    def quality(rate):
        seen.append(rate)
        return -abs(rate - peak)

    assert best_rate(quality, GRID, 1) == peak
    assert seen == tried


@pytest.mark.parametrize("sign", [1, -1])
def test_a_best_rate_at_the_edge_of_all_rates_is_refused(sign):
    with pytest.raises(InputError, match="rate="):
        best_rate(lambda rate: sign * rate, GRID, 1)


def test_finished_runs_are_read_from_the_file(tmp_path):
    first = Results(tmp_path / "runs.jsonl").get({"rate": 1}, lambda: {"quality": 0.5})
    again = Results(tmp_path / "runs.jsonl").get({"rate": 1}, lambda: pytest.fail("measured twice"))
    other = Results(tmp_path / "runs.jsonl").get({"rate": 2}, lambda: {"quality": 0.7})
    assert first == again == {"quality": 0.5} and other == {"quality": 0.7}


def test_the_table_compares_with_the_logistic_loss_at_the_same_noise_and_seed():
    def row(policy, noise, seed, value):
        found = {"policy": policy, "noise": noise, "seed": seed, "rate": None if policy == "sft" else 1e-5}
        return found | {"expected_exact_match": value}

    rows = [row("sft", 0.0, seed, 0.5) for seed in (0, 1)]
    for noise in (0.0, 0.4):
        rows += [row("logistic", noise, seed, 0.6 + 0.1 * seed) for seed in (0, 1)]
        rows += [row("(1, 1)", noise, seed, 0.62 + 0.1 * seed + noise / 10) for seed in (0, 1)]
    lines = markdown(rows).splitlines()
    assert "65.0 at 1e-05" in lines[3]
    assert "67.0 at 1e-05; +2.0 [+2.0, +2.0]" in lines[4] and "+6.0" in lines[4]
