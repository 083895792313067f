"""Cost of the data path: preparing a generated UltraFeedback-like file, and streaming it to workers.

Per core, preparing cannot be many times faster than one process that calls a fast tokenizer record by
record: two thirds of the CPU time of both is byte-pair encoding in the same compiled code. Batching saves
the Python wrapper around it, and preparing spends that on what the loop does not do: validation, decoding
every answer to verify the round trip, hashing, and Parquet. Its gains are parallelism and constant memory.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import Config, DataConfig
from tbpo_ray.data.preparation import PairsSpec, prepare
from tbpo_ray.data.schedule import Schedule
from tbpo_ray.data.shards import MANIFEST, PreparedPairs

SIZES, QUICK_SIZES = (50_000, 200_000), (300, 1_200)
BASELINE_RECORDS, QUICK_BASELINE = 2_000, 100
STEP_SECONDS = 0.05
"""Duration of the training step that the stream has to keep up with: that of the tiny model."""
# fmt: off
_SYLLABLES = (
    "ba", "be", "bi", "co", "cu", "da", "de", "do", "en", "er", "fa", "fi", "ga", "ge", "ha", "in",
    "ka", "la", "le", "li", "ma", "me", "mi", "na", "ne", "no", "on", "pa", "pe", "ra", "re", "ri",
    "ro", "sa", "se", "si", "ta", "te", "ti", "to", "un", "va", "ve",
)
# fmt: on
_CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def run(config: Config | None = None, *, quick: bool = False) -> dict[str, Any]:
    """Prepare two sizes of a generated file, compare with a record-by-record process, and stream.

    Args:
        quick: use small sizes, to check that the benchmark runs.

    Returns:
        `prepare`: pairs, seconds, cpu_seconds, bytes and peak worker memory of each size; `baseline`: CPU
        seconds per record of the record-by-record process and of encoding alone; `speed_up_per_core`;
        `stream`: micro-batches per second over two ranks, and the share of 50 ms steps spent waiting.
    """
    from tbpo_ray.cluster.session import start_ray

    start_ray()
    with tempfile.TemporaryDirectory(prefix="tbpo-data-") as name:
        folder = Path(name)
        tokenizer = str(folder / "tokenizer")
        save_tokenizer(tokenizer)
        sizes = []
        for pairs in QUICK_SIZES if quick else SIZES:
            file = folder / f"pairs-{pairs}.jsonl"
            write_file(file, pairs)
            sizes.append(timed_prepare(file, tokenizer, folder / "cache"))
        prepared: PreparedPairs = sizes[-1].pop("prepared")
        sizes[0].pop("prepared")
        records = QUICK_BASELINE if quick else BASELINE_RECORDS
        baseline = _baseline(file, tokenizer, records)
        ours = sizes[-1]["cpu_seconds"] / sizes[-1]["pairs"]
        return {
            "load": os.getloadavg()[0],
            "prepare": sizes,
            "memory_growth": sizes[-1]["peak_worker_bytes"] / sizes[0]["peak_worker_bytes"],
            "baseline": baseline,
            "cpu_seconds_per_record": ours,
            "speed_up_per_core": baseline["record_by_record"] / ours,
            "speed_up_per_core_whole_conversations": baseline["whole_conversations"] / ours,
            "encoding_share": baseline["encoding_only"] / ours,
            "stream": stream(prepared, quick),
        }


def markdown(result: dict[str, Any]) -> str:
    """The result as a table and two paragraphs."""
    lines = [
        "| pairs | file | seconds | records/s | CPU s | peak memory of a worker |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["prepare"]:
        lines.append(
            f"| {row['pairs']:,} | {row['bytes'] / 1e6:,.0f} MB | {row['seconds']:.1f} | "
            f"{row['pairs'] / row['seconds']:,.0f} | {row['cpu_seconds']:.1f} | "
            f"{row['peak_worker_bytes'] / 1e6:,.0f} MB |"
        )
    baseline, streamed = result["baseline"], result["stream"]
    lines += [
        "",
        f"CPU time per record: {1e3 * result['cpu_seconds_per_record']:.2f} ms. "
        f"In one process, record by record: {1e3 * baseline['record_by_record']:.2f} ms "
        f"({result['speed_up_per_core']:.1f} times), "
        f"whole conversations: {1e3 * baseline['whole_conversations']:.2f} ms "
        f"({result['speed_up_per_core_whole_conversations']:.1f} times). "
        f"The encoder alone: {1e3 * baseline['encoding_only']:.2f} ms, which no batching can save.",
        "",
        f"Stream: {streamed['micro_batches_per_second']:,.0f} micro-batches/s to two ranks through Ray Data, "
        f"{streamed['local_per_second']:,.0f} in one process. Of {1e3 * STEP_SECONDS:.0f} ms steps "
        f"{streamed['wait_share']:.2%} are spent waiting.",
    ]
    return "\n".join(lines)


def stream(prepared: PreparedPairs, quick: bool = False) -> dict[str, float]:
    """Measure micro-batches per second, and the share of time that a trainer with short steps waits."""
    import ray

    from tbpo_ray.data.stream import StreamConfig, local_micro_batches

    def consume(iterator: Any, seconds: float, steps: int) -> tuple[float, float, int]:
        from tbpo_ray.data.stream import MicroBatchIterator

        ready = MicroBatchIterator(iterator)
        next(ready)
        began, waited, count = time.perf_counter(), 0.0, 0
        while count < steps:
            requested = time.perf_counter()
            if next(ready, None) is None:
                break
            waited += time.perf_counter() - requested
            count += 1
            if seconds:
                time.sleep(seconds)
        ready.close()
        return time.perf_counter() - began, waited, count

    def schedule(steps: int) -> Schedule:
        return Schedule(prepared.lengths(), seed=0, pairs_per_step=16, micro_batch_pairs=8, max_steps=steps)

    steps = 200 if quick else 4_000
    began = time.perf_counter()
    local = sum(1 for _ in local_micro_batches(prepared, schedule(steps // 4), 0, 2))
    local_rate = local / (time.perf_counter() - began)
    task = ray.remote(num_cpus=0.5)(consume)
    out: dict[str, float] = {"local_per_second": local_rate}
    for seconds, count in ((0.0, steps), (STEP_SECONDS, 40 if quick else 400)):
        shards = StreamConfig(prepared, schedule(steps)).configure({"train": None}, 2, None, None)
        ranks = ray.get([task.remote(shard["train"], seconds, count) for shard in shards])
        if seconds:
            out["wait_share"] = max(waited / whole for whole, waited, _ in ranks)
        else:
            out["micro_batches_per_second"] = sum(n for *_, n in ranks) / max(whole for whole, *_ in ranks)
    return out


def write_file(
    file: Path, pairs: int, seed: int = 0, *, sentences_per_answer: tuple[int, int] = (4, 30)
) -> None:
    """Write a generated file shaped like UltraFeedback: messages, prompt and scores, about 3 kB per pair."""
    rng = random.Random(seed)
    sentences = list(_sentences(rng, 4_000))

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(sentences, k=rng.randint(low, high)))

    with open(file, "w", encoding="utf-8") as out:
        for row in range(pairs):
            prompt = [{"role": "user", "content": text(2, 12)}]
            raw: dict[str, Any] = {"prompt": prompt[0]["content"], "prompt_id": f"{row:08x}"}
            for side, score in (("chosen", 8.5), ("rejected", 6.0)):
                raw[side] = [
                    *prompt,
                    {"role": "assistant", "content": f"{text(*sentences_per_answer)} {row}"},
                ]
                raw[f"score_{side}"] = score
            out.write(json.dumps(raw) + "\n")


def save_tokenizer(folder: str, vocabulary: int = 16_000) -> None:
    """Train and save a byte-level BPE tokenizer for such texts, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_sentences(random.Random(1), 4_000), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=_CHAT
    )
    tokenizer.save_pretrained(folder)


