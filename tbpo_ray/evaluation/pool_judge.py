"""The language model as judge, asked by vLLM engines on this cluster instead of an endpoint.

Questions and replies lie beside the samples, by content: judging that was interrupted goes on, and what was
judged before is read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import Config, GenerationConfig
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.evaluation.llm_judge import LlmJudge
from tbpo_ray.generation.pool import generate, sampling_fingerprint
from tbpo_ray.generation.samples import PromptTokens
from tbpo_ray.generation.vllm_engine import check_model
from tbpo_ray.models.resolve import local_model
from tbpo_ray.storage.paths import cache_dir

_UNTRIMMED = 1 << 30
"""A question is never cut: what is too long for the judge is refused by its engine, and counted."""


class PoolJudge(LlmJudge):
    """`evaluation.judge: {kind: llm, pool: FOLDER}`: engines as `generation` configures them."""

    config: Config
    model: str
    folder: Path

    @classmethod
    def on_cluster(cls, settings: Mapping[str, Any], config: Config, output: Path) -> PoolJudge:
        """Raises InputError for settings that cannot be, and a model that vLLM does not load."""
        judge = cls.from_settings(settings, output / "judge_cache.jsonl")
        assert isinstance(judge, PoolJudge)
        judge.config, judge.folder = config, output / "judge"
        key = "evaluation.judge.pool"
        judge.model = local_model(str(judge.settings.pool), cache_dir(config), seed=config.run.seed, key=key)
        check_model(judge.model, None)
        judge.counts["failed"] = 0
        return judge

    def ask(self, questions: Sequence[str]) -> list[str]:
        """Raises RunFailed when the engines could not answer a single question."""
        from tbpo_ray.data.tokenize import PairTokenizer, TokenizerSpec

        tokenizer = PairTokenizer(TokenizerSpec.load(self.model), _UNTRIMMED, _UNTRIMMED - 1)
        unique = list(dict.fromkeys(questions))
        encoded = tokenizer.prompts([[{"role": "user", "content": question}] for question in unique])
        prompts = {
            question: PromptTokens(hashlib.sha256(question.encode()).hexdigest()[:32], ids, question)
            for question, ids in zip(unique, encoded, strict=True)
            if not isinstance(ids, RecordError)
        }
        asked = list(prompts.values())
        generation, seed = self._generation(), self.config.run.seed
        mark = sampling_fingerprint(self.model, asked, generation, seed=seed)
        cluster = self.config.cluster
        samples = generate(
            self.model,
            asked,
            generation,
            output=self.folder / mark[:16],
            use_gpu=cluster.gpus,
            seed=seed,
            labels=cluster.labels.generate,
        )
        replies: dict[str, str] = {}
        for sample in samples:
            self.counts["calls"] += 1
            self.counts["failed"] += bool(sample.error)
            self.counts["prompt_tokens"] += len(sample.prompt_token_ids)
            self.counts["completion_tokens"] += len(sample.token_ids)
            replies[sample.prompt_id] = "" if sample.error else sample.answer
        return [replies[prompts[q].id] if q in prompts else "" for q in questions]

    def _generation(self) -> GenerationConfig:
        """The engines as they are for policies, with the judge's own sampling."""
        tree = self.config.generation.model_dump(
            include={"engines", "tensor_parallel", "batch_size", "engine"}
        )
        tree |= {"max_tokens": self.settings.max_tokens, "temperature": self.settings.temperature}
        return GenerationConfig.model_validate(tree)
