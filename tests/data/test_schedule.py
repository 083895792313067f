import hashlib
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbpo_ray.data.deal import padded_tokens
from tbpo_ray.data.schedule import ORDER_VERSION, Schedule, pair_tokens, row_tokens


def lengths(n, seed=0):
    return np.random.default_rng(seed).integers(1, 200, (n, 3)).astype(np.int32)


def schedule(n=103, per_step=16, micro=4, **more):
    return Schedule(lengths(n), **{"seed": 5, "pairs_per_step": per_step, "micro_batch_pairs": micro, **more})


SIZES = st.tuples(
    st.integers(1, 150), st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.booleans()
)
BUDGETS = st.tuples(
    st.one_of(st.none(), st.integers(1, 3000)), st.sampled_from(["shared", "separate", "packed"])
)


@settings(max_examples=200, deadline=None)
@given(SIZES, BUDGETS)
def test_each_pair_occurs_once_per_epoch_and_no_limit_is_exceeded(sizes, budget):
    n, per_step, micro, world, by_length = sizes
    tokens, rows = budget
    order = schedule(
        n, per_step, micro, length_batches=by_length, epochs=2, micro_batch_tokens=tokens, rows=rows
    )
    of_pair = row_tokens(lengths(n), rows=rows)
    assert order.steps_total == 2 * order.steps_per_epoch
    for epoch in range(2):
        seen = []
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            distributed = [order.micro_batches(step, rank, world) for rank in range(world)]
            assert len({len(parts) for parts in distributed}) == 1
            micro_batches = [part for parts in distributed for part in parts]
            assert all(len(part) <= micro for part in micro_batches)
            # Packed rows are rounded up to a multiple of 8 in the end, which no budget has to allow for.
            limit = (tokens or 10**9) + (7 if rows == "packed" else 0)
            for part in micro_batches:
                assert len(part) < 2 or padded_tokens(of_pair[part], packed=rows == "packed") <= limit
            # An index at which no rank has a pair would be computed for nothing.
            assert all(any(len(parts[i]) for parts in distributed) for i in range(len(distributed[0])))
            ids = np.concatenate(micro_batches)
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
        budget = schedule(
            1003, 16, micro, length_batches=by_length, truncate_to_shorter=cut, micro_batch_tokens=900,
            rows="packed" if by_length else "separate",
        )  # fmt: skip
        for parts in (budget.deal(step, 3) for step in range(budget.steps_total)):
            digest.update(b"".join(part.astype("<i8").tobytes() + b"|" for rank in parts for part in rank))
    assert (ORDER_VERSION, digest.hexdigest()[:16]) == (5, "ba309cd7c907a0bc")


def test_a_single_rank_with_a_limit_on_pairs_takes_the_order_of_version_4():
    digest = hashlib.sha256()
    for micro, by_length, cut in ((4, True, True), (4, True, False), (3, False, False), (24, True, False)):
        order = schedule(1003, 16, micro, length_batches=by_length, truncate_to_shorter=cut, epochs=2)
        for step in range(order.steps_total):
            for part in order.micro_batches(step, 0, 1):
                digest.update(part.astype("<i8").tobytes() + b"|")
    assert digest.hexdigest()[:16] == "9c3c9ed34a5a1616"


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


@pytest.mark.parametrize(("world", "least"), [(2, 0.98), (4, 0.97), (8, 0.93)])
def test_ranks_have_nearly_equal_work_over_a_step(world, least):
    """The tokens of the mean rank against the slowest one, for the lengths of dialogues."""
    sizes = np.random.default_rng(4).lognormal(4.0, 0.8, (4096, 3)).astype(np.int32) + 1
    order = Schedule(sizes, seed=0, pairs_per_step=128, micro_batch_pairs=4, length_batches=False)
    mean = slowest = 0.0
    for step in range(order.steps_total):
        loads = [order.padded_tokens(step, rank, world) for rank in range(world)]
        mean, slowest = mean + sum(loads) / world, slowest + max(loads)
    assert mean / slowest > least


