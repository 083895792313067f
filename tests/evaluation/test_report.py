"""The comparison of runs written here; the page is parsed by a real HTML parser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tbpo_ray.config.loading import load_config, to_yaml
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.charts import Line, Point, lines, scatter
from tbpo_ray.evaluation.measures import Estimate, share_estimate
from tbpo_ray.evaluation.report import compare_runs
from tbpo_ray.evaluation.verdict import PolicyVerdict, Verdict
from tbpo_ray.generation.samples import write_manifest, write_part


@pytest.fixture
def runs(tmp_path):
    """Two trained runs and a verdict over both, in `<tmp>/runs/both/evaluation`."""
    root = tmp_path / "runs"
    home = root / "both" / "evaluation"
    home.mkdir(parents=True)
    policies = []
    for name, wins, rate in (("sft", 60, 1e-6), ("tbpo", 80, 2e-5)):
        run = root / name
        (run / "export").mkdir(parents=True)
        (run / "export" / "config.json").write_text("{}")
        config = load_config(
            None, [f"run.name={name}", f"training.learning_rate={rate}", "model.name_or_path=m"]
        )
        (run / "config.yaml").write_text(to_yaml(config))
        rows = [{"step": s, "loss": 1 / s, "rewards/margin": None if s == 2 else s} for s in range(1, 5)]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 5, "lo')
        (run / "run.json").write_text(json.dumps({"mlflow_run_id": f"id-of-{name}"}))
        folder = home / "samples" / name
        folder.mkdir(parents=True)
        row = {
            "index": 0,
            "prompt_id": "000000",
            "sample": 0,
            "prompt_text": "copy: <b>a</b>",
            "prompt_token_ids": [1],
            "answer": "<script>a</script>" if name == "sft" else "a",
            "token_ids": [1],
            "logprobs": [-1.0],
            "finish_reason": "stop",
            "metadata": json.dumps({"answer": "a"}),
            "error": "",
        }
        write_part(folder, [row])
        write_manifest(folder, {"fingerprint": "x", "complete": True})
        score = share_estimate({str(i): [float(i < wins)] for i in range(100)})
        metrics = {
            "exact_match": score,
            "length_tokens": Estimate(5.0, 4.0, 6.0),
            "distinct_1": Estimate(0.1),
        }
        metrics |= {"predictive_entropy": Estimate(3.0), "kl_k1": Estimate(0.5, 0.4, 0.6)}
        if name == "tbpo":
            metrics["win_rate"] = Estimate(0.6, 0.55, 0.65)
        slices = {"task": {"copy": {"exact_match": score}}}
        policies.append(PolicyVerdict(name, str(run / "export"), 100, 0, metrics, slices, f"samples/{name}"))
    judge = {"kind": "checker", "function": "tbpo_ray.data.copyedit:check"}
    prompts = {"source": "p.jsonl", "digest": "d", "rows": 100, "skipped": 0}
    Verdict(policies, "sft", "sft", judge, prompts).save(home)
    return root


class Page(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.bold = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text += data
        self.bold += data if self.open[-1:] == ["b"] else ""


def config_for(root, *overrides):
    return load_config(None, [f"run.output_dir={root}", "run.name=report", "runs=[both]", *overrides])


@pytest.mark.heavy
def test_the_page_is_well_formed_self_contained_and_escaped(runs):
    path = compare_runs(config_for(runs))
    assert path == runs / "report" / "report" / "report.html"
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert not [t for t, a in page.tags if t in ("script", "link", "img", "iframe") or a.get("src")]
    assert not re.search(r"url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert len([t for t, _ in page.tags if t == "svg"]) == 5  # three scatters, loss and margin
    assert "80.0 %" in page.bold and "60.0 %" not in page.bold
    assert "<script>a</script>" in page.text and "copy: <b>a</b>" in page.text
    for piece in ("training.learning_rate", "id-of-tbpo", "win rates against sft", "mlflow ui", "copy"):
        assert piece in page.text


def test_markdown_has_the_same_table(runs):
    text = compare_runs(config_for(runs)).with_name("report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| tbpo |"))
    assert "**80.0 % [71.1, 86.7]**" in row and "60.0 % [55.0, 65.0]" in row
    assert "| training.learning_rate | 1e-06 | 2e-05 |" in text


def test_a_policy_is_promoted_only_if_it_passes_the_gate(runs, small_model):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    export = runs / "tbpo" / "export"
    shutil.copytree(small_model, export, dirs_exist_ok=True)
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    closed = config_for(runs, "compare.promote.model_name=best", "compare.promote.at_least=0.56")
    kept = compare_runs(closed).read_text()
    assert "compare.promote.at_least=0.56" in kept and "registered as best" not in kept
    with pytest.raises(MlflowException):
        client.get_model_version_by_alias("best", "champion")
    opened = config_for(runs, "compare.promote.model_name=best", "compare.promote.at_least=0.55")
    assert "registered as best version 1" in compare_runs(opened).read_text()
    version = client.get_model_version_by_alias("best", "champion")
    assert version.source is not None and version.run_id is not None
    weights = Path(version.source.removeprefix("file://")) / "model" / "model.safetensors"
    assert weights.samefile(export / "model.safetensors")
    tags = client.get_run(version.run_id).data.tags
    assert tags["compared.tbpo"] == "id-of-tbpo" and tags["promoted"] == "best version 1"


def test_a_missing_run_and_a_run_without_a_verdict_are_rejected(runs):
    with pytest.raises(InputError, match=r"runs:.*'gone'"):
        compare_runs(config_for(runs, "runs=[gone]"))
    with pytest.raises(InputError, match=r"runs: sft .*run\.name=sft"):
        compare_runs(config_for(runs, "runs=[sft]"))


def test_other_prompts_are_warned_about(runs):
    again = runs / "other" / "evaluation"
    again.mkdir(parents=True)
    tree = json.loads((runs / "both" / "evaluation" / "verdict.json").read_text())
    tree["prompts"]["digest"] = "e"
    (again / "verdict.json").write_text(json.dumps(tree))
    text = compare_runs(config_for(runs, "runs=[both, other]")).read_text()
    assert "answered different prompts" in text and "other/tbpo" in text


def test_charts_stay_inside_their_frame():
    points = [Point(f"p{i}", 10.0**i, -(10.0**i), i, (0, 10.0**i), None, 0.5) for i in range(4)]
    same = [Point("a", 1.0, 1.0, 0), Point("b", 1.0, 1.0, 1)]
    curve = [Line("c", [1, 2, 3], [0.0, float("nan"), 2.0], 0)]
    for svg in (scatter(points, "x", "y"), scatter(same, "x", "y"), lines(curve, "step", "y")):
        for x in map(float, re.findall(r'(?:cx|x1|x2|x)="([-\d.]+)"', svg)):
            assert 0 <= x <= 360
        for y in map(float, re.findall(r'(?:cy|y1|y2|y)="([-\d.]+)"', svg)):
            assert 0 <= y <= 250
    assert "nan" not in lines(curve, "step", "y")


def test_a_curve_of_one_point_is_visible():
    several = lines([Line("c", [1, 2], [0.0, 2.0], 0)], "step", "y")
    one = lines([Line("c", [1, 2], [0.0, 2.0], 0), Line("d", [1], [1.0], 1)], "step", "y")
    assert several.count("<circle") == 0 and one.count("<circle") == 1
    interrupted = lines([Line("c", [1, 2, 3, 4], [0.0, float("nan"), 2.0, 1.0], 0)], "step", "y")
    assert interrupted.count("<circle") == 1 and interrupted.count("M") == 2


def test_a_name_at_the_top_is_not_cut_off():
    svg = scatter([Point("top", 1.0, 1.0, 0), Point("below", 0.0, 0.0, 0)], "x", "y")
    (y,) = re.findall(r'y="([\d.]+)"[^>]*class="name">top<', svg)
    assert float(y) >= 12


LLM = {"kind": "llm", "model": "m", "rubric": "summary", "unparsable": 0, "calls": 9}


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        ({"value": 0.6, "low": 0.55, "high": 0.65, "pairs": 40}, "60.0 % [55.0, 65.0] of its verdicts on 40"),
        ({"value": 0.5, "low": 0.4, "high": 0.6, "pairs": 40}, "50 % is no bias"),
        (None, "not measured"),
    ],
)
def test_the_verdict_states_the_position_bias_of_its_judge(bias, words):
    prompts = {"source": "p", "digest": "d", "rows": 1, "skipped": 0}
    metrics = {
        "win_rate": Estimate(0.6, 0.5, 0.7),
        "length_tokens": Estimate(31.5),
        "rouge_l": Estimate(0.25),
    }
    policies = [PolicyVerdict("a", "a", 1, 0, {}), PolicyVerdict("b", "b", 1, 0, metrics)]
    verdict = Verdict(policies, "a", "a", LLM | {"first_preferred": bias, "timeouts": 3}, prompts)
    table = verdict.table()
    assert words in table and "judge: llm (summary)" in table and "no verdict: timeouts 3." in table
    assert ("a bias, which judging" in table) == (bias is not None and bias["low"] > 0.5)
    head, _, _, line = table.splitlines()[:4]
    columns = [head.index(name) for name in ("win rate", "tokens per answer", "ROUGE-L")]
    assert columns == sorted(columns) and "31.500" in line and "0.250" in line
    assert Verdict(policies, "a", "a", {"kind": "checker"}, prompts).judge_notes() == []


def test_the_report_compares_judges_by_what_they_are(runs):
    """Counts and costs of one judge differ from verdict to verdict; a win rate is shown with the length."""
    for name, calls, rubric in (("one", 3, "general"), ("two", 5, "general"), ("three", 5, "helpful")):
        (runs / name / "evaluation").mkdir(parents=True)
        verdict = Verdict.load(runs / "both" / "evaluation" / "verdict.json")
        length = {"length_tokens": Estimate(12.4)}
        policies = [
            PolicyVerdict(
                policy.name,
                f"{policy.model}-{name}",
                100,
                0,
                {"win_rate": Estimate(0.6, 0.5, 0.7), **length},
                {"task": {"copy": {"win_rate": Estimate(0.6, 0.5, 0.7), **length}}},
                policy.samples,
            )
            for policy in verdict.policies
        ]
        judge = LLM | {"calls": calls, "rubric": rubric, "first_preferred": None}
        Verdict(policies, "sft", "sft", judge, verdict.prompts).save(runs / name / "evaluation")
    pages = {}
    for compared in ("one, two", "one, three"):
        config = load_config(None, [f"run.output_dir={runs}", f"runs=[{compared}]", "run.name=report"])
        pages[compared] = compare_runs(config).read_text()
    warning = "different judges"
    assert warning not in pages["one, two"] and warning in pages["one, three"]
    assert "<small>12 tokens</small>" in pages["one, two"] and "Position bias" in pages["one, two"]
