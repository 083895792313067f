import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from tbpo_ray.config.schema import DataConfig, SourceConfig
from tbpo_ray.data import preparation as module
from tbpo_ray.data.card import data_card
from tbpo_ray.data.preparation import PairsSpec, prepare
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.data.tokenize import PairTokenizer, TokenizerSpec
from tbpo_ray.errors import InputError

from .conftest import CHAT, decode_answer, make_tokenizer, pair
from .test_records import BAD

SPEC_FIELDS = {field.name for field in dataclasses.fields(PairsSpec)}


@pytest.fixture
def run(tmp_path, tokenizer_folder):
    def run(source, data=None, tokenizer=tokenizer_folder, **more):
        spec = {name: more.pop(name) for name in list(more) if name in SPEC_FIELDS}
        options = {"cache_dir": tmp_path / "cache", "progress": False, "distributed": False} | more
        return prepare(
            PairsSpec(source, data or DataConfig(quarantine_limit=1), tokenizer, **spec), **options
        )

    return run


def content(prepared):
    return [
        (r["source"], r["row"], r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in prepared.rows()
    ]


def test_pairs_in_the_order_of_the_source_with_lengths_and_metadata(run, write_rows, tokenizer_folder):
    file = write_rows([pair(i, language=["de", "fr"][i % 2]) for i in range(2100)])
    prepared = run(file, DataConfig(card_column="language"))
    rows = list(prepared.rows())
    assert [row["row"] for row in rows] == list(range(2100)) and prepared.pairs == prepared.records == 2100
    assert rows[7]["metadata"] == {"language": "fr"} and rows[7]["source"] == file
    assert [n for _, n in prepared.shards] == [1024, 1024, 52] and prepared.starts().tolist() == [
        0,
        1024,
        2048,
        2100,
    ]
    lengths = [[len(row[c]) for c in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in rows]
    assert prepared.lengths().tolist() == lengths and prepared.lengths().dtype == np.int32
    tokenizer = PairTokenizer(TokenizerSpec.load(tokenizer_folder), 2048, 1024)
    assert decode_answer(tokenizer, rows[7]["chosen_ids"]) == "good answer 7"
    assert prepared.quarantined == 0 and prepared.quarantine_file is None
    assert not [name for name in os.listdir(Path(prepared.path).parent) if name.startswith(".")]


def test_pairs_are_reused_if_nothing_changed_and_rebuilt_if_anything_did(
    run, write_rows, tmp_path, monkeypatch
):
    file = write_rows([pair(i) for i in range(20)])
    first = run(file)
    stamp = os.stat(first.path).st_mtime_ns
    assert run(file).fingerprint == first.fingerprint and os.stat(first.path).st_mtime_ns == stamp
    assert run(file, DataConfig(quarantine_limit=0.5)).fingerprint == first.fingerprint
    other = tmp_path / "other"
    make_tokenizer(template=CHAT, adds_bos=True).save_pretrained(other)
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}!")
    changed = [
        run(file, DataConfig(max_length=64)),
        run(file, DataConfig(max_prompt_length=9)),
        run(file, tokenizer=str(other)),
        run(file, chat_template=str(template)),
        run(file, chat_template="none"),
        run(file, max_pairs=5),
        run([SourceConfig(source=file, weight=2)]),
    ]
    Path(file).write_text(json.dumps(pair(1)) + "\n")
    changed.append(run(file))
    monkeypatch.setattr(module, "CODE_VERSION", 10_000)
    changed.append(run(file))
    assert len({first.fingerprint, *(p.fingerprint for p in changed)}) == 1 + len(changed)


def test_every_malformed_record_is_quarantined_with_its_reason(run, write_rows):
    rows = [pair(0), *BAD.values(), b"{no json", b"\xff", pair(1, chosen="lower \ud800")]
    prepared = run(write_rows([*rows, pair(2)]))
    lines = [json.loads(line) for line in prepared.quarantine_file.read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in lines] == [
        *((i + 1, reason) for i, reason in enumerate(BAD)),
        (len(BAD) + 1, "not_json"),
        (len(BAD) + 2, "not_utf8"),
        (len(BAD) + 3, "text_not_unicode"),
    ]
    assert all(line.keys() == {"source", "row", "reason", "detail", "record"} for line in lines)
    assert len({line["reason"] for line in lines}) >= 12
    assert prepared.pairs == 2 and prepared.records == len(rows) + 1 and prepared.quarantined == len(rows) - 1
    assert sum(n for name, n in prepared.counts.items() if name.startswith("quarantined/")) == len(rows) - 1


def test_records_that_fail_in_tokenization_are_quarantined_too(run, write_rows, tmp_path):
    make_tokenizer("words").save_pretrained(tmp_path / "words")
    rows = [
        {"prompt": "the", "chosen": "cat", "rejected": "mat"},
        {"prompt": "the", "chosen": "zebra", "rejected": "mat", "language": "de"},
    ]
    prepared = run(write_rows(rows), tokenizer=str(tmp_path / "words"))
    (line,) = [json.loads(line) for line in prepared.quarantine_file.read_text().splitlines()]
    assert (line["row"], line["reason"]) == (1, "answer_not_representable")
    assert line["record"]["chosen"] == "zebra" and line["record"]["language"] == "de"


def test_too_many_bad_records_stop_the_run_and_leave_the_quarantine(run, write_rows, tmp_path):
    file = write_rows([pair(i) for i in range(8)] + [{"prompt": "x"}, pair(9, rejected="good answer 9")])
    with pytest.raises(InputError) as caught:
        run(file, DataConfig(quarantine_limit=0.1))
    text = str(caught.value)
    assert "2 of 10 records (20.0%)" in text and "chosen_missing 1" in text and "answers_identical 1" in text
    (left,) = (tmp_path / "cache").iterdir()
    assert (
        left.name.startswith("quarantine-") and str(left) in text and len(left.read_text().splitlines()) == 2
    )
    assert run(file, DataConfig(quarantine_limit=0.2)).pairs == 8
    with pytest.raises(InputError, match="2 of 10"):  # also when the shards are there
        run(file, DataConfig(quarantine_limit=0.1))


@pytest.mark.parametrize(("rows", "says"), [([], "is empty"), ([{"a": 1}], "none of its 1 records")])
def test_a_source_without_usable_records_is_a_clear_error(run, write_rows, rows, says):
    with pytest.raises(InputError, match=says):
        run(write_rows(rows))
    with pytest.raises(InputError, match=r"data\.eval: /nowhere/rows\.jsonl"):
        run("/nowhere/rows.jsonl", role="eval")


def test_weights_repeat_and_sample_by_seed(run, write_rows):
    a, b = (
        write_rows([pair(i) for i in range(400)], "a.jsonl"),
        write_rows([pair(i) for i in range(900, 910)], "b.jsonl"),
    )
    mix = [SourceConfig(source=a, weight=0.5), SourceConfig(source=b, weight=3)]
    prepared = run(mix, seed=1)
    rows = content(prepared)
    small = [row for source, row, *_ in rows if source == b]
    assert small == [i for i in range(10) for _ in range(3)]
    taken = [row for source, row, *_ in rows if source == a]
    assert 160 < len(taken) < 240 and len(set(taken)) == len(taken)
    assert (
        prepared.counts["skipped_by_weight"] == 400 - len(taken)
        and prepared.counts["repeated_by_weight"] == 20
    )
    assert prepared.counts["duplicate_pairs"] == 0
    assert content(run(mix, seed=1)) == rows and content(run(mix, seed=2)) != rows


@pytest.mark.heavy
def test_shares_are_drawn_by_record_and_complementary_ones_are_disjoint(run, write_rows):
    file = write_rows([pair(i) for i in range(2100)])

    def rows(share, **more):
        prepared = run(file, DataConfig(share=share), **more)
        assert prepared.pairs + prepared.counts.get("skipped_by_share", 0) == prepared.records
        return [row for _, row, *_ in content(prepared)]

    small, rest = rows(0.3), rows([0.3, 1.0])
    assert 560 < len(small) < 700
    assert not set(small) & set(rest) and sorted(small + rest) == list(range(2100))
    assert rows([0, 0.3]) == small and rows(0.3, seed=1) != small
    assert rows(0.3, role="eval") == list(range(2100))
    assert set(rows(0.3, max_pairs=1500)) == {row for row in small if row < 1500}
    whole = run(file)
    assert whole.fingerprint == run(file, DataConfig(share=1)).fingerprint
    assert whole.fingerprint == run(file, seed=1).fingerprint
    with pytest.raises(InputError, match=r"data\.share=1e-09: selects no pairs"):
        run(file, DataConfig(share=1e-9))


def test_swapped_answers_exchange_the_sides_and_what_describes_them(run, write_rows):
    file = write_rows(
        [pair(i, chosen_weights=[1.0], rejected_weights=[2.0], rejected_score=i, other=7) for i in range(9)]
    )
    plain, swapped = run(file), run(file, DataConfig(swap_answers=True))
    assert swapped.fingerprint != plain.fingerprint and swapped.inputs["swap_answers"] is True
    for before, after in zip(plain.rows(), swapped.rows(), strict=True):
        assert after["prompt_ids"] == before["prompt_ids"]
        assert after["chosen_ids"] == before["rejected_ids"] != before["chosen_ids"]
        assert after["rejected_ids"] == before["chosen_ids"]
        assert after["metadata"] == {
            "rejected_weights": [1.0],
            "chosen_weights": [2.0],
            "chosen_score": before["row"],
            "other": 7,
        }
    assert swapped.lengths()[:, [0, 2, 1]].tolist() == plain.lengths().tolist()
    assert data_card(swapped)["answers_swapped"] and not data_card(plain)["answers_swapped"]


def test_weights_that_select_no_pairs_are_a_clear_error(run, write_rows):
    mix = [SourceConfig(source=write_rows([pair(0)]), weight=1e-9)]
    with pytest.raises(InputError, match=r"data\.train: its weights"):
        run(mix)


def test_max_pairs_reads_the_first_records_over_all_sources(run, write_rows):
    a, b = (
        write_rows([pair(i) for i in range(5)], "a.jsonl"),
        write_rows([pair(i) for i in range(9)], "b.jsonl"),
    )
    both = [SourceConfig(source=a), SourceConfig(source=b)]
    assert [(s, r) for s, r, *_ in content(run(both, max_pairs=7))] == [(a, i) for i in range(5)] + [
        (b, 0),
        (b, 1),
    ]
    assert run(both, DataConfig(max_eval_pairs=3), role="eval").pairs == 3


def test_a_crash_leaves_nothing_that_looks_complete(run, write_rows, monkeypatch, tmp_path):
    file = write_rows([pair(i) for i in range(20)])
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(file)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.undo()
    left = [tmp_path / "cache" / f".pairs-{run(file).fingerprint}-{name}" for name in ("old", "new")]
    for folder in left:
        folder.mkdir()
    os.utime(left[0], (0, 0))
    shutil.rmtree(run(file).path)
    assert run(file).pairs == 20 and [folder.exists() for folder in left] == [False, True]


def test_a_damaged_folder_is_rebuilt(run, write_rows):
    file = write_rows([pair(i) for i in range(20)])
    shard = Path(run(file).path) / run(file).shards[0][0]
    good = shard.read_bytes()
    shard.write_bytes(good[:-1])
    assert run(file).pairs == 20 and shard.read_bytes() == good
    shard.write_bytes(good[:50] + b"?" + good[51:])
    with pytest.raises(InputError, match="damaged"):
        PreparedPairs.load(shard.parent, verify=True)


def test_concurrent_builders_do_not_clash(run, write_rows):
    file = write_rows([pair(i) for i in range(300)])
    found, errors = [], []

    def build():
        try:
            found.append(content(run(file)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and all(rows == found[0] for rows in found) and len(found) == 4


@pytest.mark.e2e
def test_ray_data_gives_identical_shards(run, write_rows, ray_session, tmp_path):
    a = write_rows([pair(i) if i % 50 else {"prompt": "x"} for i in range(2500)], "a.jsonl")
    mix = [SourceConfig(source=a, weight=1.5), SourceConfig(source="builtin:copyedit?pairs=1500")]
    here = run(mix)
    there = run(mix, distributed=True, cache_dir=tmp_path / "ray")
    assert (
        there.fingerprint == here.fingerprint and there.counts == here.counts and there.shards == here.shards
    )
    for name in (*(name for name, _ in here.shards), "lengths.npy", "quarantine.jsonl"):
        assert (Path(there.path) / name).read_bytes() == (Path(here.path) / name).read_bytes()
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"\x1f\x8b no")
    with pytest.raises(InputError, match="broken"):
        run(str(broken), distributed=True)
    assert run(mix, max_pairs=1100, distributed=True).records == 1100


@pytest.mark.shared
def test_real_pairs(run, real_data):
    prepared = run(str(real_data))
    assert (prepared.records, prepared.pairs, prepared.quarantined) == (2312, 2303, 9)
    lengths = prepared.lengths()
    assert prepared.counts["tail_tokens"] == np.abs(lengths[:, 1] - lengths[:, 2]).sum()


def test_context_inside_of_answers_is_masked_from_shard_to_batch(write_rows, tmp_path, tokenizer_folder):
    from tbpo_ray.data.schedule import Schedule
    from tbpo_ray.data.stream import local_micro_batches
    from tbpo_ray.data.window import decode, encode

    def turn(role, content):
        return {"role": role, "content": content}

    prompt = [turn("user", "the cat")]
    several = [turn("assistant", "sat"), turn("user", "friend"), turn("assistant", "on the mat")]
    rows = [
        {"prompt": prompt, "chosen": several, "rejected": [turn("assistant", "end")]},
        {"prompt": "hello", "chosen": "the mat", "rejected": "a friend"},
    ]
    spec = PairsSpec(write_rows(rows), DataConfig(max_length=64), tokenizer_folder)
    prepared = prepare(spec, tmp_path / "cache", progress=False, distributed=False)
    assert prepared.counts["masked_answers"] == 1 and prepared.mask_columns
    masked, plain = prepared.rows()
    assert len(masked["chosen_mask"]) == len(masked["chosen_ids"]) and not all(masked["chosen_mask"])
    assert masked["rejected_mask"] is plain["chosen_mask"] is plain["rejected_mask"] is None
    schedule = Schedule(prepared.lengths(), seed=0, pairs_per_step=2, micro_batch_pairs=2)
    (micro,) = local_micro_batches(prepared, schedule)
    for batch in (micro, *decode(encode([micro]))):
        columns = batch.columns()
        at = int(np.flatnonzero(batch.pair_ids == 0)[0])
        assert columns["chosen_mask"][at].astype(bool).tolist() == masked["chosen_mask"]
        assert not len(columns["chosen_mask"][1 - at]) and not len(columns["rejected_mask"][at])
    unmasked = PairsSpec(write_rows(rows[1:], "plain.jsonl"), DataConfig(max_length=64), tokenizer_folder)
    assert not prepare(unmasked, tmp_path / "cache", progress=False, distributed=False).mask_columns


def test_template_arguments_are_part_of_the_fingerprint(write_rows, tmp_path, tokenizer_folder):
    source = write_rows([pair(i) for i in range(3)])
    fingerprints = {
        prepare(
            PairsSpec(source, DataConfig(template_kwargs=kwargs), tokenizer_folder),
            tmp_path / "cache",
            progress=False,
            distributed=False,
        ).fingerprint
        for kwargs in ({}, {"enable_thinking": False}, {"enable_thinking": True})
    }
    assert len(fingerprints) == 3


def test_what_prepared_pairs_lose_of_their_records_is_said(write_rows, tmp_path, capsys):
    template = CHAT.replace("for m in messages", "for m in messages if m.role != 'system'")
    make_tokenizer(template=template).save_pretrained(tmp_path / "tokenizer")
    rows = [pair(i, system="Be brief.") for i in range(3)]
    data = DataConfig(max_length=64, template_kwargs={"enable_thinkin": False})
    spec = PairsSpec(write_rows(rows), data, str(tmp_path / "tokenizer"))
    prepared = prepare(spec, tmp_path / "cache", distributed=False)
    assert data_card(prepared)["rules"] == {"prompt_altered_by_template": 3}
    said = "".join(capsys.readouterr())
    assert "data.train: 3 prompts" in said and "prompt_altered_by_template" in said
    assert "data.template_kwargs.enable_thinkin=False" in said
