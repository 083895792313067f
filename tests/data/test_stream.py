from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tbpo_ray.config.schema import DataConfig
from tbpo_ray.data.preparation import PairsSpec, prepare
from tbpo_ray.data.reader import PairReader
from tbpo_ray.data.schedule import Schedule
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.data.stream import MicroBatchIterator, StreamConfig, local_micro_batches
from tbpo_ray.data.window import decode, encode
from tbpo_ray.errors import InputError

if TYPE_CHECKING:
    from ray.data import DataIterator


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer_folder):
    cache = tmp_path_factory.mktemp("cache")
    source = "builtin:copyedit?pairs=1300"
    spec = PairsSpec(source, DataConfig(), tokenizer_folder)
    return prepare(spec, cache, progress=False, distributed=False)


@pytest.fixture(scope="module")
def scores(prepared, tmp_path_factory):
    """A folder with reference scores that identify their pair and token."""
    folder = tmp_path_factory.mktemp("scores")
    start = 0
    for name, pairs in prepared.shards:
        lengths = prepared.lengths()[start : start + pairs]
        columns = {
            f"{side}_ref_logps": pa.array(
                [
                    np.float32(start + i) + np.arange(n, dtype=np.float32) / 1000
                    for i, n in enumerate(lengths[:, k])
                ],
                pa.list_(pa.float32()),
            )
            for k, side in ((1, "chosen"), (2, "rejected"))
        }
        pq.write_table(pa.table(columns), folder / name, row_group_size=100)
        start += pairs
    return str(folder)


def make_schedule(prepared, **more):
    settings = {"seed": 3, "pairs_per_step": 48, "micro_batch_pairs": 8, "epochs": 2, **more}
    return Schedule(prepared.lengths(), **settings)


def plain(micro):
    lists = (micro.prompt_ids, micro.chosen_ids, micro.rejected_ids, *micro.extras.values())
    head = (micro.step, micro.index, micro.count, micro.pairs_in_step, micro.pair_ids.tolist())
    return (*head, [[array.tolist() for array in values] for values in lists])


def test_pairs_are_read_by_id_with_their_extra_columns(prepared, scores):
    reader = PairReader(prepared, [scores], cache_bytes=1)
    rows = list(prepared.rows())
    ids = np.array([1299, 0, 1023, 1024, 5, 5])
    got = reader.fetch(ids)
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert [a.tolist() for a in got[column]] == [rows[i][column] for i in ids]
    assert [int(a[0]) for a in got["chosen_ref_logps"]] == ids.tolist()
    assert [len(a) for a in got["rejected_ref_logps"]] == [len(rows[i]["rejected_ids"]) for i in ids]
    small, large = PairReader(prepared, cache_bytes=1), PairReader(prepared)
    for reader in (small, large):
        reader.fetch(np.arange(1300))
    assert len(small._groups) == 1 and len(large._groups) == 21


def test_extra_columns_must_match_the_shards(prepared, tmp_path):
    with pytest.raises(InputError, match="missing"):
        PairReader(prepared, [str(tmp_path)])
    pq.write_table(
        pa.table({"x": pa.array([[1.0]], pa.list_(pa.float32()))}), tmp_path / prepared.shards[0][0]
    )
    with pytest.raises(InputError, match="1 rows for 1024 pairs"):
        PairReader(prepared, [str(tmp_path)])


def test_local_stream_follows_the_schedule_from_any_step(prepared, scores):
    schedule = make_schedule(prepared)
    whole = [plain(m) for m in local_micro_batches(prepared, schedule, 1, 2, extra_dirs=[scores])]
    expected = [
        (step, index, len(parts), len(schedule.step_pairs(step)), ids.tolist())
        for step in range(schedule.steps_total)
        for parts in [schedule.micro_batches(step, 1, 2)]
        for index, ids in enumerate(parts)
    ]
    assert [w[:5] for w in whole] == expected
    late = [plain(m) for m in local_micro_batches(prepared, schedule, 1, 2, 20, extra_dirs=[scores])]
    assert late == [w for w in whole if w[0] >= 20]


def test_windows_survive_encoding_with_empty_micro_batches(prepared, scores):
    schedule = make_schedule(prepared, pairs_per_step=3, micro_batch_pairs=2)
    micro = PairReader(prepared, [scores]).micro_batches(schedule, 4, 5, 0, 3)
    assert any(len(m.pair_ids) == 0 for m in micro)
    for some in (micro, PairReader(prepared, [scores]).micro_batches(schedule, 0, 2, 5, 9)):
        back = list(decode(encode(some)))
        assert [plain(m) for m in back] == [plain(m) for m in some]
        assert all(m.extras.keys() == {"chosen_ref_logps", "rejected_ref_logps"} for m in back)


@pytest.mark.e2e
def test_the_stream_through_ray_equals_the_local_one_at_any_start_and_size(prepared, scores, ray_session):
    schedule = make_schedule(prepared)

    def consume(iterator):
        from tbpo_ray.data.stream import MicroBatchIterator

        return [
            (m.step, m.index, m.count, m.pairs_in_step, m.pair_ids.tolist(), tokens(m))
            for m in MicroBatchIterator(iterator)
        ]

    def tokens(m):
        lists = (m.prompt_ids, m.chosen_ids, m.rejected_ids, *m.extras.values())
        return [[array.tolist() for array in values] for values in lists]

    import ray

    # Two ranks that hold every core of the cluster: reading must not need one.
    task = ray.remote(num_cpus=ray.cluster_resources()["CPU"] / 2)(consume)
    for world, start in ((1, 0), (2, 31), (2, schedule.steps_total)):
        config = StreamConfig(prepared, schedule, partial(int, start), [scores])
        shards = config.configure({"train": None}, world, None, None)
        got = ray.get([task.remote(shard["train"]) for shard in shards], timeout=120)
        for rank in range(world):
            local = local_micro_batches(prepared, schedule, rank, world, start, [scores])
            assert got[rank] == [plain(m) for m in local]


def test_an_error_in_the_stream_is_raised_in_the_reader():
    class Broken:
        def iter_batches(self, **_):
            raise RuntimeError("disk gone")

    stream = MicroBatchIterator(cast("DataIterator", Broken()))
    with pytest.raises(RuntimeError, match="disk gone"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_prepared_pairs_are_loaded_from_their_path(prepared):
    assert PreparedPairs.load(prepared.path) == prepared