@pytest.mark.parametrize(
    ("more", "world", "per_step", "least"),
    [
        ({"micro_batch_pairs": 4}, 8, 128, 0.80),
        ({"micro_batch_tokens": 8192}, 8, 128, 0.75),
        ({"micro_batch_tokens": 8192, "rows": "packed"}, 8, 128, 0.98),
        ({"micro_batch_tokens": 2048, "rows": "packed"}, 8, 128, 0.96),
        ({"micro_batch_tokens": 8192, "rows": "packed"}, 64, 1024, 0.98),
    ],
)
def test_no_rank_waits_for_another_at_any_micro_batch(more, world, per_step, least):
    sizes = np.random.default_rng(4).lognormal(4.0, 0.8, (8 * per_step, 3)).astype(np.int32) + 1
    order = Schedule(sizes, seed=0, pairs_per_step=per_step, length_batches=False, **more)
    assert np.mean([order.busy_share(step, world) for step in range(8)]) > least


def test_two_pairs_per_rank_take_as_long_as_the_longest_pair():
    sizes = np.random.default_rng(4).lognormal(4.0, 0.8, (1024, 3)).astype(np.int32) + 1
    order = Schedule(
        sizes, seed=0, pairs_per_step=128, micro_batch_tokens=8192, rows="packed", length_batches=False
    )
    for step in range(8):
        assert order.busy_share(step, 64) > 0.97 * order.busy_bound(step, 64)


def test_ranks_get_uneven_numbers_of_pairs_for_even_tokens():
    tokens = np.array([10, 10, 10, 10, 20, 20, 40, 120])
    sizes = np.stack([tokens - 8, tokens * 0 + 5, tokens * 0 + 5], 1)
    packed = Schedule(sizes, seed=0, pairs_per_step=8, micro_batch_tokens=1000, rows="packed")
    assert sorted(tokens[parts[0]].tolist() for parts in packed.deal(0, 2)) == [
        [10] * 4 + [20] * 2 + [40],
        [120],
    ]
    padded = Schedule(sizes, seed=0, pairs_per_step=8, micro_batch_tokens=160)
    # 120 | 40 + 20 + 20, padded to 3 x 40, and the four short pairs at the cheaper index or with them.
    assert [len(part) for parts in padded.deal(0, 2) for part in parts if 120 in tokens[part]] == [1]
    assert max(padded.padded_tokens(0, rank, 2) for rank in range(2)) <= 160


def test_row_tokens_are_what_a_batch_holds():
    sizes = np.array([[5, 3, 7], [4, 1, 0]])
    assert row_tokens(sizes).tolist() == [5 + 2 + 6, 4]
    assert row_tokens(sizes, truncate_to_shorter=True).tolist() == [5 + 2 + 2, 4]
    assert row_tokens(sizes, rows="separate").tolist() == [2 * (5 + 6), 2 * 4]
    assert row_tokens(sizes, sides=1).tolist() == [5 + 2, 4]


def test_a_step_of_many_ranks_is_distributed_in_milliseconds():
    sizes = np.random.default_rng(4).lognormal(4.0, 0.8, (4096, 3)).astype(np.int32) + 1
    for more in ({"rows": "packed"}, {"rows": "packed", "micro_batch_pairs": 4}, {}):
        order = Schedule(sizes, seed=0, pairs_per_step=1024, micro_batch_tokens=4096, **more)
        order.deal(0, 64)
        start = time.perf_counter()
        order.deal(1, 64)
        assert time.perf_counter() - start < 0.2  # about 3 ms on an idle machine


def test_a_schedule_without_any_limit_is_refused():
    with pytest.raises(ValueError, match="micro_batch"):
        Schedule(lengths(4), seed=0, pairs_per_step=2)


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
