"""The order of training: the pairs of each optimizer step, and their distribution across ranks.

The pairs of a step depend only on the seed and the epoch; the number of ranks determines only how they are
distributed. Every pair occurs exactly once per epoch, with the remainder in a smaller last step. Any step is
computed directly from a permutation, so that a run resumes anywhere without replaying the steps before.

Shapes: N pairs. Imports NumPy only.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import numpy as np

ORDER_VERSION = 4
"""Version of the order that this code produces; every checkpoint records it.

Increment it with every change after which the same arguments give other pairs in a step or other
micro-batches: how the seed is used, the windows, how lengths are counted, how a step is distributed across
ranks. Resuming a run of another version is then refused, since it would repeat some pairs and skip others.

- 1 (not recorded in checkpoints): counted truncated tails as length, and used smaller windows.
- 2: sorted the pairs of a step by length only if the steps themselves consisted of pairs of similar length.
- 3: distributed the pairs of a step round-robin.
"""
_WINDOW_STEPS = 16
"""Pairs are sorted by length within windows of this many steps, or of four times as many micro-batches if
those are more pairs."""


def pair_tokens(lengths: np.ndarray, truncate_to_shorter: bool) -> np.ndarray:
    """Number of tokens of each pair in a row `[prompt][chosen][rejected]`: [N] int32.

    Args:
        lengths: tokens of prompt, chosen and rejected: [N, 3].
        truncate_to_shorter: both answers are truncated to the length of the shorter one.
    """
    sizes = np.asarray(lengths)
    answers = 2 * sizes[:, 1:].min(axis=1) if truncate_to_shorter else sizes[:, 1:].sum(axis=1)
    return np.asarray(sizes[:, 0] + answers, dtype=np.int32)


class Schedule:
    """Steps and micro-batches over `N` prepared pairs.

    Args:
        lengths: tokens of prompt, chosen and rejected: [N, 3] int32.
        seed: seed of the permutations.
        pairs_per_step: pairs in an optimizer step, over all ranks.
        micro_batch_pairs: maximum number of pairs in a micro-batch.
        length_batches: build steps from groups of pairs of similar length; otherwise the pairs of a step are
            drawn regardless of length. Micro-batches within a step are sorted by length in both cases.
        truncate_to_shorter: answers are truncated to the shorter one of a pair, and its length counts so.
        epochs: passes over the data, not necessarily a whole number.
        max_steps: number of steps instead of `epochs`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        seed: int,
        pairs_per_step: int,
        micro_batch_pairs: int,
        length_batches: bool = True,
        truncate_to_shorter: bool = False,
        epochs: float = 1.0,
        max_steps: int | None = None,
    ):
        if len(lengths) == 0:
            raise ValueError("a schedule needs at least one pair")
        self.params: dict[str, Any] = {
            "seed": seed,
            "pairs_per_step": pairs_per_step,
            "micro_batch_pairs": micro_batch_pairs,
            "length_batches": length_batches,
            "truncate_to_shorter": truncate_to_shorter,
            "epochs": epochs,
            "max_steps": max_steps,
        }
        """All arguments except `lengths`, to build an equal schedule in another process."""
        self.pairs = len(lengths)
        self.pairs_per_step, self.micro_batch_pairs = pairs_per_step, micro_batch_pairs
        self._seed, self._length_batches = seed, length_batches
        self._tokens = pair_tokens(lengths, truncate_to_shorter)
        self.tokens_per_pair = float(np.asarray(lengths).sum(axis=1).mean())
        """Mean number of tokens of a prompt and its two answers, before truncation to the shorter one."""
        self.steps_per_epoch = -(-self.pairs // pairs_per_step)
        # The tolerance keeps a product such as 0.07 * 100 = 7.000000000000001 from adding a step.
        self.steps_total = max_steps or max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The pair ids of an epoch in the order in which they fill its steps: [N] int64."""
        if epoch not in self._orders:
            self._orders[epoch] = self._permute(epoch)
            while len(self._orders) > 2:  # a step can be read ahead in the next epoch
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def step_pairs(self, step: int) -> np.ndarray:
        """The pair ids of an optimizer step, counted from 0: at most [pairs_per_step] int64."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self.epoch_order(epoch)[index * self.pairs_per_step : (index + 1) * self.pairs_per_step]

    def pairs_before(self, step: int) -> int:
        """The number of pairs seen after `step` steps."""
        epochs, index = divmod(step, self.steps_per_epoch)
        return epochs * self.pairs + min(index * self.pairs_per_step, self.pairs)

    def micro_batches(self, step: int, rank: int, world: int) -> list[np.ndarray]:
        """The micro-batches of a rank in a step, each at most [micro_batch_pairs] int64.

        Every rank has the same number of micro-batches, some of which may be empty. The shares of the ranks
        differ by at most one pair, and micro-batches with the same index hold pairs of similar length on all
        ranks.
        """
        ids = self.step_pairs(step)
        ids = ids[np.lexsort((ids, self._tokens[ids]))]
        shares = [len(ids) // world + (r < len(ids) % world) for r in range(world)]
        count = -(-shares[0] // self.micro_batch_pairs)
        # From the longest pairs to the shortest, the rank with the fewest padded tokens so far takes the
        # longest pairs of each micro-batch index, because all ranks wait for the slowest one.
        loads = [0] * world
        out, end = [], len(ids)
        for index in reversed(range(count)):
            for r in sorted(range(world), key=lambda r: (loads[r], r)):
                size = shares[r] // count + (index < shares[r] % count)
                if r == rank:
                    out.append(ids[end - size : end])
                loads[r] += size * int(self._tokens[ids[end - 1]])  # all padded to the longest
                end -= size
        return out[::-1]

    def padding_share(self, steps: int = 64, world: int = 1) -> float:
        """Share of padding tokens if micro-batches are padded to their longest pair, over the first steps."""
        shares = [(step, rank) for step in range(min(steps, self.steps_total)) for rank in range(world)]
        tokens = sum(
            int(self._tokens[ids].sum())
            for step, rank in shares
            for ids in self.micro_batches(step, rank, world)
        )
        return 1 - tokens / sum(self.padded_tokens(step, rank, world) for step, rank in shares)

    def padded_tokens(self, step: int, rank: int, world: int) -> int:
        """Tokens of the micro-batches of a rank in a step, each padded to its longest pair."""
        micro_batches = self.micro_batches(step, rank, world)
        return sum(int(self._tokens[ids].max()) * len(ids) for ids in micro_batches if len(ids))

    def _permute(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(self.pairs)
        group = min(self.micro_batch_pairs, self.pairs_per_step)
        grouped = self.pairs // group * group
        if not self._length_batches or grouped == 0:
            return order
        # Sort by length within windows, divide into groups of similar length and shuffle the groups. The
        # pairs of the incomplete last group come from the permutation, so that they are of any length.
        window = _WINDOW_STEPS * max(self.pairs_per_step, 4 * group) // group * group
        ranked = order[:grouped].copy()
        for start in range(0, grouped, window):
            part = ranked[start : start + window]
            ranked[start : start + window] = part[np.argsort(self._tokens[part], kind="stable")]
        groups = ranked.reshape(-1, group)
        return np.concatenate([groups[rng.permutation(len(groups))].reshape(-1), order[grouped:]])
