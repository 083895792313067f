"""Helper models of an objective: which are needed, how they are configured, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from tbpo_ray.config.helpers import HELPERS
from tbpo_ray.config.loading import load_config, to_yaml
from tbpo_ray.config.objective import OBJECTIVES, TRAITS
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.measures import Estimate
from tbpo_ray.evaluation.verdict import PolicyVerdict, Verdict
from tbpo_ray.models.tiny import build_tiny
from tbpo_ray.training.token_weight_cache import weight_models
from tbpo_ray.workflows.helpers import (
    Helper,
    check_helpers,
    data_description,
    plan_helpers,
    with_helpers,
)
from tbpo_ray.workflows.pipeline import pipeline_plan, run_pipeline, stages


def settings(out: Path, objective: str, *more: str) -> Config:
    return load_config(
        "jobs/configs/tiny.yaml",
        [f"run.output_dir={out}", "run.name=r", f"objective.name={objective}", *more],
    )


def planned(out: Path, objective: str, *more: str) -> dict[str, Helper]:
    """The helpers of a configuration by name, after all checks."""
    config = settings(out, objective, *more)
    _, start = stages(config)
    helpers = plan_helpers(start)
    check_helpers(start, helpers, config)
    return {helper.name: helper for helper in helpers}


def test_every_objective_with_helpers_reads_their_settings():
    assert set(HELPERS) <= set(OBJECTIVES)
    for name in OBJECTIVES:
        assert ("helpers" in TRAITS[name].settings) == (name in HELPERS)


def test_the_oracle_is_a_run_of_its_own_on_a_share_of_the_pairs(tmp_path):
    (oracle,) = planned(tmp_path, "sepo", "objective.beta=3", "objective.label_smoothing=0.1").values()
    config = oracle.config
    assert (config.run.name, config.run.output_dir) == ("oracle", str(tmp_path / "r" / "helpers"))
    assert (config.objective.name, config.objective.effective_beta) == ("dpo", 0.1)
    assert config.objective.label_smoothing == 0 and config.objective.helpers == {} and config.sft == {}
    assert config.data.share_range == (0, 0.3) and not config.data.swap_answers
    assert config.model.name_or_path == str(tmp_path / "r-sft" / "export")
    assert config.training.max_steps == 36  # its share of 120
    assert config.training.learning_rate == 5e-6
    assert config.data.eval is None and config.training.eval_every is None
    assert config.data.cache_dir == str(tmp_path / ".prepared")
    assert config.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert oracle.export == str(tmp_path / "r" / "helpers" / "oracle" / "export")


def test_the_pair_of_tis_dpo_differs_in_the_direction(tmp_path):
    pair = planned(tmp_path, "tis_dpo")
    assert list(pair) == ["positive", "negative"]
    assert [helper.config.data.swap_answers for helper in pair.values()] == [False, True]
    assert {helper.config.objective.name for helper in pair.values()} == {"dpo"}
    assert {helper.config.training.max_steps for helper in pair.values()} == {120}
    sft = planned(
        tmp_path, "tis_dpo",
        "objective.helpers.positive.objective.name=sft", "objective.helpers.negative.objective.name=sft",
    )  # fmt: skip
    assert [(h.config.objective.name, h.config.data.swap_answers) for h in sft.values()] == [
        ("sft", False),
        ("sft", True),
    ]


def test_settings_are_dotted_or_nested_and_win_over_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "objective:\n  name: sepo\n  helpers:\n    oracle:\n"
        "      data.share: [0.0, 0.5]\n      objective: {name: ipo, beta: 0.2}\n      training.max_steps: 7\n"
    )
    config = load_config(file, ["run.name=r", "objective.helpers.oracle.training.learning_rate=1e-4"])
    (oracle,) = plan_helpers(config)
    own = oracle.config
    assert (own.objective.name, own.objective.beta, own.data.share) == ("ipo", 0.2, [0.0, 0.5])
    assert (own.training.max_steps, own.training.learning_rate) == (7, 1e-4)


def test_the_steps_of_a_helper(tmp_path):
    def steps(*more: str) -> tuple[int | None, float]:
        (oracle,) = planned(tmp_path, "sepo", *more).values()
        return oracle.config.training.max_steps, oracle.config.training.epochs

    assert steps("training.max_steps=1") == (1, 1.0)
    assert steps("training.max_steps=null", "training.epochs=2") == (None, 2.0)
    assert steps("objective.helpers.oracle.training.epochs=3") == (None, 3.0)
    assert steps("objective.helpers.oracle.data.share=[0.5, 0.75]") == (30, 1.0)

    # A helper that has begun keeps its number of steps when the run is extended.
    (oracle,) = planned(tmp_path, "sepo").values()
    folder = Path(oracle.export).parent
    (folder / "checkpoints" / "step-00000036").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(oracle.config))
    assert steps("training.max_steps=240") == (36, 1.0)
    assert steps("training.max_steps=240", "objective.helpers.oracle.training.max_steps=72") == (72, 1.0)


def test_t_reg_and_objectives_without_helpers_need_none(tmp_path, capfd):
    assert planned(tmp_path, "t_reg") == {}
    assert planned(tmp_path, "dpo") == {}
    assert planned(tmp_path, "dpo", "objective.helpers.oracle.data.share=0.5") == {}
    assert "objective.helpers.oracle: not trained" in capfd.readouterr().err


def test_models_and_instructions_of_the_user_win(tmp_path):
    positive, negative = "objective.token_weights.positive=/a", "objective.token_weights.negative=/b"
    assert planned(tmp_path, "sepo", positive) == {}
    assert list(planned(tmp_path, "tis_dpo", positive)) == ["negative"]
    assert planned(tmp_path, "tis_dpo", positive, negative) == {}
    assert planned(tmp_path, "tis_dpo", "objective.token_weights.source=columns") == {}
    told = "objective.token_weights.positive_instruction=Be kind."
    assert planned(tmp_path, "tis_dpo", told) == {}
    assert list(planned(tmp_path, "tis_dpo", told, "objective.helpers.negative.training.max_steps=3")) == [
        "negative"
    ]
    _, start = stages(settings(tmp_path, "tis_dpo", positive))
    weights = with_helpers(start, plan_helpers(start)).objective.token_weights
    assert weights.positive == "/a"
    assert weights.negative == str(tmp_path / "r" / "helpers" / "negative" / "export")


def test_the_oracle_is_compared_with_its_own_reference(tmp_path, tiny_model):
    _, start = stages(settings(tmp_path, "sepo"))
    weights = with_helpers(start, plan_helpers(start)).objective.token_weights
    assert weights.positive == str(tmp_path / "r" / "helpers" / "oracle" / "export")
    assert weights.negative is None  # the model that training starts from, by default
    _, start = stages(settings(tmp_path, "sepo", f"model.reference={tiny_model}"))
    assert with_helpers(start, plan_helpers(start)).objective.token_weights.negative == tiny_model
    # An oracle that starts from another model is fine where its reference is named.
    assert planned(
        tmp_path, "sepo", f"objective.helpers.oracle.model.name_or_path={tiny_model}",
        f"objective.token_weights.negative={tiny_model}",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "overrides", "words"),
    [
        ("sepo", ["objective.helpers.positive.data.share=0.5"], ["objective.helpers.positive", "oracle"]),
        ("t_reg", ["objective.helpers.oracle.data.share=0.5"], ["objective.helpers.oracle", "needs none"]),
        ("sepo", ["objective.helpers.orcale.data.share=0.5"], ["objective.helpers.orcale", "oracle"]),
        ("sepo", ["objective.helpers.oracle.data.share=1.5"], ["oracle.data.share=1.5", "in (0, 1]"]),
        ("sepo", ["objective.helpers.oracle.data.share=0"], ["oracle.data.share=0", "in (0, 1]"]),
        ("sepo", ["objective.helpers.oracle.data.share=[0.6, 0.3]"], ["[0.6, 0.3]", "low < high"]),
        ("sepo", ["objective.helpers.oracle.training.max_step=3"], ["oracle.training.max_step", "max_steps"]),
        ("sepo", ["objective.helpers.oracle.objective.name=ppo"], ["oracle.objective.name='ppo'", "dpo"]),
        ("sepo", ["objective.helpers.oracle.objective.name=sepo"], ["oracle.objective.name=sepo", "dpo"]),
        ("sepo", ["objective.helpers.oracle.run.name=x"], ["oracle.run.name='x'", "remove it"]),
        ("sepo", ["objective.helpers.oracle.sft.training.max_steps=3"], ["oracle.sft.", "remove it"]),
        ("sepo", ["objective.helpers.oracle.data.train=/no/file.jsonl"], ["oracle.data.train", "/no/file"]),
        (
            "sepo",
            ["objective.helpers.oracle.model.reference=builtin:tiny"],
            ["oracle.model.reference=builtin:tiny", "objective.token_weights.negative=builtin:tiny"],
        ),
        (
            "sepo",
            ["objective.token_weights.negative=/b"],
            ["objective.helpers.oracle.model.", "objective.token_weights.negative=/b"],
        ),
        (
            "tis_dpo",
            ["objective.helpers.negative.model.reference=builtin:tiny"],
            ["negative.model.reference=builtin:tiny", "objective.helpers.positive", "one reference"],
        ),
    ],
)
def test_helpers_that_do_not_fit_are_refused(tmp_path, objective, overrides, words):
    with pytest.raises(InputError) as caught:
        planned(tmp_path, objective, *overrides)
    for word in words:
        assert word in str(caught.value)


def test_a_fault_of_the_run_is_not_reported_as_one_of_its_helpers(tmp_path):
    with pytest.raises(InputError) as caught:
        planned(tmp_path, "sepo", "data.train=/no/file.jsonl")
    assert str(caught.value).startswith("data.train")


@pytest.mark.heavy
def test_a_helper_with_another_tokenizer_is_refused_before_anything_starts(tmp_path, tiny_model):
    from tokenizers import Tokenizer

    other = build_tiny(tmp_path / "other", seed=0)
    tokenizer = Tokenizer.from_file(str(Path(other) / "tokenizer.json"))
    tokenizer.add_tokens(["extra"])
    tokenizer.save(str(Path(other) / "tokenizer.json"))
    config = settings(
        tmp_path, "sepo", f"objective.helpers.oracle.model.name_or_path={other}",
        f"objective.token_weights.negative={other}",
    )  # fmt: skip
    for job in (pipeline_plan, run_pipeline):
        with pytest.raises(InputError, match=r"objective\.helpers\.oracle\.model\.name_or_path=.*vocabulary"):
            job(config)
    assert not (tmp_path / "r").exists()


def test_what_is_said_about_the_data_of_a_helper(tmp_path):
    def said(*more: str) -> str:
        _, start = stages(settings(tmp_path, "sepo", *more))
        return data_description(start, plan_helpers(start)[0])

    assert said() == "30% of the records; all among the run's pairs"
    assert said("data.share=[0.3, 1]") == "30% of the records; disjoint from the run's pairs"
    assert said("data.share=[0.2, 1]") == "30% of the records; some among the run's pairs"
    assert said("objective.helpers.oracle.data.max_pairs=9").endswith(
        "from other sources than the run's pairs"
    )
    assert "another seed" in said("objective.helpers.oracle.run.seed=5")
    swapped = said("objective.helpers.oracle.data.swap_answers=true", "objective.helpers.oracle.data.share=1")
    assert swapped == "all records, answers swapped; all among the run's pairs"


@pytest.mark.heavy
def test_the_plan_shows_the_whole_chain(tmp_path):
    config = settings(tmp_path, "tis_dpo", "objective.helpers.negative.data.share=0.5")
    lines = pipeline_plan(config).split("\n")
    assert [line for line in lines if line.startswith("# stage")][:4] == [
        "# stage 1: sft",
        "# stage 2: helper positive, dpo, all records; all among the run's pairs",
        "# stage 3: helper negative, dpo, 50% of the records, answers swapped; all among the run's pairs",
        "# stage 4: tis_dpo",
    ]
    pairs = [line.split()[2:] for line in lines if line.startswith("# pairs")]
    assert pairs == [["30000"], ["4000"], ["about", "2000"], ["4000"]]
    steps = [line.split()[2] for line in lines if line.startswith("# steps")]
    assert steps == ["1000", "120", "60", "120"]


def test_training_alone_says_which_models_are_missing(tmp_path):
    for name, words in (
        ("sepo", ["positive", "oracle", "jobs/pipeline.py", "objective.helpers.oracle"]),
        ("tis_dpo", ["positive", "negative", "jobs/pipeline.py", "objective.helpers.negative"]),
    ):
        with pytest.raises(InputError) as caught:
            weight_models(settings(tmp_path, name))
        for word in words:
            assert word in str(caught.value)


def test_a_helper_cannot_change_under_a_run_that_was_trained_with_it(tmp_path):
    config = settings(tmp_path, "sepo", "sft={}", "objective.helpers.oracle.training.max_steps=3")
    _, start = stages(config)
    folder = tmp_path / "r"
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(with_helpers(start, plan_helpers(start))))
    changed = settings(tmp_path, "sepo", "sft={}", "objective.helpers.oracle.training.max_steps=4")
    with pytest.raises(InputError, match=r"objective\.helpers\.oracle\.training\.max_steps=4: .*run\.name"):
        run_pipeline(changed)
    assert not (folder / "helpers").exists()


def test_costs_are_in_the_verdict_and_its_table(tmp_path):
    policy = PolicyVerdict("sepo", "/m", 4, 0, {"exact_match": Estimate(0.5)})
    cost = {
        "name": "helper oracle", "objective": "dpo", "run": "/r/helpers/oracle", "steps": 36, "pairs": 2304,
        "tokens": 123456, "seconds": 7.25, "scored_pairs": 1200, "scoring_seconds": 3.0, "data": "30% of it",
    }  # fmt: skip
    old = {"name": "sft", "objective": "sft", "run": "/r-sft"}
    verdict = Verdict(
        [policy], "sepo", "/m", {"kind": "checker"}, {"source": "s", "rows": 4}, costs=[old, cost]
    )
    assert Verdict.load(verdict.save(tmp_path)).costs == [old, cost]
    lines = verdict.table().split("\n")
    (row,) = [line for line in lines if line.startswith("helper oracle")]
    assert row.split() == [
        "helper", "oracle", "dpo", "36", "2,304", "123,456", "7.2", "1,200", "3.0", "30%", "of", "it"
    ]  # fmt: skip
    assert "training" in lines[lines.index(row) - 3]
    assert "training" not in dataclasses.replace(verdict, costs=[]).table()
    # Verdicts of older versions have no costs.
    tree = yaml.safe_load((tmp_path / "verdict.json").read_text())
    del tree["costs"]
    (tmp_path / "old.json").write_text(str(tree).replace("'", '"').replace("None", "null"))
    assert Verdict.load(tmp_path / "old.json").costs == []


def test_the_guide_of_tgdpo_becomes_its_own_key(tmp_path):
    config = settings(tmp_path, "tgdpo")
    _, start = stages(config)
    (guide,) = planned(tmp_path, "tgdpo").values()
    assert guide.config.objective.name == "dpo" and guide.config.data.share_range == (0, 1)
    named = with_helpers(start, [guide]).objective
    assert named.guide.model == guide.export and named.token_weights.positive is None
    assert planned(tmp_path, "tgdpo", "objective.guide.model=builtin:tiny") == {}
    assert "helper guide" in pipeline_plan(config)


def test_a_guide_with_another_reference_is_refused(tmp_path, tiny_model):
    key = "objective.helpers.guide.model.reference"
    with pytest.raises(InputError, match=f"{key}=.*the guide's reference is not the run's own"):
        planned(tmp_path, "tgdpo", f"{key}={tiny_model}")


def test_arc_bpo_has_an_oracle_for_advantages_only(tmp_path):
    assert planned(tmp_path, "arc_bpo") == {}
    advantage = "objective.arc.shape=advantage"
    (oracle,) = planned(tmp_path, "arc_bpo", advantage).values()
    assert oracle.traits.model_key == "objective.token_weights.positive"
    assert planned(tmp_path, "arc_bpo", advantage, "objective.token_weights.source=columns") == {}


def test_training_tgdpo_alone_asks_for_the_guide(tmp_path, tiny_model):
    with pytest.raises(
        InputError, match=r"objective.guide.model=None: .* needs a guide; give objective.guide.model"
    ):
        weight_models(settings(tmp_path, "tgdpo", f"model.name_or_path={tiny_model}"))
    same = [f"{key}={tiny_model}" for key in ("model.name_or_path", "objective.guide.model")]
    with pytest.raises(InputError, match="compares it with the reference, which is the same"):
        weight_models(settings(tmp_path, "tgdpo", *same))
