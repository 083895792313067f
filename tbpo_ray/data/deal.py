"""Distribute the pairs of a step across ranks so that no rank waits for another.

With ZeRO stages 2 and 3 all ranks go through their micro-batches in lockstep: for each index, everybody waits
for the rank with the most padded tokens. So the cost of a step is the sum over the micro-batch indices of the
largest micro-batch, and ranks may hold different numbers of pairs.

padded  a micro-batch has one row per pair, padded to the longest one: ranges of the pairs sorted by length
packed  the pairs of a micro-batch follow each other in one row: bins of nearly equal numbers of tokens

Shapes: n pairs of one step. Imports NumPy only.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

ALIGN = 8
"""Rows are padded to a multiple of this, which keeps the number of distinct shapes small."""
MICRO_BATCH_TOKENS = 512
"""A micro-batch costs about as much as this many more tokens, whatever its size: kernel launches, and the
gathering of weights under ZeRO-3. More micro-batches than necessary have to save more than that."""
FEW_PAIRS = 8
"""Up to this many pairs per bin, the smallest capacity is searched where levelling leaves bins uneven."""

Deal = list[list[np.ndarray]]
"""For each rank its micro-batches, each an array of positions among the n pairs, possibly empty."""


@dataclass(frozen=True)
class Limits:
    """What a micro-batch may hold; None means no limit. A pair that exceeds `tokens` is alone in one."""

    pairs: int | None
    tokens: int | None


def align(tokens: np.ndarray | int) -> np.ndarray:
    """The next multiple of :data:`ALIGN`."""
    return np.asarray(-(-np.asarray(tokens, dtype=np.int64) // ALIGN) * ALIGN)


def padded_tokens(tokens: np.ndarray, *, packed: bool) -> int:
    """Tokens of a micro-batch with rows of `tokens` [n] that go through the model, padding included."""
    if not len(tokens):
        return ALIGN  # a rank without pairs runs one masked token
    return int(align(tokens.sum())) if packed else int(align(tokens.max())) * len(tokens)


def deal_even(tokens: np.ndarray, most_pairs: int) -> Deal:
    """The micro-batches of a single rank, which waits for nobody: as few as possible, of equal size."""
    count = -(-len(tokens) // most_pairs)
    sizes = [len(tokens) // count + (index < len(tokens) % count) for index in range(count)]
    return [np.split(np.arange(len(tokens)), np.cumsum(sizes)[:-1])]


def deal_padded(tokens: np.ndarray, ranks: int, limits: Limits) -> Deal:
    """Deal pairs whose rows are padded to the longest one of their micro-batch.

    Consecutive pairs form a range of about equally many padded tokens, many short pairs or few long ones, and
    consecutive ranges form a micro-batch index. Among a few numbers of indices the cheapest is used.

    Args:
        tokens: [n] row tokens, ascending.
    """
    longest_first = align(tokens[::-1])
    most_pairs = min(limits.pairs or len(tokens), len(tokens))
    full = int(longest_first[0]) * most_pairs
    largest = full if limits.tokens is None else max(ALIGN, min(full, limits.tokens))
    fewest = -(-_range_count(longest_first, largest, most_pairs) // ranks)
    candidates = sorted({fewest, fewest + 1, -(-3 * fewest // 2), 2 * fewest}) if ranks > 1 else [fewest]
    best: tuple[int, list[int]] | None = None
    for count in candidates:
        bounds = _smallest_ranges(longest_first, count * ranks, largest, most_pairs)
        costs = [int(longest_first[start]) * (stop - start) for start, stop in pairwise(bounds)]
        # A later index holds shorter pairs, but a range of them may be cut off by the limit on pairs.
        cost = sum(max(costs[at : at + ranks]) for at in range(0, len(costs), ranks))
        cost += MICRO_BATCH_TOKENS * -(-len(costs) // ranks)
        if best is None or cost < best[0]:
            best = cost, bounds
    assert best is not None
    n = len(tokens)
    bins = [np.arange(n - stop, n - start) for start, stop in pairwise(best[1])]
    return _assign(bins, [padded_tokens(tokens[part], packed=False) for part in bins], ranks)


def _range_count(longest_first: np.ndarray, largest: int, most_pairs: int) -> int:
    return len(_ranges(longest_first, largest, most_pairs)) - 1


def _ranges(longest_first: np.ndarray, largest: int, most_pairs: int) -> list[int]:
    """Bounds of consecutive ranges of at most `largest` padded tokens each, the longest pairs first."""
    sizes = np.clip(largest // longest_first, 1, most_pairs)
    following = (np.arange(len(longest_first)) + sizes).tolist()
    bounds, at, end = [0], 0, len(longest_first)
    while at < end:
        at = min(following[at], end)
        bounds.append(at)
    return bounds


def _smallest_ranges(longest_first: np.ndarray, most: int, largest: int, most_pairs: int) -> list[int]:
    """At most `most` ranges whose largest one is as small as possible; `largest` must suffice."""
    low, high = 1, -(-largest // ALIGN)
    while low < high:
        middle = (low + high) // 2
        if _range_count(longest_first, middle * ALIGN, most_pairs) <= most:
            high = middle
        else:
            low = middle + 1
    return _ranges(longest_first, low * ALIGN, most_pairs)


def deal_packed(tokens: np.ndarray, ranks: int, limits: Limits) -> Deal:
    """Deal pairs that follow each other in one row, without padding between them.

    Args:
        tokens: [n] row tokens, ascending.
    """
    n = len(tokens)
    most_pairs = limits.pairs or n
    budget = int(tokens.sum()) if limits.tokens is None else limits.tokens // ALIGN * ALIGN
    fewest = max(-(-int(tokens.sum()) // (ranks * max(1, budget))), -(-n // (ranks * most_pairs)))
    most = -(-n // ranks)  # then every pair can be alone
    for count in range(min(fewest, most), most + 1):
        bins = _fill(tokens[::-1].tolist(), count * ranks, most_pairs, ranks)
        if all(len(part) < 2 or tokens[part].sum() <= budget for part in bins):
            break
    else:
        bins = [np.array([i]) for i in range(n)]
    return _assign(bins, [int(tokens[part].sum()) for part in bins], ranks)


def _fill(longest_first: list[int], count: int, most_pairs: int, ranks: int) -> list[np.ndarray]:
    """`count` bins of nearly equal load: each an array of positions in ascending order of tokens.

    Up to three fillings are tried. The first has pairs of similar length in a bin, which costs attention less
    where it pads, and levels the bins with the shortest pairs. The second gives the longest remaining pair to
    the bin with the least load. The third, for few pairs per bin, searches the smallest capacity into which
    they fit. The first is used unless another one is more even by a hundredth.
    """
    target = -(-sum(longest_first) // count)
    fillings = [
        _fill_bins(longest_first, count, most_pairs, target),
        _fill_bins(longest_first, count, most_pairs, 0),
    ]
    costs = [_lockstep(_loads(longest_first, bins), ranks) for bins in fillings]
    least = max(longest_first[0], target) + (count // ranks - 1) * target
    if min(costs) > 1.01 * least and len(longest_first) <= FEW_PAIRS * count:
        fillings.append(_pack_tightly(longest_first, count, most_pairs))
        costs.append(_lockstep(_loads(longest_first, fillings[-1]), ranks))
    best = min(range(len(costs)), key=lambda i: costs[i])
    chosen = fillings[0 if costs[0] <= 1.01 * costs[best] else best]
    last = len(longest_first) - 1
    return [np.array([last - i for i in reversed(part)], dtype=np.int64) for part in chosen]


def _loads(longest_first: list[int], bins: list[list[int]]) -> list[int]:
    return [sum(longest_first[i] for i in part) for part in bins]


def _pack_tightly(longest_first: list[int], count: int, most_pairs: int) -> list[list[int]]:
    """Best-fit decreasing into the smallest capacity that a bisection finds (the MULTIFIT algorithm)."""
    low = max(longest_first[0], -(-sum(longest_first) // count))
    high = low + longest_first[0]  # longest-first levelling never exceeds this
    found = None
    while low < high:
        middle = (low + high) // 2
        bins = _best_fit(longest_first, count, most_pairs, middle)
        if bins is None:
            low = middle + 1
        else:
            found, high = bins, middle
    return (
        found
        or _best_fit(longest_first, count, most_pairs, low)
        or _fill_bins(longest_first, count, most_pairs, 0)
    )


def _best_fit(longest_first: list[int], count: int, most_pairs: int, capacity: int) -> list[list[int]] | None:
    """Put each pair into the fullest bin that has room for it; None if it does not fit into any."""
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [(capacity, index) for index in range(count)]  # of the bins that are not full, ascending
    for i, tokens in enumerate(longest_first):
        at = bisect_left(room, (tokens, -1))
        if at == len(room):
            return None
        left, index = room.pop(at)
        bins[index].append(i)
        if len(bins[index]) < most_pairs:
            insort(room, (left - tokens, index))
    return bins


def _fill_bins(longest_first: list[int], count: int, most_pairs: int, target: int) -> list[list[int]]:
    """Fill bins with consecutive pairs up to `target` tokens, then level them with those that are left."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads, at = [0] * count, 0
    for index in range(count if target else 0):
        while at < len(longest_first) and len(bins[index]) < most_pairs:
            if bins[index] and loads[index] + longest_first[at] > target:
                break
            bins[index].append(at)
            loads[index] += longest_first[at]
            at += 1
    open_bins = [(load, index) for index, load in enumerate(loads) if len(bins[index]) < most_pairs]
    heapq.heapify(open_bins)
    for i in range(at, len(longest_first)):
        load, index = open_bins[0]
        bins[index].append(i)
        if len(bins[index]) < most_pairs:
            heapq.heapreplace(open_bins, (load + longest_first[i], index))
        else:
            heapq.heappop(open_bins)
    return bins


def _lockstep(loads: Sequence[int], ranks: int) -> int:
    """Tokens that the ranks spend together if bins of similar load share an index."""
    return sum(sorted(loads, reverse=True)[::ranks])


def _assign(bins: Sequence[np.ndarray], costs: Sequence[int], ranks: int) -> Deal:
    """Put bins of similar cost at the same index, the cheapest ones first.

    Within an index the rank with the least so far takes the most, so that ranks are even over the whole step
    too, which is what counts below ZeRO stage 2.
    """
    by_cost = sorted((i for i in range(len(bins)) if len(bins[i])), key=lambda i: (-costs[i], i))
    loads = [0] * ranks
    out: Deal = [[] for _ in range(ranks)]
    for start in range(0, len(by_cost), ranks):
        group = by_cost[start : start + ranks]
        for place, rank in enumerate(sorted(range(ranks), key=lambda r: (loads[r], r))):
            taken = group[place] if place < len(group) else None
            out[rank].append(bins[taken] if taken is not None else np.zeros(0, dtype=np.int64))
            loads[rank] += costs[taken] if taken is not None else 0
    return [parts[::-1] for parts in out]
