"""The check for a GPU machine runs on a CPU, and imports nothing that such a machine may lack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu_check import SECTIONS, Report, peak_flops

ROOT = Path(__file__).resolve().parent.parent.parent
ABSENT = (
    "ray", "deepspeed", "vllm", "mlflow", "pyarrow", "omegaconf", "pandas", "peft", "datasets", "matplotlib",
    "trl",
)  # fmt: skip
RUN = """
import runpy, sys
sys.modules.update(dict.fromkeys({absent!r}))  # None makes `import` and `find_spec` miss them
sys.path[:] = [p for p in sys.path if p not in ("", {root!r})]
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def check(out: Path, *arguments: str, absent: tuple[str, ...] = ABSENT) -> subprocess.CompletedProcess[str]:
    """Run the script in a process in which some packages cannot be imported."""
    argv = [
        str(ROOT / "benchmarks" / "gpu_check.py"),
        "--device",
        "cpu",
        "--quick",
        "--out",
        str(out),
        *arguments,
    ]
    code = RUN.format(absent=absent, root=str(ROOT), argv=argv)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=out.parent)


@pytest.mark.e2e  # half a minute, and the step of DeepSpeed below is the real one
def test_every_section_runs_on_a_bare_machine(tmp_path: Path) -> None:
    done = check(tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert list(saved["sections"]) == [section.name for section in SECTIONS]
    rows = saved["sections"]
    assert {row["ok"] for row in rows["values"]} == {True}
    assert {row["reads_per_step"] for row in rows["syncs"]} == {1.0}
    measured = [row for row in rows["training"] if "pairs_per_second" in row]
    assert len(measured) >= 3 and all(row["pairs_per_second"] > 0 for row in measured)
    assert all(row["planned_gib"] > 0 for row in rows["memory"])
    by_case = {row["case"]: row for row in rows["attention"]}
    assert by_case["64 tokens: gathered rows"]["value_error"] < 1e-4
    assert by_case["64 tokens: gathered rows"]["gradient_error"] < 1e-4
    assert by_case["64 tokens: FlexAttention"]["value_error"] < 1e-4
    assert all(row["tokens_per_second"] > 0 for row in rows["output"] if "blockwise" in row["case"])
    (zero,) = rows["zero"]
    assert zero["result"].startswith("not run: ModuleNotFoundError") and "deepspeed" in zero["result"]
    table = (tmp_path / "out" / "gpu_check.md").read_text()
    assert all(f"## {section.title}" in table for section in SECTIONS)


@pytest.mark.e2e
def test_the_zero_section_runs_where_deepspeed_is(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    done = check(tmp_path / "out", "--only", "zero", absent=("ray", "vllm", "mlflow"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["sections"]["zero"]
    assert rows[0]["case"] == "ZeRO 1" and rows[0]["ok"] and len(rows[0]["losses"]) == 3


@pytest.mark.heavy
def test_a_missing_package_is_named_with_what_to_do(tmp_path: Path) -> None:
    done = check(tmp_path / "out", absent=("pydantic",))
    assert done.returncode != 0
    assert "pydantic" in done.stderr and "--packages" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
def test_without_a_gpu_the_default_device_is_refused(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = str(ROOT / "benchmarks" / "gpu_check.py")
    done = subprocess.run(
        [sys.executable, script, "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "--device cpu --quick" in done.stderr


def test_rows_are_saved_one_by_one(tmp_path: Path) -> None:
    report = Report(tmp_path, {"device": "none"})
    report.add(SECTIONS[0], {"case": "a|b", "value_error": 0.123456, "ok": True})
    saved = json.loads((tmp_path / "gpu_check.json").read_text())
    assert saved["sections"] == {"values": [{"case": "a|b", "value_error": 0.123456, "ok": True}]}
    assert "| a/b | 0.1235 | yes |" in (tmp_path / "gpu_check.md").read_text()
    assert report.is_good
    report.add(SECTIONS[1], {"case": "c", "ok": False})
    assert not report.is_good


def test_the_whole_check_fits_into_eight_minutes() -> None:
    assert sum(section.seconds for section in SECTIONS) <= 480


@pytest.mark.parametrize(
    ("card", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA L4", 121)],
)
def test_the_rate_of_a_card_is_found_by_its_name(card: str, tflops: float) -> None:
    assert peak_flops(card) == tflops * 1e12


def test_an_unknown_card_has_no_mfu() -> None:
    assert peak_flops("NVIDIA Unheard-of") is None


def test_the_operations_that_pairs_need_are_those_of_a_count_by_hand() -> None:
    import torch

    from benchmarks.gpu_parts import Machine, Shape
    from benchmarks.gpu_speed import Bench

    shape = Shape(vocabulary=10, width=4, layers=3, heads=2, key_value_heads=1, intermediate=5)
    # Per layer: q and o 4 x 4, k and v 4 x 2, three matrices 4 x 5.
    assert shape.body_parameters == 3 * (2 * 16 + 2 * 8 + 3 * 20)
    found = Bench(Machine(torch.device("cpu"), quick=True), shape, None, None).useful_flops(
        np.array([[2, 3, 4]])
    )
    seen = 2**2 / 2 + (2 * 3 + 3**2 / 2) + (2 * 4 + 4**2 / 2)
    assert found == pytest.approx([6 * 324 * 9 + 6 * 4 * 10 * 7 + 12 * 3 * 4 * seen])
