"""A language model as judge, served by vLLM engines on this cluster instead of an endpoint.

The judge's prompts and replies are stored like samples, in a folder named after their content: interrupted
judging resumes, and earlier verdicts are reused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import Config, GenerationConfig
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.evaluation.llm_judge import LlmJudge
from tbpo_ray.generation.engine_count import EngineNodes
from tbpo_ray.generation.pool import generate, sampling_fingerprint
from tbpo_ray.generation.samples import PromptTokens
from tbpo_ray.generation.vllm_engine import check_model
from tbpo_ray.models.resolve import local_model
from tbpo_ray.storage.paths import cache_dir

_NO_LIMIT = 1 << 30
"""A judge's prompt is never truncated: one that is too long is rejected by the engine, and counted."""


class PoolJudge(LlmJudge):
    """`evaluation.judge: {kind: llm, pool: FOLDER}`, on engines that `generation` configures."""

    config: Config
    model: str
    folder: Path

    @classmethod
    def on_cluster(cls, settings: Mapping[str, Any], config: Config, output: Path) -> PoolJudge:
        """Validate `evaluation.judge` without `kind` and build the judge.

        Args:
            output: folder in which replies are stored.

        Raises:
            InputError: invalid settings, or a model that vLLM cannot load.
        """
        judge = cls.from_settings(settings, output / "judge_cache.jsonl")
        assert isinstance(judge, PoolJudge)
        judge.config, judge.folder = config, output / "judge"
        key = "evaluation.judge.pool"
        judge.model = local_model(str(judge.settings.pool), cache_dir(config), seed=config.run.seed, key=key)
        check_model(judge.model, None)
        judge.counts["failed"] = 0
        return judge

    def complete(self, prompts: Sequence[str]) -> list[str]:
        """Generate the replies to the filled-in prompts; the reply to a rejected prompt is empty.

        Raises:
            RunFailedError: the engines could not answer a single prompt.
        """
        encoded = self._tokenize(prompts)
        requests, generation, seed = list(encoded.values()), self._generation(), self.config.run.seed
        fingerprint = sampling_fingerprint(self.model, requests, generation, seed=seed)
        samples = generate(
            self.model,
            requests,
            generation,
            output=self.folder / fingerprint[:16],
            nodes=EngineNodes.of(self.config),
            seed=seed,
        )
        replies: dict[str, str] = {}
        for sample in samples:
            self.counts["calls"] += 1
            self.counts["failed"] += bool(sample.error)
            self.counts["prompt_tokens"] += len(sample.prompt_token_ids)
            self.counts["completion_tokens"] += len(sample.token_ids)
            replies[sample.prompt_id] = "" if sample.error else sample.answer
        return [replies[encoded[prompt].id] if prompt in encoded else "" for prompt in prompts]

    def _tokenize(self, prompts: Sequence[str]) -> dict[str, PromptTokens]:
        """Each distinct prompt in the judge's tokens, without those that its chat template rejects."""
        from tbpo_ray.data.tokenize import PairTokenizer, TokenizerSpec

        tokenizer = PairTokenizer(TokenizerSpec.load(self.model), _NO_LIMIT, _NO_LIMIT - 1)
        unique = list(dict.fromkeys(prompts))
        encoded = tokenizer.prompts([[{"role": "user", "content": prompt}] for prompt in unique])
        return {
            prompt: PromptTokens(hashlib.sha256(prompt.encode()).hexdigest()[:32], ids, prompt)
            for prompt, ids in zip(unique, encoded, strict=True)
            if not isinstance(ids, RecordError)
        }

    def _generation(self) -> GenerationConfig:
        """The engines of `generation`, with the judge's own sampling parameters."""
        tree = self.config.generation.model_dump(
            include={"engines", "tensor_parallel", "batch_size", "engine", "stall_timeout_s"}
        )
        tree |= {"max_tokens": self.settings.max_tokens, "temperature": self.settings.temperature}
        return GenerationConfig.model_validate(tree)
