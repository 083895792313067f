import hashlib
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbpo_ray.data.schedule import ORDER_VERSION, Schedule, pair_tokens


def lengths(n, seed=0):
    return np.random.default_rng(seed).integers(1, 200, (n, 3)).astype(np.int32)


def schedule(n=103, per_step=16, micro=4, **more):
    return Schedule(lengths(n), **{"seed": 5, "pairs_per_step": per_step, "micro_batch_pairs": micro, **more})


SIZES = st.tuples(
    st.integers(1, 150), st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.booleans()
)


@settings(max_examples=150, deadline=None)
@given(SIZES)
def test_each_pair_occurs_once_per_epoch_and_ranks_get_equal_shares(sizes):
    n, per_step, micro, world, by_length = sizes
    order = schedule(n, per_step, micro, length_batches=by_length, epochs=2)
    assert order.steps_total == 2 * order.steps_per_epoch
    for epoch in range(2):
        seen = []
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            distributed = [order.micro_batches(step, rank, world) for rank in range(world)]
            assert len({len(parts) for parts in distributed}) == 1
            shares = [sum(map(len, parts)) for parts in distributed]
            assert max(shares) - min(shares) <= 1 and max(shares) > 0
            assert all(len(part) <= micro for parts in distributed for part in parts)
            ids = np.concatenate([part for parts in distributed for part in parts])
            assert sorted(ids) == sorted(order.step_pairs(step))
            seen += list(ids)
        assert sorted(seen) == list(range(n))


@pytest.mark.parametrize("by_length", [False, True])
def test_the_same_pairs_in_every_step_on_1_2_and_4_workers(by_length):
    order = schedule(length_batches=by_length)
    for step in range(order.steps_total):
        sets = [
            sorted(
                i for rank in range(world) for part in order.micro_batches(step, rank, world) for i in part
            )
            for world in (1, 2, 4)
        ]
        assert sets[0] == sets[1] == sets[2]


def test_the_order_matches_its_version():
    """If this fails, the order has changed: increment ORDER_VERSION and update the digest."""
    digest = hashlib.sha256()
    for micro, by_length, cut in ((4, True, True), (4, True, False), (3, False, False), (24, True, False)):
        order = schedule(1003, 16, micro, length_batches=by_length, truncate_to_shorter=cut, epochs=2)
        for step in range(order.steps_total):
            for world in (1, 3):
                for rank in range(world):
                    for part in order.micro_batches(step, rank, world):
                        digest.update(part.astype("<i8").tobytes() + b"|")
    assert (ORDER_VERSION, digest.hexdigest()[:16]) == (4, "09e4b8d8c1a1fe05")


def test_epochs_differ_seeds_differ_and_more_steps_only_extend():
    order = schedule(epochs=3)
    first = [order.step_pairs(i).tolist() for i in range(order.steps_total)]
    spe = order.steps_per_epoch
    assert first[:spe] != first[spe : 2 * spe]
    assert schedule(seed=6).step_pairs(0).tolist() != first[0]
    longer = schedule(max_steps=40)
    assert longer.steps_total == 40
    assert [longer.step_pairs(i).tolist() for i in range(spe * 3)] == first
    assert schedule(**order.params | {"per_step": 16, "micro": 4}).step_pairs(9).tolist() == first[9]


def test_steps_are_counted_with_the_remainder():
    order = schedule(103, 16)
    assert order.steps_per_epoch == 7 and len(order.step_pairs(6)) == 103 - 6 * 16
    assert [order.pairs_before(step) for step in (0, 6, 7, 8)] == [0, 96, 103, 119]
    assert schedule(epochs=0.5).steps_total == 4 and schedule(epochs=1.5).steps_total == 11
    assert schedule(epochs=0.001).steps_total == 1
    with pytest.raises(ValueError, match="at least one pair"):
        schedule(0)


def test_pairs_of_similar_length_are_grouped_without_bias():
    order = schedule(5000, 64, 8)
    mixed = schedule(5000, 64, 8, length_batches=False)
    alone = schedule(5000, 8, 8, length_batches=False)
    assert order.padding_share() < 0.05 < mixed.padding_share() < 0.25 < alone.padding_share()
    tokens = lengths(5000).sum(1)
    means = [tokens[order.step_pairs(step)].mean() for step in range(order.steps_per_epoch)]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.4


@pytest.mark.parametrize(("world", "least"), [(2, 0.98), (4, 0.92), (8, 0.78)])
def test_ranks_have_nearly_equal_work(world, least):
    """The tokens of one rank alone against the slowest of several ranks, for the lengths of dialogues."""
    sizes = np.random.default_rng(4).lognormal(4.0, 0.8, (4096, 3)).astype(np.int32) + 1
    order = Schedule(sizes, seed=0, pairs_per_step=128, micro_batch_pairs=4, length_batches=False)
    alone = slowest = 0
    for step in range(order.steps_total):
        loads = [order.padded_tokens(step, rank, world) for rank in range(world)]
        alone, slowest = alone + order.padded_tokens(step, 0, 1), slowest + max(loads)
    assert alone / (world * slowest) > least


def test_the_rank_with_the_fewest_tokens_takes_the_longest_pairs():
    tokens = np.array([10, 11, 12, 13, 20, 21, 40, 100])
    sizes = np.stack([tokens - 2, tokens * 0 + 1, tokens * 0 + 1], 1)
    order = Schedule(sizes, seed=0, pairs_per_step=8, micro_batch_pairs=1)
    distributed = [[tokens[part].tolist() for part in order.micro_batches(0, rank, 2)] for rank in range(2)]
    # 100 | 40; then the second rank takes the longer of each two until it has as much: 40 + 21 + 13 + 11.
    assert distributed == [[[10], [12], [20], [100]], [[11], [13], [21], [40]]]


def test_a_truncated_tail_does_not_count_as_length():
    sizes = lengths(4000).copy()
    sizes[:, 2] = np.random.default_rng(3).integers(2, 400, len(sizes))
    row = pair_tokens(sizes, truncate_to_shorter=True)
    assert (row == sizes[:, 0] + 2 * np.minimum(sizes[:, 1], sizes[:, 2])).all()

    def padding(truncate_to_shorter: bool) -> float:
        order = Schedule(
            sizes, seed=0, pairs_per_step=64, micro_batch_pairs=8, truncate_to_shorter=truncate_to_shorter
        )
        batches = [ids for step in range(50) for ids in order.micro_batches(step, 0, 1)]
        return 1 - sum(row[ids].sum() for ids in batches) / sum(row[ids].max() * len(ids) for ids in batches)

    assert padding(True) < 0.05 < padding(False)


def test_any_step_of_a_million_pairs_is_computed_quickly():
    order = Schedule(lengths(1_000_000), seed=0, pairs_per_step=128, micro_batch_pairs=8, epochs=100)
    start = time.perf_counter()
    order.micro_batches(order.steps_total - 2, 1, 2)
    assert time.perf_counter() - start < 5


def test_imports_numpy_only():
    code = (
        "import sys, tbpo_ray.data.schedule; sys.exit(bool({'torch', 'ray', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
