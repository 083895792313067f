"""The documents: size, links, cited files and keys, examples, tables that repeat the code, and the site."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tbpo_ray.config.loading import known_keys
from tbpo_ray.config.schema import RENAMED_KEYS, Config
from tbpo_ray.data.messages import answer_text
from tbpo_ray.data.records import ReadOptions, parse_prompt, parse_records
from tbpo_ray.evaluation.suites import summarization_row
from tests.test_layers import LAYERS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [
    *PAGES,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/RESULTS.md")),
]
FOLDERS = ("tbpo_ray", "jobs", "benchmarks", "tests", "docs", "tune_spaces")
README_BYTES = 10_240
# Keys of runs, not of the configuration: metrics and MLflow tags that look like dotted keys.
NO_KEYS = ("run.json", "evaluation.py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_spans(text: str) -> list[str]:
    """Inline code outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


@pytest.mark.parametrize("file", TEXTS, ids=name_of)
def test_relative_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", file.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (file.parent / target).exists(), target


@pytest.mark.parametrize("file", TEXTS, ids=name_of)
def test_cited_files_exist(file):
    for span in code_spans(file.read_text(encoding="utf-8")):
        for path in re.findall(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w./-]+\w", span):
            assert "NAME" in path or (ROOT / path).exists(), path


@pytest.mark.parametrize("file", TEXTS, ids=name_of)
def test_cited_keys_exist(file):
    known = {*known_keys(), *RENAMED_KEYS}
    sections = "|".join(Config.model_fields)
    for span in code_spans(file.read_text(encoding="utf-8")):
        for key in re.findall(rf"(?<![\w./-])(?:{sections})\.[a-z_]+(?:\.[a-z_]+)*(?![\w/:])", span):
            # Behind the name of a helper model follow the keys of its own run.
            key = re.sub(r"^objective\.helpers\.[a-z]+\.", "", key)
            if key not in NO_KEYS and not key.endswith((".md", ".py", ".json", ".jsonl", ".yaml", ".html")):
                # Below a key that holds a free mapping, such as `evaluation.judge`, any name may follow.
                assert key in known or any(key.startswith(f"{k}.") for k in free_mappings()), key


def free_mappings() -> list[str]:
    return ["evaluation.judge", "evaluation.benchmarks", "generation.engine", "training.deepspeed",
            "cluster.labels.prepare", "cluster.labels.train", "cluster.labels.generate"]  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_example_of_a_record_is_one():
    lines = [line for block in blocks("data-formats.md", "json") for line in block.splitlines()]
    assert len(lines) >= 7
    pairs = 0
    for line in lines:
        row = json.loads(line)
        if "topic" in row:
            assert parse_prompt(row).metadata == {"topic": "weather"}
        else:
            (record,) = parse_records(row, options=ReadOptions(keep_ties=True))
            assert record.tie == bool(row.get("tie"))
            assert record.prompt == parse_prompt(row).prompt and record.chosen != record.rejected
            pairs += 1
    assert pairs == len(lines) - 1


def test_the_examples_of_summarization_sets_give_a_request_and_its_reference():
    lines = [line for block in blocks("evaluation.md", "json") for line in block.splitlines()]
    prompts = [parse_prompt(summarization_row(json.loads(line))) for line in lines]
    assert len(prompts) == 4
    assert all(prompt.metadata["reference"] == "A day at sea." for prompt in prompts)
    assert all(prompt.prompt[0]["content"].endswith("A long day at sea.\n\nTL;DR:") for prompt in prompts)


def test_the_example_of_a_csv_file_is_read(tmp_path):
    from tbpo_ray.data.records import iter_records

    (block,) = blocks("data-formats.md", "csv")
    (tmp_path / "pairs.csv").write_text(block)
    (record,) = iter_records(str(tmp_path / "pairs.csv"))
    assert (answer_text(record.chosen), answer_text(record.rejected)) == ("11", "12")


def test_the_example_of_a_search_space_is_one(tmp_path):
    from tbpo_ray.tuning.space import Space

    (block,) = blocks("search.md", "yaml")
    file = tmp_path / "space.yaml"
    file.write_text(block)
    assert len(Space.load(str(file)).parameters) == 6


@pytest.mark.parametrize("page", ["data-formats.md", "training.md"])
def test_the_examples_of_a_configuration_are_accepted(page):
    from tbpo_ray.config.loading import validate

    for block in blocks(page, "yaml"):
        validate(yaml.safe_load(block))


def test_the_objectives_page_lists_every_objective_with_its_source_and_inputs():
    from tbpo_ray.config.objective import TRAITS
    from tbpo_ray.objectives.objective import FAMILIES

    text = (DOCS / "methods.md").read_text(encoding="utf-8").split("\nOnly ")[0]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|([^|]*)\|$", text, re.MULTILINE)
    assert {name: source.strip() for name, _, source in rows} == {n: f.source for n, f in FAMILIES.items()}
    for name, reads, _ in rows:
        inputs = TRAITS[name].inputs
        # `arc_bpo` reads token weights on request.
        assert name == "arc_bpo" or ("token weights" in reads) == ("weights" in inputs), name
        assert ("reference" in reads) == ("reference" in inputs), name
        # The state baseline of `tbpo_a` may add the KL, and so may the alpha of `tis_dpo`.
        assert name in ("tbpo_a", "tis_dpo") or ("distribution" in reads) == ("kl" in inputs), name


def test_the_architecture_page_has_the_layers():
    (block,) = blocks("architecture.md", "text")
    assert [set(line.split()) for line in block.splitlines()] == [set(layer) for layer in reversed(LAYERS)]


def test_the_front_page_repeats_only_figures_of_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- methods -->\n(.*?)<!-- end -->", results, re.DOTALL)
    for rate in re.findall(r"\d+\.\d %", readme):
        assert rate in table, rate
    for kl in re.findall(r"\| (\d\.\d{3}) \|", readme):
        assert f"| {kl} [" in table, kl
    for ratio, rounded in (("14.18", "14.2"), ("9.85", "9.9")):
        assert f"{ratio} [" in results and f"{rounded} times" in readme


def messages() -> list[str]:
    """All strings of the library; "…" stands for what is formatted into them."""
    texts = []
    for file in sorted((ROOT / "tbpo_ray").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_headings_of_the_troubleshooting_page_are_messages_of_the_code():
    known = messages()
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    assert len(headings) >= 15
    for heading in headings:
        pattern = re.compile(".*".join(map(re.escape, heading.split("…"))))
        assert any(pattern.search(message) for message in known), heading


def test_the_site_builds_without_warnings_and_needs_no_network(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    pages = sorted((tmp_path / "site").glob("*.html"))
    assert {page.stem for page in pages} >= {page.stem for page in PAGES}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?([^\s\">]+)", text)
        links = re.findall(r"<link[^>]+>", text)
        loaded += [link for link in links if re.search(r"rel=\"?(stylesheet|icon|preload|preconnect)", link)]
        assert [address for address in loaded if "//" in address] == [], page.name
    configuration = (tmp_path / "site" / "configuration.html").read_text(encoding="utf-8")
    for key in ("training.pairs_per_step", "objective.bregman.lam"):
        assert f"<code>{key}</code>" in configuration
    benchmarks = (tmp_path / "site" / "benchmarks.html").read_text(encoding="utf-8")
    assert "TRL DPO" in benchmarks and "<!-- include" not in benchmarks
