"""The order of training: the pairs of each optimizer step, and their distribution across ranks.

The pairs of a step depend only on the seed and the epoch; the number of ranks determines only how they are
distributed. Every pair occurs exactly once per epoch, with the remainder in a smaller last step. Any step is
computed directly from a permutation, so that a run resumes anywhere without replaying the steps before.

Shapes: N pairs. Imports NumPy only.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, Literal

import numpy as np

from tbpo_ray.data.deal import Deal, Limits, align, deal_even, deal_packed, deal_padded, padded_tokens
from tbpo_ray.data.pair_sizes import TOKEN_COUNTS, row_spans

ORDER_VERSION = 5
"""Version of the order that this code produces; every checkpoint records it.

Increment it with every change after which the same arguments give other pairs in a step or other
micro-batches: how the seed is used, the windows, how lengths are counted, how a step is distributed across
ranks. Resuming a run of another version is then refused, since it would repeat some pairs and skip others.

- 1 (not recorded in checkpoints): counted truncated tails as length, and used smaller windows.
- 2: sorted the pairs of a step by length only if the steps themselves consisted of pairs of similar length.
- 3: distributed the pairs of a step round-robin.
- 4: gave all ranks equally many pairs.
"""
GROUP_PAIRS = 8
"""Pairs of similar length that stay together in a step, where no number of pairs limits a micro-batch."""
_WINDOW_STEPS = 16
"""Pairs are sorted by length within windows of this many steps, or of four times as many micro-batches if
those are more pairs."""

RowKind = Literal["shared", "separate", "packed"]
"""`shared`: a row `[prompt][chosen][rejected]` for each pair; `separate`: a row `[prompt][answer]` for each
answer; `packed`: the shared rows of a micro-batch follow each other in one row."""


def pair_tokens(lengths: np.ndarray, truncate_to_shorter: bool) -> np.ndarray:
    """Number of tokens of each pair in a row `[prompt][chosen][rejected]`: [N] int32.

    Args:
        lengths: sizes of pairs, see :mod:`tbpo_ray.data.pair_sizes`: [N, 3 or 9].
        truncate_to_shorter: both answers keep as many trained tokens as the shorter one has.
    """
    answers = row_spans(lengths, truncate_to_shorter=truncate_to_shorter).sum(axis=1)
    return np.asarray(np.asarray(lengths)[:, 0] + answers, dtype=np.int32)


def row_tokens(
    lengths: np.ndarray, *, truncate_to_shorter: bool = False, rows: RowKind = "shared", sides: int = 2
) -> np.ndarray:
    """Positions of each pair that go through the model, without padding to other pairs: [N] int64.

    The last token of an answer predicts nothing and is not among them, nor is what follows its last trained
    token. With separate rows both are padded to the longer one.

    Args:
        lengths: sizes of pairs, see :mod:`tbpo_ray.data.pair_sizes`: [N, 3 or 9].
        sides: answers that are trained on; 1 for SFT.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    spans = row_spans(sizes, truncate_to_shorter=truncate_to_shorter and sides == 2)[:, :sides]
    inputs = np.maximum(spans - 1, 0)
    if rows == "separate":
        return np.asarray(sides * (sizes[:, 0] + inputs.max(axis=1)))
    return np.asarray(sizes[:, 0] + inputs.sum(axis=1))


