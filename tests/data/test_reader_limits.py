"""What a reader holds: a bounded number of open files, and nothing that grows with the number of shards."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from tbpo_ray.data.reader import OPEN_FILES, OTHER_FILES, PairReader, check_descriptors
from tbpo_ray.data.shards import LENGTHS, MANIFEST, PreparedPairs, write_shard
from tbpo_ray.errors import InputError

SHARDS, ROWS = 3 * OPEN_FILES, 4


def tokens(pair: int, column: int) -> list[int]:
    return [1000 * column + pair] * (1 + (pair + column) % 5)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> PreparedPairs:
    folder: Path = tmp_path_factory.mktemp("prepared")
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    shards = []
    for shard in range(SHARDS):
        ids = range(shard * ROWS, (shard + 1) * ROWS)
        file = folder / f"part-{shard:05d}.parquet"
        write_shard(file, {name: [tokens(i, c) for i in ids] for c, name in enumerate(names)})
        shards.append({"file": file.name, "pairs": ROWS, "bytes": file.stat().st_size, "sha256": ""})
    pairs = SHARDS * ROWS
    np.save(
        folder / LENGTHS, np.array([[len(tokens(i, c)) for c in range(3)] for i in range(pairs)], np.int32)
    )
    manifest = {"shards": shards, "pairs": pairs, "records": pairs, "fingerprint": "f", "counts": {},
                "inputs": {}, "column": {}}  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return PreparedPairs.load(folder)


def open_shards() -> int:
    """Descriptors of this process that refer to a shard of the fixture."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += "part-" in os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    return count


def test_open_files_are_bounded_and_values_stay_right_after_a_file_is_closed(prepared):
    reader = PairReader(prepared)
    ids = np.random.default_rng(0).permutation(prepared.pairs)
    held = reader.fetch(ids)
    assert 0 < open_shards() <= OPEN_FILES < SHARDS
    again = reader.fetch(ids)
    for column, name in enumerate(("prompt_ids", "chosen_ids", "rejected_ids")):
        for pair, first, second in zip(ids, held[name], again[name], strict=True):
            assert first.tolist() == second.tolist() == tokens(int(pair), column)


def test_a_small_cache_and_closed_files_change_no_value(prepared):
    ids = np.random.default_rng(1).permutation(prepared.pairs)[:50]
    large, small = PairReader(prepared).fetch(ids), PairReader(prepared, cache_bytes=1).fetch(ids)
    assert {k: [v.tolist() for v in vs] for k, vs in large.items()} == {
        k: [v.tolist() for v in vs] for k, vs in small.items()
    }


def test_a_reader_needs_only_the_manifest_at_its_start(prepared, monkeypatch):
    looked_at: list[str] = []
    stat = Path.stat

    def recording_stat(self: Path, **options: bool) -> os.stat_result:
        looked_at.append(self.name)
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", recording_stat)
    PairReader(PreparedPairs.load(prepared.path))
    assert [name for name in looked_at if name.startswith("part-")] == []
    PreparedPairs.load(prepared.path, check_files=True)
    assert sum(name.startswith("part-") for name in looked_at) >= SHARDS


def test_the_driver_still_finds_a_missing_shard(prepared, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / MANIFEST).write_bytes((Path(prepared.path) / MANIFEST).read_bytes())
    with pytest.raises(InputError, match=r"part-00000\.parquet: missing or damaged"):
        PreparedPairs.load(folder, check_files=True)
    with pytest.raises(InputError, match=r"part-00000\.parquet: missing"):
        PairReader(PreparedPairs.load(folder)).fetch(np.array([0]))


def test_a_low_limit_of_open_files_is_refused_with_the_calculation(prepared, monkeypatch):
    in_use = len(os.listdir("/dev/fd"))
    needed = in_use + OPEN_FILES + OTHER_FILES
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    with pytest.raises(InputError, match=rf"ulimit -n=64: .*{OPEN_FILES} \+ {OTHER_FILES} = \d+\. Raise it"):
        PairReader(prepared)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (needed + 8, needed + 8))
    check_descriptors()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    check_descriptors()
