"""YAML that is valid and odd is refused quickly, with its file and line."""

from __future__ import annotations

import resource
import time

import pytest

from tbpo_ray.config.loading import load_config, read_space, read_stored
from tbpo_ray.errors import InputError

ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000))
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9)
)

ODD = {
    "cycle": ("run: &r {name: *r}", 1, "contains itself"),
    "cycle in a list": ("runs: [a]\nsft: &r\n  a: [*r]", 2, "contains itself"),
    "cycle by merging": ("run: &r\n  <<: *r", 1, "contains itself"),
    "list levels": ("runs:\n  " + "[" * 3000 + "]" * 3000, 2, "deeply"),
    "mapping levels": ("\n".join(" " * i + f"k{i}:" for i in range(1000)), 51, "deeply"),
    "unclosed levels": ("runs: " + "[" * 3000, 1, "deeply"),
    "alias levels": (CHAIN, 51, "deeply"),
    "alias bomb": (ALIASES, 5, "expand"),
    "merge bomb": (MERGES, 6, "expand"),
    "digits": ("training:\n  max_steps: " + "9" * 5000, 2, "5000 characters"),
    "hexadecimal digits": ("training:\n  max_steps: 0x" + "f" * 5000, 2, "5002 characters"),
    "a section twice": (
        "training: {tf32: true}\nrun: {}\ntraining: {epochs: 2}",
        3,
        "'training' is given twice",
    ),
    "a key twice": ("run:\n  name: a\n  name: b", 3, "'name' is given twice"),
    "a dotted key twice": ("run.name: a\nrun.name: b", 2, "'run.name' is given twice"),
    "dotted and nested": (
        "training.epochs: 2\ntraining:\n  epochs: 3",
        3,
        "'training.epochs' is given twice",
    ),
    "value and section": ("training: 3\ntraining.epochs: 2", 2, "'training' is given twice"),
    "twice in a stage": ("sft:\n  run.name: a\n  run: {name: b}", 3, "'run.name' is given twice"),
    "wrong tag": ("run: {name: !!int abc}", 1, "'abc' is not of the type int"),
    "wrong truth value": ("run: {name: !!bool maybe}", 1, "'maybe' is not of the type bool"),
    "tag of a list": ("run: {name: !!int [1]}", 1, "scalar"),
    "a date that does not exist": ("run: {name: !!timestamp 2026-02-30}", 1, "timestamp"),
    "no date": ("run: {name: !!timestamp x}", 1, "timestamp"),
    "bytes": ("run: {name: !!binary '@'}", 1, "binary"),
    "a set": ("runs: !!set {a, b}", 1, "set"),
    "pairs": ("runs: !!pairs [a: b]", 1, "pairs"),
    "python": ("run: {name: !!python/object/apply:os.getcwd []}", 1, "python"),
    "a key that is a list": ("run:\n  ? [a]\n  : b", 2, "a key must be text"),
    "two documents": ("run: {}\n---\nrun: {}", 2, "document"),
    "a control character": ("run:\n  name: a\x07b", 2, "not allowed"),
    "unknown alias": ("run: {name: *nobody}", 1, "nobody"),
    "unclosed": ("run: {name: a", 1, "expected"),
    "a tab": ("run:\n\tname: a", 2, "token"),
    "merged text": ("run:\n  <<: text", 2, "merging"),
}


@pytest.mark.parametrize(("text", "line", "words"), ODD.values(), ids=ODD)
def test_odd_yaml_is_refused_with_its_line(tmp_path, text, line, words):
    file = tmp_path / "odd.yaml"
    file.write_text(text, encoding="utf-8")
    for read in (load_config, read_space):
        before, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(InputError) as refusal:
            read(file)
        assert time.perf_counter() - before < 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kB
        message = str(refusal.value)
        assert message.startswith(f"{file}: not valid YAML, line {line}") and words in message
        assert "\n" not in message and len(message) < 300


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path):
    file = tmp_path / "odd.yaml"
    file.write_bytes(b"run:\n  seed: 1\n  name: caf\xe9\n")
    with pytest.raises(InputError, match="line 3: the byte 0xe9 is not UTF-8"):
        load_config(file)
    file.write_bytes("\ufeffrun: {name: a}".encode())
    assert load_config(file).run.name == "a"


def test_a_file_that_is_too_large_is_refused_without_parsing(tmp_path):
    file = tmp_path / "large.yaml"
    file.write_text("run: {name: " + "a" * 10_000_000 + "}")
    before = time.perf_counter()
    with pytest.raises(InputError, match="10000013 bytes"):
        load_config(file)
    assert time.perf_counter() - before < 1


@pytest.mark.parametrize(
    "override", ["run.name=%s", "training.max_steps=%s", "training={%s", "data.eval=[{x: %s}]"]
)
def test_messages_about_long_values_are_short(override):
    with pytest.raises(InputError) as refusal:
        load_config(None, [override % ("a" * 100_000)])
    assert override.split("=")[0] in str(refusal.value)
    assert len(refusal.value.faults) <= 3 and all(len(fault) < 1000 for fault in refusal.value.faults)


def test_names_with_dots_and_merged_values_are_not_given_twice(tmp_path):
    file = tmp_path / "fine.yaml"
    file.write_text(
        "run: &b {name: a}\nevaluation.policies: {v1: a, v1.0: b}\n"
        "training.epochs: 2\ntraining: {tf32: true}\nsft: {run: {<<: *b, name: c}}\n"
    )
    config = load_config(file)
    assert config.evaluation.policies == {"v1": "a", "v1.0": "b"} and config.sft == {"run": {"name": "c"}}
    assert (config.training.epochs, config.training.tf32) == (2, True)


def test_a_date_that_does_not_exist_is_a_text(tmp_path):
    file = tmp_path / "date.yaml"
    file.write_text("run: {name: 2026-02-30}\ntraining: {max_steps: 2026-02-30}")
    with pytest.raises(InputError) as refusal:
        load_config(file)
    (fault,) = refusal.value.faults
    assert fault.startswith("training.max_steps='2026-02-30'")
    assert load_config(file, ["training.max_steps=3"]).run.name == "2026-02-30"


@pytest.mark.parametrize(
    ("text", "key", "line", "value"),
    [
        ("sft:\n  training.epochs: 1\n  training:\n    epochs: 2\n", "sft.training.epochs", 4, 2),
        ("sft:\n  training:\n    epochs: 2\n  training.epochs: 1\n", "sft.training.epochs", 4, 1),
    ],
)
def test_the_configuration_of_a_finished_run_may_name_a_key_of_a_stage_twice(
    tmp_path, capsys, text, key, line, value
):
    file = tmp_path / "config.yaml"
    file.write_text(f"{text}run: {{name: a}}\n")
    stored = read_stored(file)
    assert stored == {"sft": {"training": {"epochs": value}}, "run": {"name": "a"}}
    said = capsys.readouterr().err
    assert f"{file}: line {line}: the key '{key}' is given twice" in said
    with pytest.raises(InputError, match=rf"line {line}.*is given twice"):
        load_config(file)
    file.write_text("sft: {training.epochs: 1, training.seed: 3}\nrun: {name: a}\nrun.name: b\n")
    with pytest.raises(InputError, match=r"line 3.*'run\.name' is given twice"):
        read_stored(file)