def _sentences(rng: random.Random, count: int) -> Iterator[str]:
    vocabulary = random.Random(7)
    words = ["".join(vocabulary.choices(_SYLLABLES, k=vocabulary.randint(1, 4))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    for _ in range(count):
        yield " ".join(rng.choices(words, weights, k=rng.randint(5, 18))).capitalize() + "."


def timed_prepare(file: Path, tokenizer: str, cache: Path) -> dict[str, Any]:
    """Prepare `file` on this cluster.

    Returns:
        pairs, bytes of the file, tokens, wall-clock seconds, cpu_seconds and peak_worker_bytes of the
        workers, and `prepared` itself.
    """
    began = time.perf_counter()
    prepared = prepare(PairsSpec(str(file), DataConfig(), tokenizer), cache, distributed=True)
    seconds = time.perf_counter() - began
    build = json.loads((Path(prepared.path) / MANIFEST).read_text(encoding="utf-8"))["build"]
    tokens = sum(prepared.counts[f"{side}_tokens"] for side in ("prompt", "chosen", "rejected"))
    return {
        "pairs": prepared.pairs,
        "bytes": file.stat().st_size,
        "tokens": int(tokens),
        "seconds": seconds,
        **build,
        "prepared": prepared,
    }


_RECORD_BY_RECORD = """
import json, sys, time
from itertools import islice
from transformers import AutoTokenizer

file, folder, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
lines = list(islice(open(file, encoding="utf-8"), count))

def ids(text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]

def by_record(raw):
    prompt = tokenizer.apply_chat_template(raw["chosen"][:-1], tokenize=False, add_generation_prompt=True)
    return ids(prompt), ids(raw["chosen"][-1]["content"]), ids(raw["rejected"][-1]["content"])

def whole(raw):
    template = tokenizer.apply_chat_template
    prompt = template(raw["chosen"][:-1], add_generation_prompt=True)
    return prompt, template(raw["chosen"]), template(raw["rejected"])

def encoding(texts):
    return tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)

out = {}
for name, work in (("record_by_record", by_record), ("whole_conversations", whole)):
    for line in lines[:50]:
        work(json.loads(line))
    began = time.process_time()
    for line in lines:
        work(json.loads(line))
    out[name] = (time.process_time() - began) / len(lines)
texts = [m["content"] for line in lines for raw in [json.loads(line)]
         for m in (*raw["chosen"], raw["rejected"][-1])]
began = time.process_time()
encoding(texts)
out["encoding_only"] = (time.process_time() - began) / len(lines)
print(json.dumps(out))
"""


def _baseline(file: Path, tokenizer: str, records: int) -> dict[str, float]:
    """CPU seconds per record in a fresh process with one thread."""
    command = [sys.executable, "-c", _RECORD_BY_RECORD, str(file), tokenizer, str(records)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
