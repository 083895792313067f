"""Check, on a run's own weights and pairs, that log-probs are those of the plain model.

Three computations of the same log-probs are compared, each with the one before it:

plain     transformers' own forward pass of one unpadded row, with eager attention
separate  padded rows [prompt][answer], with the run's attention
shared    rows [prompt][chosen][rejected], where the run uses them

Where separate rows differ from plain ones, eager attention is tried; where packed or shared rows differ from
separate ones, or cannot be computed, each pair or each answer gets its own row. A model with weights or
log-probs that are not finite is refused. Whatever an architecture does with positions,
masks or state, it is found here and not in the results of a run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbpo_ray.data.pair_sizes import TOKEN_COUNTS
from tbpo_ray.data.reader import PairReader
from tbpo_ray.data.shards import TOKEN_COLUMNS, PreparedPairs
from tbpo_ray.errors import InputError, first_line
from tbpo_ray.models.attention import stateful_layers
from tbpo_ray.training.batch import BatchLayout, collate_columns
from tbpo_ray.training.finite_weights import refuse_non_finite_scores, refuse_non_finite_weights
from tbpo_ray.training.scorer import PairScorer

PLAIN_TOKENS = 1024
"""Longest row of a pair that goes through eager attention, whose memory is quadratic in the length."""
MIN_ANSWER_TOKENS = 4
"""Shorter answers are checked only where there are no longer ones: they say little about shared rows."""
ANSWER_POSITIONS = 64
"""Answer tokens of a plain row whose logits are computed; whole logits may not fit into memory."""

MOST_NOISE, MOST_NOISE_AVERAGED = 1e-2, 0.3
"""What rounding may change in a token's log-prob, in nats, when tokens follow: float32, and other dtypes."""


@dataclass(frozen=True)
class CheckPairs:
    """The pairs that are compared, in columns of token ids."""

    short: dict[str, list[np.ndarray]]
    """Pairs that plain rows are computed for."""
    longest: dict[str, list[np.ndarray]]
    """The longest pair: window and position limits, and attention by gathering, may only affect it."""


@dataclass(frozen=True)
class Tolerance:
    """How far log-probs of one token may differ, in nats."""

    plain: float
    """Between separate and plain rows, which use different attention implementations."""
    shared: float
    """Between shared and separate rows."""
    rounding: float
    """Beyond `plain`, up to this much is reported but not refused."""
    averaged: bool
    """Whether it bounds the root mean square over tokens, or the largest difference."""


@dataclass(frozen=True)
class ScoringChoice:
    """How a model is run: the result of the check, the same on every rank."""

    attention: str
    shared_prompt: bool
    packed: bool = False
    sentences: tuple[str, ...] = field(default=())
    """What differs from the configuration and why, for people."""


