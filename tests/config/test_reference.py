"""The generated reference has every key, with a description."""

from __future__ import annotations

import re

from tbpo_ray.config.loading import known_keys
from tbpo_ray.config.reference import reference_markdown, sections
from tbpo_ray.config.schema import RENAMED_KEYS, Config

ROW = re.compile(r"^\| `([\w.]+)` \| (.*) \| (.*) \| (.*?) \| (.*) \|$", re.M)


def test_every_key_is_in_the_reference_and_described() -> None:
    page = reference_markdown()
    described = {key: text for key, *_, text in ROW.findall(page)}
    headings = set(re.findall(r"^#+ `([\w.]+)`$", page, re.M))
    assert set(known_keys()) <= set(described) | headings
    assert [key for key, text in described.items() if not text.strip().endswith((".", "`"))] == []
    assert set(RENAMED_KEYS) <= set(re.findall(r"`([\w.]+)`", page))


def test_every_section_says_what_it_is_for() -> None:
    for title, _, model in sections(Config):
        assert model.__doc__ and model.__doc__.strip().endswith("."), title


def test_types_defaults_and_limits() -> None:
    rows = {key: rest for key, *rest in ROW.findall(reference_markdown())}
    assert rows["run.seed"][:3] == ["integer", "`0`", ">= 0, < 2147483648"]
    assert rows["objective.beta"][:3] == ["number or null", "`null`", "> 0"]
    assert rows["objective.label_smoothing"][2] == ">= 0, < 0.5"
    assert rows["objective.bregman.generator"][1:3] == [
        "`sba`",
        "`logistic`, `kliep`, `lsif`, `ba`, `sba`, `beta_family`",
    ]
    assert rows["cluster.num_workers"][:3] == ["integer or list of integers", "`1`", ">= 1, 2 items"]
    assert rows["training.deepspeed"][:2] == ["mapping", '`{"stage": null}`']
    assert rows["data.train"][0] == "string or list of mappings"
    assert rows["source"][:2] == ["string", "required"]
    assert rows["model.lora"][:2] == ["mapping or null", "`null`"]
