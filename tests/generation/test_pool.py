"""The pool with real vLLM engines under a real Ray."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tbpo_ray.config.schema import GenerationConfig
from tbpo_ray.errors import RunFailedError
from tbpo_ray.generation import pool
from tbpo_ray.generation.pool import generate
from tbpo_ray.generation.samples import MANIFEST, PromptTokens, read_parts
from tbpo_ray.generation.stalls import EngineReport

pytestmark = pytest.mark.e2e


def test_samples_have_the_models_log_probs_are_resumable_and_leave_no_engine(
    ray_session, engines_left, tiny_model, prompts, tmp_path
):
    import torch
    from transformers import AutoModelForCausalLM

    generation = GenerationConfig(max_tokens=8, samples=2, batch_size=5, temperature=0.7)
    too_long = PromptTokens("long", [5] * 3000, "too long")
    samples = generate(tiny_model, [*prompts, too_long], generation, output=tmp_path / "out", seed=3)
    assert engines_left() == []
    rows = list(samples)
    assert [(r.prompt_id, r.sample) for r in rows[:3]] == [("p0", 0), ("p0", 1), ("p1", 0)]
    assert len(rows) == 26 and samples.manifest["failed"] == 2
    assert all("maximum context length" in r.error and r.finish_reason == "error" for r in rows[-2:])
    assert all(len(r.token_ids) == len(r.logprobs) and 0 < len(r.token_ids) <= 8 for r in rows[:-2])
    assert rows[0].token_ids != rows[1].token_ids
    assert rows[2].metadata == {"number": 1}

    # The log-probs are the model's own, before temperature.
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for r in rows[:4]:
        ids = torch.tensor([[*r.prompt_token_ids, *r.token_ids]])
        with torch.no_grad():
            logps = model(ids).logits.log_softmax(-1)[0, len(r.prompt_token_ids) - 1 : -1]
        want = logps.gather(1, torch.tensor(r.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(r.logprobs), want, atol=1e-4, rtol=0)

    # After a crash that lost a part and the end of the manifest only that part is sampled again.
    part = sorted((tmp_path / "out").glob("part-*"))[1]
    untouched = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("part-*") if p != part}
    part.unlink()
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest | {"complete": False}))
    again = generate(tiny_model, [*prompts, too_long], generation, output=tmp_path / "out", seed=3)
    assert [r.token_ids for r in again] == [r.token_ids for r in rows]
    assert {p: p.stat().st_mtime_ns for p in untouched} == untouched

    # When the samples are complete no engine starts.
    before = read_parts(tmp_path / "out")
    assert (
        generate(tiny_model, [*prompts, too_long], generation, output=tmp_path / "out", seed=3).table()
        == before
    )
    assert engines_left() == []


def test_a_fraction_of_a_cpu_is_enough_and_an_adapter_is_served_unmerged(
    ray_session, engines_left, tiny_model, prompts, tmp_path
):
    import ray
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")

    cpus = ray.available_resources()["CPU"] - 0.6

    class Busy:
        def ready(self) -> None: ...

    busy: Any = ray.remote(num_cpus=cpus)(Busy).remote()  # Ray types its methods as plain methods
    ray.get(busy.ready.remote())
    try:
        samples = generate(
            tiny_model,
            prompts[:3],
            GenerationConfig(max_tokens=6),
            output=tmp_path / "out",
            adapter=tmp_path / "adapter",
        )
    finally:
        ray.kill(busy)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    for r in samples:
        ids = torch.tensor([[*r.prompt_token_ids, *r.token_ids]])
        with torch.no_grad():
            logps = model(ids).logits.log_softmax(-1)[0, len(r.prompt_token_ids) - 1 : -1]
        want = logps.gather(1, torch.tensor(r.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(r.logprobs), want, atol=1e-3, rtol=0)
    assert engines_left() == []


def test_an_engine_that_cannot_start_fails_clearly_and_leaves_nothing(
    ray_session, engines_left, tiny_model, prompts, tmp_path
):
    generation = GenerationConfig(engine={"block_size": 7777})
    with pytest.raises(RunFailedError, match="sampling from") as caught:
        generate(tiny_model, prompts, generation, output=tmp_path / "out")
    assert "an engine died" not in str(caught.value)  # it never started, so its own error is reported
    assert engines_left() == []


def test_tensor_parallelism_needs_no_placement_group(
    ray_session, engines_left, tiny_model, prompts, tmp_path
):
    """Each of two processes per engine holds half of each matrix; there is no placement group to leak."""
    generation = GenerationConfig(max_tokens=4, tensor_parallel=2, batch_size=3)
    samples = generate(tiny_model, prompts, generation, output=tmp_path / "out")
    assert samples.manifest["failed"] == 0 and len(list(samples)) == 12
    assert engines_left() == []


@pytest.mark.timeout(300)
def test_more_prompt_tokens_than_fit_into_one_engine_step(ray_session, tiny_model, tmp_path):
    """A seeded prompt must not be prefilled in two chunks."""
    many = [PromptTokens(f"p{i}", [1, *[5 + i] * (100 + i), 4], "") for i in range(64)]
    samples = generate(tiny_model, many, GenerationConfig(max_tokens=2), output=tmp_path / "out")
    assert samples.manifest["failed"] == 0 and len(samples.answered()) == 64


class Stopper(threading.Thread):
    """Stops the process below the actor that computes, of as many engines as given, once they have begun."""

    def __init__(self, samples: Path, engines: int):
        super().__init__(daemon=True)
        self.samples, self.engines, self.stopped = samples, engines, set[int]()
        self.start()

    def run(self) -> None:
        while len(self.stopped) < self.engines:
            for file in self.samples.glob(".engines-*/*.json"):
                report = EngineReport.read(file)
                if report is None or not (report.unfinished and report.steps):
                    continue
                actor, *below = [process.pid for process in report.processes]
                if actor not in self.stopped:
                    self.stopped.add(actor)
                    for pid in below or [actor]:
                        os.kill(pid, signal.SIGSTOP)
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_prompts_of_an_engine_that_hangs_are_sampled_by_another(
    ray_session, engines_left, tiny_model, prompts, tmp_path
):
    generation = GenerationConfig(max_tokens=200, samples=10, stall_timeout_s=6)
    stopper = Stopper(tmp_path / "out", 1)
    samples = generate(tiny_model, prompts, generation, output=tmp_path / "out")
    assert len(stopper.stopped) == 1 and samples.manifest["stalls"] == 1
    assert len(samples.answered()) == 120 and engines_left(0) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_prompts_whose_engines_hang_twice_end_the_run(
    ray_session, engines_left, tiny_model, prompts, tmp_path
):
    generation = GenerationConfig(max_tokens=200, samples=10, stall_timeout_s=6)
    stopper = Stopper(tmp_path / "out", 2)
    with pytest.raises(RunFailedError, match=r"computed no token for 6 s with \d+ unfinished") as caught:
        generate(tiny_model, prompts, generation, output=tmp_path / "out")
    assert len(stopper.stopped) == 2 and "another one stalled before" in str(caught.value)
    assert engines_left() == [] and not list((tmp_path / "out").glob(".engines-*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_engine_that_keeps_dying_is_given_up(ray_session, engines_left, tiny_model, tmp_path, monkeypatch):
    """A seeded prompt that is prefilled in two chunks always crashes vLLM's engine on the CPU."""
    monkeypatch.setattr(pool, "ENGINE_RESTARTS", 1)
    engine = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_num_seqs": 16}
    long = [PromptTokens("long", [1, *[5] * 150, 4], "")]
    with pytest.raises(RunFailedError, match="an engine died 2 times") as caught:
        generate(tiny_model, long, GenerationConfig(max_tokens=2, engine=engine), output=tmp_path / "out")
    assert "its last error: " in str(caught.value) and str(tmp_path / "out" / "engine.log") in str(
        caught.value
    )
    assert (tmp_path / "out" / "engine.log").stat().st_size > 0
    assert engines_left() == []