def select_pairs(sources: Sequence[PreparedPairs]) -> CheckPairs:
    """A few pairs of different length, always the same ones of the same data, and the longest pair."""
    lengths = np.concatenate([source.lengths()[:, :TOKEN_COUNTS] for source in sources])
    starts = np.cumsum([0, *(source.pairs for source in sources)])
    totals = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    candidates = np.flatnonzero(lengths[:, 1:].min(axis=1) >= MIN_ANSWER_TOKENS)
    if not len(candidates):
        candidates = np.arange(len(lengths))
    by_length = candidates[np.argsort(totals[candidates], kind="stable")]
    fitting = by_length[totals[by_length] <= PLAIN_TOKENS]
    short = fitting[[len(fitting) // 4, len(fitting) // 2, -1]] if len(fitting) else by_length[:1]

    def fetch(ids: Sequence[int]) -> dict[str, list[np.ndarray]]:
        columns: dict[str, list[np.ndarray]] = {name: [] for name in TOKEN_COLUMNS}
        for index in ids:
            source = int(np.searchsorted(starts, index, side="right")) - 1
            found = PairReader(sources[source]).fetch(np.array([index - starts[source]]))
            for name in TOKEN_COLUMNS:
                columns[name].append(found[name][0].astype(np.int64))
        return columns

    return CheckPairs(fetch([int(i) for i in dict.fromkeys(short)]), fetch([int(by_length[-1])]))


def check_scoring(
    model: Any,
    pairs: CheckPairs,
    layout: BatchLayout,
    *,
    key: str,
    folder: str = "",
    shared_required: bool = False,
    packing_required: bool = False,
    reload: Callable[[str], Any] | None = None,
) -> tuple[Any, ScoringChoice]:
    """Find the layout and the attention with which a model computes right log-probs.

    Args:
        model: a causal model without an adapter, on its device.
        layout: of the run's batches; `shared_prompt` says whether shared rows are intended.
        key: configuration key and value that name the model, for messages.
        folder: the model's folder, for messages.
        shared_required: refuse instead of using separate rows (`training.shared_prompt=true`).
        packing_required: refuse instead of giving each pair its own row (`training.packing=true`).
        reload: loads the model with another attention implementation; used for models that cannot switch.

    Returns:
        The model with the attention of the choice, and the choice.

    Raises:
        InputError: log-probs are wrong in every way or not finite, or rows that are required are wrong.
    """
    refuse_non_finite_weights(model, key, folder)
    check = _Check(model, pairs, layout, key, folder, reload)
    with torch.no_grad():
        attention, sentences = check.attention()
        sentences += check.packed_rows(required=packing_required)
        shared, more = check.shared_rows(required=shared_required)
    return check.model, ScoringChoice(attention, shared, check.layout.packed, (*sentences, *more))


class _Check:
    def __init__(
        self,
        model: Any,
        pairs: CheckPairs,
        layout: BatchLayout,
        key: str,
        folder: str,
        reload: Callable[[str], Any] | None,
    ):
        self.model, self.pairs, self.layout, self.reload = model, pairs, layout, reload
        self.key, self.folder = key, folder
        self.device = next(model.parameters()).device
        self.scorer = PairScorer(model).eval()
        self.tolerance = Tolerance(0.0, 0.0, 0.0, averaged=False)

    def attention(self) -> tuple[str, tuple[str, ...]]:
        """The requested attention if separate rows agree with plain ones, or else eager."""
        requested = attention_name(self.model)
        try:
            plain, noise = self._plain_logps()
        except torch.OutOfMemoryError:
            # Eager attention needs more memory than training does.
            torch.cuda.empty_cache()
            self.tolerance = _tolerance(self.model, 0.0)
            note = "self-check: there is not enough memory for eager attention; only the layouts are compared"
            return requested, (note,)
        self._refuse_look_ahead(noise)
        self.tolerance = _tolerance(self.model, noise)
        limit = self.tolerance.plain
        off, failure = self._separate_deviation(plain)
        if off <= limit:
            return requested, ()
        if requested != "eager":
            self._switch("eager")
            eager_off, _ = self._separate_deviation(plain)
            if eager_off <= limit:
                return "eager", (
                    f"model.attention={requested}: log-probs of {self.key} differ from the plain model's by "
                    f"{failure or f'{off:.2g}'} per token (tolerance {limit:.2g}); eager is used instead",
                )
            self._switch(requested)
        if off <= self.tolerance.rounding:
            return requested, (
                f"{self.key}: log-probs differ from those of the plain transformers model by {off:.2g} per "
                f"token (tolerance {limit:.2g}) with any attention, which may be rounding",
            )
        raise InputError(
            f"{self.key}: log-probs differ from those of the plain transformers model by "
            f"{failure or f'{off:.2g}'} per token (tolerance {limit:.2g}), also with model.attention=eager; "
            f"{type(self.model).__name__} is not supported"
        )

    def _refuse_look_ahead(self, noise: float) -> None:
        """Refuse a model that is not causal: tokens behind an answer changed the answer's log-probs."""
        most = MOST_NOISE_AVERAGED if _is_averaged(self.model) else MOST_NOISE
        if noise > most:
            raise InputError(
                f"{self.key}: log-probs of an answer change by {noise:.2g} per token when tokens follow it "
                f"(rounding explains at most {most:g}); {type(self.model).__name__} is not a causal language "
                "model, or its configuration makes it attend to later tokens; give a causal one"
            )

    def packed_rows(self, *, required: bool) -> tuple[str, ...]:
        """Whether packed rows agree with separate ones; otherwise the layout no longer has them.

        Returns:
            What is done differently, for people.
        """
        if not self.layout.packed:
            return ()
        off, failure = self._rows_deviation("one pair")
        if not self.scorer.pair_attention:
            failure = "the model has no gathered attention, without which such rows take too much memory"
        elif off <= self.tolerance.shared:
            return ()
        sentence = f"{self.key}: rows with several pairs {self._cause(off, failure)}"
        if required:
            raise InputError(
                f"training.packing=true: {sentence}; set training.packing=false for "
                f"{type(self.model).__name__}"
            )
        self.layout = replace(self.layout, packed=False)
        return (f"{sentence}; each pair gets its own row (training.packing=false)",)

    def shared_rows(self, *, required: bool) -> tuple[bool, tuple[str, ...]]:
        """Whether shared rows agree with separate ones."""
        # Packed rows are shared ones, and have been compared already.
        if self.layout.packed or not self.layout.shared_prompt or self.layout.sides < 2:
            return self.layout.shared_prompt, ()
        off, failure = self._rows_deviation("one answer")
        if off <= self.tolerance.shared:
            return True, ()
        sentence = f"{self.key}: rows with both answers behind one prompt {self._cause(off, failure)}"
        if required:
            raise InputError(
                f"training.shared_prompt=true: {sentence}; must be false or unset for "
                f"{type(self.model).__name__}"
            )
        return False, (f"{sentence}; each answer gets its own row (training.shared_prompt=false)",)

    def _rows_deviation(self, part: str) -> tuple[float, str]:
        """How far rows of the layout are from separate ones, and why they cannot be computed.

        Args:
            part: what a row has several of, for messages.
        """
        layers = stateful_layers(self.model.config)
        if layers is not None:
            # A convolution changes only the first tokens of an answer, which a mean over tokens may hide.
            return float("inf"), f"{layers} carry {part} over into the next"
        return self._deviation(self._shared_pairs, self._separate_pairs())

    def _cause(self, off: float, failure: str) -> str:
        if failure:
            return f"cannot be computed ({failure})"
        return f"give log-probs that differ by {off:.2g} per token (tolerance {self.tolerance.shared:.2g})"

    def _separate(self, columns: dict[str, list[np.ndarray]]) -> list[Tensor]:
        return self._logps(columns, replace(self.layout, shared_prompt=False, packed=False))

    def _separate_pairs(self) -> list[Tensor]:
        return self._separate(self.pairs.short) + self._separate(self.pairs.longest)

    def _shared_pairs(self) -> list[Tensor]:
        return self._logps(self.pairs.short, self.layout) + self._logps(self.pairs.longest, self.layout)

    def _logps(self, columns: dict[str, list[np.ndarray]], layout: BatchLayout) -> list[Tensor]:
        """Log-probs of each answer, all chosen ones first, as training computes them."""
        batch = collate_columns(columns, layout).to(self.device)
        logps = self.scorer.reference_logps(batch).float()
        sides = zip(logps, batch.mask, strict=True)
        return [logp[mask] for side in sides for logp, mask in zip(*side, strict=True)]

    def _plain_logps(self) -> tuple[list[Tensor], float]:
        """Log-probs from the model's own forward pass, and how much they vary with the length of the row.

        Positions beyond `ANSWER_POSITIONS` are NaN.

        Raises:
            InputError: log-probs are not finite.
        """
        before = self.model.config._attn_implementation
        model = self.model
        if before != "eager":
            if model._can_set_attn_implementation():
                model.set_attn_implementation("eager")
            elif self.reload is not None:
                model = self.reload("eager")
        try:
            sides = ("chosen_ids", "rejected_ids")[: self.layout.sides]
            rows = []
            for name in sides:
                other = self.pairs.short["rejected_ids" if name == "chosen_ids" else "chosen_ids"]
                for prompt, answer, opposite in zip(
                    self.pairs.short["prompt_ids"], self.pairs.short[name], other, strict=True
                ):
                    size = len(answer)
                    if self.layout.truncate_to_shorter and self.layout.sides == 2:
                        size = min(size, len(opposite))
                    rows.append((prompt, answer[:size]))
            logps = [_plain_row(model, prompt, answer, self.device) for prompt, answer in rows]
            refuse_non_finite_scores(model, logps, self.key, self.folder)
            prompt, answer = rows[0]
            longer = _plain_row(model, prompt, answer, self.device, extra=prompt)
            noise = _distance([longer], [logps[0]], averaged=_is_averaged(model))
        finally:
            if model is self.model and before != "eager":
                model.set_attn_implementation(before)
        return logps, noise

    def _separate_deviation(self, plain: list[Tensor]) -> tuple[float, str]:
        """How far separate rows are from plain ones; infinity if one of them cannot be computed."""
        # The longest pair has no plain row, but a length that the model cannot take is found here.
        return self._deviation(lambda: self._separate_pairs()[: len(plain)], plain)

    def _deviation(self, compute: Callable[[], list[Tensor]], expected: list[Tensor]) -> tuple[float, str]:
        """How far a computation is from the expected values; infinity and the error where it fails."""
        try:
            return _distance(compute(), expected, averaged=self.tolerance.averaged), ""
        except torch.OutOfMemoryError:
            # That is about the size of a row and not about its values: training will say so better.
            return 0.0, ""
        # An architecture that does not know such masks or positions fails in its own way.
        except Exception as error:
            return float("inf"), f"{type(error).__name__}: {first_line(error, 120)}"

    def _switch(self, attention: str) -> None:
        if self.model._can_set_attn_implementation():
            self.model.set_attn_implementation(attention)
        elif self.reload is not None:
            self.model = self.reload(attention)
        self.scorer = PairScorer(self.model).eval()


def attention_name(model: Any) -> str:
    """The attention implementation of a model as the configuration names it."""
    from tbpo_ray.training.pair_attention import NAME

    name: str = model.config._attn_implementation
    return "sdpa" if name == NAME else name


def _plain_row(
    model: Any, prompt: np.ndarray, answer: np.ndarray, device: torch.device, extra: np.ndarray | None = None
) -> Tensor:
    """[tokens] log-probs of an answer; `extra` tokens behind it lengthen the row without any effect.

    Values that are not finite are minus infinity, and those that were not computed are NaN.
    """
    ids = np.concatenate([prompt, answer] + ([extra] if extra is not None else []))
    tokens = np.unique(np.linspace(0, len(answer) - 1, min(len(answer), ANSWER_POSITIONS)).astype(np.int64))
    positions = torch.from_numpy(len(prompt) - 1 + tokens).to(device)
    arguments: dict[str, Any] = {"input_ids": torch.from_numpy(ids)[None].to(device), "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**arguments, logits_to_keep=positions).logits[0]
    else:
        logits = model(**arguments).logits[0][positions]
    labels = torch.from_numpy(answer[tokens]).to(device)
    out = torch.full((len(answer),), float("nan"), device=device)
    found = logits.float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    out[torch.from_numpy(tokens).to(device)] = found.masked_fill(~found.isfinite(), float("-inf"))
    return out


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor], *, averaged: bool) -> float:
    """Root mean square or maximum of the differences, relative where a log-prob is below -10."""
    a, b = torch.cat(list(found)), torch.cat(list(expected))
    known = ~torch.isnan(b) & (a != b)
    count = max(1, int((~torch.isnan(b)).sum()))
    difference = (a - b)[known].abs() / b[known].abs().div(10).clamp(min=1)
    if not len(difference):
        return 0.0
    value = float((difference.square().sum() / count).sqrt() if averaged else difference.max())
    return value if np.isfinite(value) else float("inf")


def _is_averaged(model: Any) -> bool:
    # Rounding to 8 bits now and then moves a single token far, above all where it changes an expert's choice.
    weight = next(model.parameters())
    return bool(weight.dtype != torch.float32 or (weight.is_cuda and torch.backends.cuda.matmul.allow_tf32))


def _tolerance(model: Any, noise: float) -> Tolerance:
    """The tolerance for the model's dtype, given how much its log-probs vary with the length of a row."""
    if _is_averaged(model):
        plain, shared = (min(max(least, 8 * noise), MOST_NOISE_AVERAGED) for least in (0.1, 0.05))
        return Tolerance(plain, shared, rounding=3 * plain, averaged=True)
    limit = min(max(1e-4, 8 * noise), MOST_NOISE)
    return Tolerance(limit, limit, rounding=10 * limit, averaged=False)
