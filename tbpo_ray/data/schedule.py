"""The order of training: which pairs make up each optimizer step, and who holds which of them.

Which pairs are in a step depends on the seed and the epoch alone; the number of workers decides only how a
step's pairs are dealt out. Every pair comes exactly once in an epoch, the remainder as a smaller last step.
Any position is found by arithmetic on a permutation, so a run resumes anywhere without replaying. NumPy only.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import numpy as np

ORDER = 4
"""Which order this code makes of its arguments; every checkpoint holds the number.

Raise it with any change after which some arguments give other pairs in a step, or other micro-batches: the
seed's use, the windows, how lengths are counted, how a step is dealt out. A run that is under way is then
refused instead of going on with some pairs twice and others never. 1, which older checkpoints do not name,
counted the tail that is cut off as length, in smaller windows; 2 sorted the pairs of a step by length only
where the steps themselves were made of like lengths; 3 dealt a step's pairs out in turns.
"""
_WINDOW_STEPS = 16
"""Pairs are sorted by length within windows of this many steps, or of four times as many micro-batches,
whichever are more pairs."""


def pair_tokens(lengths: np.ndarray, cut_tail: bool) -> np.ndarray:
    """[N] int32 tokens that a pair brings into a row `[prompt][chosen][rejected]`.

    Args:
        lengths: of prompt, chosen and rejected: [N, 3].
        cut_tail: both answers are cut at the shorter one's length.
    """
    sizes = np.asarray(lengths)
    if not cut_tail:
        return sizes.sum(axis=1, dtype=np.int32)
    return (sizes[:, 0] + 2 * sizes[:, 1:].min(axis=1)).astype(np.int32)


class Schedule:
    """Steps and micro-batches over `N` prepared pairs.

    Args:
        lengths: tokens of prompt, chosen and rejected: [N, 3] int32.
        seed: of the permutations.
        pairs_per_step: pairs in an optimizer step, over all workers.
        micro_batch_pairs: most pairs in a micro-batch.
        length_batches: make steps of groups of like length; otherwise their pairs are drawn without regard
            to it. Within a step micro-batches hold like lengths either way.
        cut_tail: tokens behind the shorter answer of a pair are cut, and do not count as its length.
        epochs: passes over the data, a part of one allowed.
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
        cut_tail: bool = False,
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
            "cut_tail": cut_tail,
            "epochs": epochs,
            "max_steps": max_steps,
        }
        """Everything but `lengths`, to build an equal schedule elsewhere."""
        self.pairs = len(lengths)
        self.pairs_per_step, self.micro_batch_pairs = pairs_per_step, micro_batch_pairs
        self._seed, self._length_batches = seed, length_batches
        self._tokens = pair_tokens(lengths, cut_tail)
        self.tokens_per_pair = float(np.asarray(lengths).sum(axis=1).mean())
        """Mean tokens of a prompt and its two answers, uncut."""
        self.steps_per_epoch = -(-self.pairs // pairs_per_step)
        self.steps_total = max_steps or max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Pair ids in the order in which steps of this epoch are filled: [N] int64."""
        if epoch not in self._orders:
            self._orders[epoch] = self._permute(epoch)
            while len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def step_pairs(self, step: int) -> np.ndarray:
        """Ids of the pairs of an optimizer step, counted from 0: at most [pairs_per_step] int64."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self.epoch_order(epoch)[index * self.pairs_per_step : (index + 1) * self.pairs_per_step]

    def pairs_before(self, step: int) -> int:
        """How many pairs were seen when `step` steps are done."""
        epochs, index = divmod(step, self.steps_per_epoch)
        return epochs * self.pairs + min(index * self.pairs_per_step, self.pairs)

    def micro_batches(self, step: int, rank: int, world: int) -> list[np.ndarray]:
        """A rank's micro-batches of a step, each at most [micro_batch_pairs] int64.

        Every rank has equally many (an empty one where pairs run out), shares differ by at most one pair, and
        micro-batches with the same index hold pairs of like length on all ranks. From the longest to the
        shortest, the rank that has the fewest padded tokens so far takes the longest ones of an index: all
        wait for the slowest one.
        """
        ids = self.step_pairs(step)
        ids = ids[np.lexsort((ids, self._tokens[ids]))]
        shares = [len(ids) // world + (r < len(ids) % world) for r in range(world)]
        count = -(-shares[0] // self.micro_batch_pairs)
        loads = [0] * world
        out, end = [], len(ids)
        for index in reversed(range(count)):
            for r in sorted(range(world), key=lambda r: (loads[r], r)):
                size = shares[r] // count + (index < shares[r] % count)
                if r == rank:
                    out.append(ids[end - size : end])
                loads[r] += size * int(self._tokens[ids[end - 1]])  # padded to its longest
                end -= size
        return out[::-1]

    def padding_share(self, steps: int = 64, world: int = 1) -> float:
        """Share of padding in micro-batches padded to their longest pair, over the first `steps` steps."""
        positions = [(step, rank) for step in range(min(steps, self.steps_total)) for rank in range(world)]
        parts = [ids for step, rank in positions for ids in self.micro_batches(step, rank, world)]
        real = sum(int(self._tokens[ids].sum()) for ids in parts)
        return 1 - real / sum(self.padded_tokens(step, rank, world) for step, rank in positions)

    def padded_tokens(self, step: int, rank: int, world: int) -> int:
        """Tokens of a rank's micro-batches of a step, each padded to its longest pair."""
        parts = self.micro_batches(step, rank, world)
        return sum(int(self._tokens[ids].max()) * len(ids) for ids in parts if len(ids))

    def _permute(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(self.pairs)
        group = min(self.micro_batch_pairs, self.pairs_per_step)
        whole = self.pairs // group * group
        if not self._length_batches or whole == 0:
            return order
        # Sort by length inside windows, cut into groups of like length, and shuffle the groups. The pairs
        # that fill no group were drawn by the permutation, so they are of any length.
        window = _WINDOW_STEPS * max(self.pairs_per_step, 4 * group) // group * group
        ranked = order[:whole].copy()
        for start in range(0, whole, window):
            part = ranked[start : start + window]
            ranked[start : start + window] = part[np.argsort(self._tokens[part], kind="stable")]
        groups = ranked.reshape(-1, group)
        return np.concatenate([groups[rng.permutation(len(groups))].reshape(-1), order[whole:]])
