import json
from typing import Any

import numpy as np
import pytest

from tbpo_ray.config.schema import Config, DataConfig
from tbpo_ray.data.card import card_metrics, data_card, write_card
from tbpo_ray.data.preparation import PairsSpec, prepare
from tbpo_ray.errors import InputError
from tbpo_ray.workflows.prepare import prepare_all

from .conftest import pair


@pytest.fixture
def prepared(write_rows, tokenizer_folder, tmp_path):
    rows = [pair(i, language="de" if i % 4 else "fr") for i in range(40)]
    rows += [pair(3, language="de"), pair(0, chosen="same", rejected="same"), {"prompt": "x"}]
    data = DataConfig(quarantine_limit=1, max_length=24, max_prompt_length=10, card_column="language")
    file = write_rows(rows)
    return prepare(PairsSpec(file, data, tokenizer_folder), tmp_path, progress=False, distributed=False)


def test_the_card_counts_the_prepared_pairs(prepared):
    card = data_card(prepared, Config().training)
    lengths = prepared.lengths().astype(int)
    assert (card["records"], card["pairs"], card["duplicate_pairs"], card["identical_answers"]) == (
        43,
        41,
        1,
        1,
    )
    assert card["quarantined"] == {"total": 2, "answers_identical": 1, "chosen_missing": 1}
    assert card["column"] == {"de": 31, "fr": 10} and sum(card["sources"].values()) == 41
    assert (
        card["tokens"]["chosen"] == lengths[:, 1].sum()
        and card["lengths"]["chosen"]["max"] == lengths[:, 1].max()
    )
    assert all(sum(card["histogram"][side]) == 41 for side in ("prompt", "chosen", "rejected"))
    tail = np.abs(lengths[:, 1] - lengths[:, 2]).sum() / lengths[:, 1:].sum()
    assert card["tail_share"] == pytest.approx(tail) and card["length_bias"]["chosen_longer"] == 1
    assert 0 <= card["padding_share"]["by_length"] <= card["padding_share"]["random"]
    assert all(isinstance(value, float) for value in card_metrics(card).values())


def test_the_card_is_written_as_json_and_a_figure(prepared, tmp_path):
    card, numbers, picture = write_card(prepared, tmp_path / "card")
    assert json.loads(numbers.read_text()) == card
    assert picture.read_bytes().startswith(b"\x89PNG") and len(list((tmp_path / "card").iterdir())) == 2


def test_every_missing_source_is_reported_before_anything_starts(tmp_path):
    data = {"train": "/nowhere/a.jsonl", "eval": [{"source": "/nowhere/b.jsonl"}, {"source": "builtin:x"}]}
    config = Config.model_validate({"run": {"output_dir": str(tmp_path)}, "data": data})
    with pytest.raises(InputError) as caught:
        prepare_all(config)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["data.train", "data.eval", "data.eval"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.e2e
def test_the_prepare_job_writes_cards_quarantine_and_an_mlflow_run(write_rows, tmp_path, ray_session):
    file = write_rows([*(pair(i) for i in range(30)), {"prompt": "x"}])
    config = Config.model_validate(
        {
            "run": {"name": "p", "output_dir": str(tmp_path)},
            "data": {"train": file, "eval": "builtin:copyedit?pairs=9"},
        }
    )
    done = prepare_all(config)
    assert done["train"]["pairs"] == 30 and done["train"]["quarantined"] == 1 and done["eval"]["pairs"] == 9
    names = {path.name for path in (tmp_path / "p").iterdir()}
    assert names == {
        *(f"data_card_{role}.{kind}" for role in ("train", "eval") for kind in ("json", "png")),
        "quarantine.jsonl",
        "prepare.json",
    }
    assert prepare_all(config) == done
    from mlflow import MlflowClient

    client: Any = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert [run.data.tags["data.train.quarantined"] for run in runs] == ["1"] and not runs[0].data.metrics
    profile = json.loads(runs[0].inputs.dataset_inputs[0].dataset.profile)
    assert profile["num_rows"] == 30 and profile["quarantined"] == 1 and "tail_share" in profile
