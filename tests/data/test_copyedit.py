import subprocess
import sys

import pytest

from tbpo_ray.data import copyedit
from tbpo_ray.data.messages import answer_text
from tbpo_ray.data.records import iter_prompts, iter_records
from tbpo_ray.errors import InputError


def rows(query):
    return list(iter_records(f"builtin:copyedit?{query}"))


def test_imports_neither_torch_nor_ray():
    code = (
        "import sys, tbpo_ray.data.records, tbpo_ray.data.copyedit;"
        "sys.exit(bool({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.heavy
def test_splits_never_share_a_prompt():
    seen = {
        split: {
            r.prompt[0]["content"] for seed in (0, 1) for r in rows(f"split={split}&pairs=1500&seed={seed}")
        }
        for split in ("train", "sft", "eval", "test")
    }
    names = list(seen)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not seen[a] & seen[b]


def test_answers_are_correct_by_an_independent_solver():
    for record in rows("pairs=500"):
        head, _, text = record.prompt[0]["content"].partition(": ")
        words = text.split()
        name, *arguments = head.split()
        if name == "reverse":
            words.reverse()
        elif name == "sort":
            words.sort()
        elif name == "swap":
            words[0], words[-1] = words[-1], words[0]
        elif name == "drop":
            del words[0]
        elif name == "upper":
            words = [w.upper() for w in words]
        elif name == "replace":
            words[words.index(arguments[0])] = arguments[2]
        else:
            assert name == "copy"
        assert answer_text(record.chosen) == " ".join(words) == record.metadata["answer"]
        assert copyedit.check(record.metadata, f" {answer_text(record.chosen)}\n")
        assert not copyedit.check(record.metadata, answer_text(record.rejected))


def test_damage_covers_the_first_difference_and_nothing_before_it():
    for record in rows("pairs=800"):
        right, wrong = answer_text(record.chosen).split(), answer_text(record.rejected).split()
        spans = record.metadata["damage"]
        assert spans == sorted(spans)
        first = next((i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b), None)
        if first is None:  # one is a prefix of the other
            first = min(len(right), len(wrong))
        start = len(" ".join(wrong[:first])) + bool(first)
        start = start if first < len(wrong) else len(answer_text(record.rejected))
        assert spans[0][0] == start
        for low, high in spans:
            assert answer_text(record.rejected)[low:high].strip() == answer_text(record.rejected)[low:high]


def test_sft_targets_are_damaged_at_the_given_rate():
    some = rows("split=sft&pairs=2000&damaged=0.3")
    share = sum(answer_text(r.chosen) != r.metadata["answer"] for r in some) / len(some)
    assert 0.26 < share < 0.34
    assert all(answer_text(r.chosen) != answer_text(r.rejected) for r in some)
    assert all(
        bool(r.metadata["chosen_damage"]) == (answer_text(r.chosen) != r.metadata["answer"]) for r in some
    )
    assert all(answer_text(r.chosen) == r.metadata["answer"] for r in rows("split=sft&pairs=50&damaged=0"))


def test_rows_depend_only_on_the_seed_and_their_index():
    assert (
        rows("pairs=20")
        == [r.__class__(**{**r.__dict__, "source": "builtin:copyedit?pairs=20"}) for r in rows("pairs=40")][
            :20
        ]
    )
    assert rows("pairs=20&seed=1")[0].prompt != rows("pairs=20")[0].prompt
    assert {r.metadata["task"] for r in rows("pairs=40&tasks=copy,sort")} == {"copy", "sort"}


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("pair=3", "pair"),
        ("split=dev", "split"),
        ("damaged=2", "damaged"),
        ("pairs=x", "pairs"),
        ("tasks=hop", "tasks"),
        ("flipped=0.6", "flipped"),
        ("split=sft&flipped=0.1", "flipped"),
    ],
)
def test_unknown_parameters_are_refused(query, named):
    with pytest.raises(InputError, match=named):
        rows(query)


def test_prompts():
    prompts = list(iter_prompts("builtin:copyedit?split=test", 7))
    assert len(prompts) == 7 and prompts[3].row == 3


def test_flipped_pairs_are_those_without_noise_with_their_answers_exchanged():
    plain, noisy = rows("pairs=400"), rows("pairs=400&flipped=0.25")
    flips = [record.metadata["flipped"] for record in noisy]
    assert 75 <= sum(flips) <= 125
    for before, after, flipped in zip(plain, noisy, flips, strict=True):
        answers = (before.chosen, before.rejected)
        assert (after.chosen, after.rejected) == (answers[::-1] if flipped else answers)
        spans = ("chosen_damage", "damage") if flipped else ("damage", "chosen_damage")
        assert after.metadata[spans[0]] == before.metadata["damage"]
        assert after.metadata[spans[1]] == []


def test_pairs_flipped_at_a_low_rate_are_flipped_at_a_higher_rate_too():
    few, many = (
        [record.metadata["flipped"] for record in rows(f"pairs=300&flipped={share}")] for share in (0.1, 0.4)
    )
    assert sum(few) < sum(many)
    assert all(high for low, high in zip(few, many, strict=True) if low)


def test_the_fingerprint_of_a_source_without_noise_stays():
    assert "flipped" not in copyedit.parse_source("builtin:copyedit?pairs=3").describe()
    assert "flipped=0.1" in copyedit.parse_source("builtin:copyedit?flipped=0.1").describe()