class Schedule:
    """Steps and micro-batches over `N` prepared pairs.

    Args:
        lengths: sizes of pairs, see :mod:`tbpo_ray.data.pair_sizes`: [N, 3 or 9] int32.
        seed: seed of the permutations.
        pairs_per_step: pairs in an optimizer step, over all ranks.
        micro_batch_pairs: maximum number of pairs in a micro-batch; None: no such limit.
        micro_batch_tokens: maximum number of tokens in a micro-batch, padding included; a longer pair is
            alone in one. None: no such limit.
        rows: how pairs become rows, which decides what padding costs.
        sides: answers that are trained on; 1 for SFT.
        length_batches: build steps from groups of pairs of similar length; otherwise the pairs of a step are
            drawn regardless of length. Micro-batches within a step are sorted by length in both cases.
        truncate_to_shorter: answers are truncated to the shorter one of a pair, and its length counts so.
        epochs: passes over the data, not necessarily a whole number.
        max_steps: number of steps instead of `epochs`.
    """

    def __init__(  # noqa: PLR0913  (the settings of a run that decide its order)
        self,
        lengths: np.ndarray,
        *,
        seed: int,
        pairs_per_step: int,
        micro_batch_pairs: int | None = None,
        micro_batch_tokens: int | None = None,
        rows: RowKind = "shared",
        sides: int = 2,
        length_batches: bool = True,
        truncate_to_shorter: bool = False,
        epochs: float = 1.0,
        max_steps: int | None = None,
    ):
        if len(lengths) == 0:
            raise ValueError("a schedule needs at least one pair")
        if micro_batch_pairs is None and micro_batch_tokens is None:
            raise ValueError("a schedule needs micro_batch_pairs or micro_batch_tokens")
        self.params: dict[str, Any] = {
            "seed": seed,
            "pairs_per_step": pairs_per_step,
            "micro_batch_pairs": micro_batch_pairs,
            "micro_batch_tokens": micro_batch_tokens,
            "rows": rows,
            "sides": sides,
            "length_batches": length_batches,
            "truncate_to_shorter": truncate_to_shorter,
            "epochs": epochs,
            "max_steps": max_steps,
        }
        """All arguments except `lengths`, to build an equal schedule in another process."""
        self.pairs = len(lengths)
        self.pairs_per_step = pairs_per_step
        self.limits = Limits(micro_batch_pairs, micro_batch_tokens)
        self.packed = rows == "packed"
        self._seed, self._length_batches = seed, length_batches
        # Memory-mapped where they come from a file: sizes are computed for the pairs that are looked at, so
        # that a process holds nothing per pair before it asks for an order.
        self._lengths = np.asarray(lengths)
        self._truncate = truncate_to_shorter
        self._row_options: dict[str, Any] = {"rows": rows, "sides": sides}
        self.tokens_per_pair = _total(self._lengths[:, :TOKEN_COUNTS]) / self.pairs
        """Mean number of tokens of a prompt and its two answers, before truncation to the shorter one."""
        self.steps_per_epoch = -(-self.pairs // pairs_per_step)
        # The tolerance keeps a product such as 0.07 * 100 = 7.000000000000001 from adding a step.
        self.steps_total = max_steps or max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()
        self._id_type = np.int32 if self.pairs < 2**31 else np.int64
        self._deal: tuple[tuple[int, int], Deal] | None = None

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The pair ids of an epoch in the order in which they fill its steps: [N] int64."""
        return self._order(epoch).astype(np.int64)

    def _order(self, epoch: int) -> np.ndarray:
        """:meth:`epoch_order` in the smallest type, kept for two epochs."""
        if epoch not in self._orders:
            self._orders[epoch] = self._permute(epoch)
            while len(self._orders) > 2:  # a step can be read ahead in the next epoch
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def step_pairs(self, step: int) -> np.ndarray:
        """The pair ids of an optimizer step, counted from 0: at most [pairs_per_step] int64."""
        epoch, index = divmod(step, self.steps_per_epoch)
        part = slice(index * self.pairs_per_step, (index + 1) * self.pairs_per_step)
        return self._order(epoch)[part].astype(np.int64)

    def pairs_before(self, step: int) -> int:
        """The number of pairs seen after `step` steps."""
        epochs, index = divmod(step, self.steps_per_epoch)
        return epochs * self.pairs + min(index * self.pairs_per_step, self.pairs)

    def micro_batches(self, step: int, rank: int, world: int) -> list[np.ndarray]:
        """The micro-batches of a rank in a step, each an array of pair ids int64.

        Every rank has the same number of micro-batches, some of which may be empty. Those with the same index
        have nearly equally many tokens on all ranks, padding included, and not always equally many pairs.
        """
        return self.deal(step, world)[rank]

    def deal(self, step: int, world: int) -> Deal:
        """The micro-batches of all ranks in a step, see :meth:`micro_batches`."""
        if self._deal is None or self._deal[0] != (step, world):
            self._deal = (step, world), self._distribute(self.step_pairs(step), world)
        return self._deal[1]

    def _distribute(self, ids: np.ndarray, world: int) -> Deal:
        if world == 1 and self.limits.tokens is None and not self.packed:
            assert self.limits.pairs is not None
            tokens = self._pair_tokens(ids)
            order = np.lexsort((ids, tokens))
            found = deal_even(tokens[order], self.limits.pairs)
        else:
            tokens = self._row_tokens(ids)
            order = np.lexsort((ids, tokens))
            distribute = deal_packed if self.packed else deal_padded
            found = distribute(tokens[order], world, self.limits)
        ids = ids[order]
        return [[ids[part] for part in parts] for parts in found]

    def padding_share(self, steps: int = 64, world: int = 1) -> float:
        """Share of padding among the tokens that go through the model, over the first steps."""
        counted = range(min(steps, self.steps_total))
        real = sum(int(self._row_tokens(self.step_pairs(step)).sum()) for step in counted)
        return 1 - real / sum(
            self.padded_tokens(step, rank, world) for step in counted for rank in range(world)
        )

    def micro_batch_tokens(self, ids: np.ndarray) -> int:
        """Tokens of a micro-batch of these pairs that go through the model, padding included."""
        return padded_tokens(self._row_tokens(ids), packed=self.packed)

    def padded_tokens(self, step: int, rank: int, world: int) -> int:
        """Tokens of a rank's micro-batches in a step, padding included."""
        return sum(self.micro_batch_tokens(ids) for ids in self.micro_batches(step, rank, world) if len(ids))

    def busy_share(self, step: int, world: int) -> float:
        """Share of the time of a step in which the ranks compute something useful, by tokens.

        It is the number of real tokens of all ranks over `world` times the sum, over the micro-batch indices,
        of the tokens of the slowest rank, padding included: ranks go through the indices in lockstep.
        """
        found = self.deal(step, world)
        lockstep = sum(
            max(self.micro_batch_tokens(parts[index]) for parts in found) for index in range(len(found[0]))
        )
        return float(self._row_tokens(self.step_pairs(step)).sum()) / (world * lockstep)

    def busy_bound(self, step: int, world: int) -> float:
        """The most that :meth:`busy_share` can be: no step is shorter than its longest pair."""
        rows = self._row_tokens(self.step_pairs(step))
        total = float(rows.sum())
        return total / (world * max(float(align(int(rows.max()))), total / world))

    def _pair_tokens(self, ids: np.ndarray) -> np.ndarray:
        return pair_tokens(self._lengths[ids], self._truncate)

    def _row_tokens(self, ids: np.ndarray) -> np.ndarray:
        return row_tokens(self._lengths[ids], truncate_to_shorter=self._truncate, **self._row_options)

    def _permute(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(self.pairs).astype(self._id_type)
        group = min(self.limits.pairs or GROUP_PAIRS, self.pairs_per_step)
        grouped = self.pairs // group * group
        if not self._length_batches or grouped == 0:
            return order
        # Sort by length within windows, divide into groups of similar length and shuffle the groups. The
        # pairs of the incomplete last group come from the permutation, so that they are of any length.
        window = _WINDOW_STEPS * max(self.pairs_per_step, 4 * group) // group * group
        ranked = order[:grouped]  # sorted in place
        for start in range(0, grouped, window):
            part = ranked[start : start + window]
            ranked[start : start + window] = part[np.argsort(self._pair_tokens(part), kind="stable")]
        groups = ranked.reshape(-1, group)
        order[:grouped] = groups[rng.permutation(len(groups))].reshape(-1)
        return order


def _total(lengths: np.ndarray, rows: int = 2**20) -> int:
    """The sum of [N, k] lengths, in parts that bound the memory."""
    return sum(int(lengths[at : at + rows].sum(dtype=np.int64)) for at in range(0, len(lengths), rows))
