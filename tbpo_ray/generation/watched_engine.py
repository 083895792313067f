"""The engine of `ray.data.llm`, which also reports its progress. Importing this imports Ray's stage."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

from tbpo_ray.generation.stalls import ProgressReporter


class WatchedEngine(vLLMEngineStageUDF):
    """A vLLM engine that reports every step.

    Args:
        reports: folder of the reports.
        stall_timeout_s: `generation.stall_timeout_s`.
    """

    def __init__(self, *args: Any, reports: str, stall_timeout_s: float, **kwargs: Any):
        self._progress = ProgressReporter(reports, stall_timeout_s)
        super().__init__(*args, **kwargs)
        engine: Any = self.llm.engine
        generate = engine.generate

        async def counted(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            async for output in generate(*args, **kwargs):
                self._progress.step()
                yield output

        engine.generate = counted
        self._progress.engine_started()

    # The base class declares a coroutine and is overridden by generators.
    async def udf(  # type: ignore[override, misc]
        self, batch: list[dict[str, Any]]
    ) -> AsyncIterator[dict[str, Any]]:
        index = {row[self.IDX_IN_BATCH_COLUMN]: int(row["index"]) for row in batch}
        self._progress.begin(index.values())
        async for output in super().udf(batch):
            self._progress.finish([index[output[self.IDX_IN_BATCH_COLUMN]]])
            yield output
