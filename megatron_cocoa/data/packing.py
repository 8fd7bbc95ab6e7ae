"""Which samples of a step go where: data-parallel ranks first, then packs, so that nobody waits.

The samples of a step are fixed before; losses are normalised over the whole step, so this freedom changes no gradient.
Every rank has the same number of samples (of pairs, in contrastive learning, whose exchange needs that) and, where a
token budget is set, the same number of packs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MAX_SWAPS = 200


@dataclass(frozen=True)
class Assignment:
    """Where the samples of a step go.

    Args:
        packs: ``packs[rank][pack]`` holds indices of samples.
        rank_costs: cost of each rank.
        pack_costs: cost of each pack, rank by rank.
    """

    packs: tuple[tuple[tuple[int, ...], ...], ...]
    rank_costs: tuple[float, ...]
    pack_costs: tuple[float, ...]

    @property
    def rank_imbalance(self) -> float:
        """How far the worst rank's cost is above the mean, as a share of it."""
        return _above_mean(self.rank_costs)

    @property
    def pack_imbalance(self) -> float:
        """The same for single packs."""
        return _above_mean(self.pack_costs)


def assign_samples(
    tokens: Sequence[int],
    costs: Sequence[float],
    *,
    num_ranks: int,
    samples_per_pack: int,
    budget: int | None = None,
    packs_multiple_of: int = 1,
) -> Assignment:
    """Share out one step.

    Args:
        tokens: of each sample (pair: of both sides and its hard negatives together).
        costs: of each sample, in any unit.
        num_ranks: must divide the number of samples.
        samples_per_pack: without a budget; must divide a rank's share.
        budget: tokens that a pack may hold; packs are then as many as it takes.
        packs_multiple_of: with a budget, the packs of a rank are a multiple of this.

    Raises:
        ValueError: if a sample alone is longer than ``budget``, or there are fewer samples than packs.
    """
    if budget is not None and max(tokens) > budget:
        raise ValueError(
            f"a sample of {max(tokens)} tokens does not fit into data.tokens_per_microbatch {budget} (a pair counts "
            f"with its hard negatives): raise it, or lower data.max_length or the size of pictures"
        )
    sizes, weights = np.asarray(tokens, dtype=np.int64), np.asarray(costs, dtype=np.float64)
    assert weights.size % num_ranks == 0, (weights.size, num_ranks)
    ranks = _even_groups(np.arange(weights.size), weights, num_groups=num_ranks)
    if budget is None:
        packs = [_even_groups(np.asarray(own), weights, num_groups=len(own) // samples_per_pack) for own in ranks]
    else:
        packs = _budget_packs(ranks, sizes, budget, packs_multiple_of)
    return Assignment(
        packs=tuple(tuple(tuple(sorted(pack)) for pack in own) for own in packs),
        rank_costs=tuple(float(weights[list(own)].sum()) for own in ranks),
        pack_costs=tuple(float(weights[list(pack)].sum()) for own in packs for pack in own),
    )


def _above_mean(costs: Sequence[float]) -> float:
    mean = sum(costs) / len(costs)
    return max(costs) / mean - 1.0 if mean else 0.0


def _even_groups(indices: np.ndarray, weights: np.ndarray, *, num_groups: int) -> list[list[int]]:
    """Groups of equal number and nearly equal weight: largest first to the lightest group, then exchanges."""
    room = indices.size // num_groups
    order = indices[np.argsort(-weights[indices], kind="stable")]
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    lightest = [(0.0, number) for number in range(num_groups)]
    for index in order.tolist():
        load, number = heapq.heappop(lightest)
        groups[number].append(index)
        if len(groups[number]) < room:
            heapq.heappush(lightest, (load + float(weights[index]), number))
    _exchange(groups, weights)
    return groups


def _exchange(groups: list[list[int]], weights: np.ndarray) -> None:
    """Swap a sample of the heaviest group for one of the lightest while that evens them out."""
    loads = [float(weights[group].sum()) for group in groups]
    for _ in range(_MAX_SWAPS if len(groups) > 1 else 0):
        heavy, light = int(np.argmax(loads)), int(np.argmin(loads))
        gap = loads[heavy] - loads[light]
        moved = weights[groups[heavy]][:, None] - weights[groups[light]][None, :]
        # A swap leaves a gap of |gap - 2 x moved|.
        left = np.abs(gap - 2.0 * moved)
        i, j = np.unravel_index(int(np.argmin(left)), left.shape)
        if gap - left[i, j] <= 1e-9 * gap:
            return
        groups[heavy][i], groups[light][j] = groups[light][j], groups[heavy][i]
        loads[heavy] -= float(moved[i, j])
        loads[light] += float(moved[i, j])


def _budget_packs(ranks: list[list[int]], sizes: np.ndarray, budget: int, multiple: int) -> list[list[list[int]]]:
    """The fewest packs, equally many on every rank, that hold all within ``budget``."""
    number = max(-(-int(sizes[own].sum()) // budget) for own in ranks)
    number = -(-number // multiple) * multiple
    while True:
        if number > len(ranks[0]):
            raise ValueError(
                f"a rank would need {number} packs for its {len(ranks[0])} samples of a step (packs come in multiples "
                f"of {multiple}): raise global_batch_size or data.tokens_per_microbatch"
            )
        found = [_fit(own, sizes, budget, number) for own in ranks]
        if all(packs is not None for packs in found):
            return found
        number += multiple


def _fit(own: list[int], sizes: np.ndarray, budget: int, number: int) -> list[list[int]] | None:
    """``own`` in ``number`` packs within ``budget``, none of them empty; or None.

    Of nearly equal length if that fits, since all are padded to the longest; else by the fullest pack that still has
    room, which fits more often; else pack by pack with what fills it best.
    """
    for choose in (np.argmax, np.argmin):
        packs: list[list[int]] = [[] for _ in range(number)]
        room = np.full(number, budget, dtype=np.int64)
        for index in sorted(own, key=lambda i: (-sizes[i], i)):
            fits = np.flatnonzero(room >= sizes[index])
            if not fits.size:
                break
            chosen = int(fits[choose(room[fits])])
            packs[chosen].append(index)
            room[chosen] -= sizes[index]
        else:
            if all(packs):
                return packs
    return _filled_one_by_one(own, sizes, budget, number)


def _filled_one_by_one(own: list[int], sizes: np.ndarray, budget: int, number: int) -> list[list[int]] | None:
    """Each pack gets the largest sample that is left and those that fill the rest of it best (minimum bin slack:
    Gupta and Ho, "A new heuristic algorithm for the one-dimensional bin-packing problem", 1999); or None."""
    left = [(int(sizes[index]), index) for index in sorted(own, key=lambda i: (-sizes[i], i))]
    packs: list[list[int]] = []
    while left and len(packs) < number:
        (size, first), *others = left
        chosen = _best_sum([size for size, _ in others], budget - size)
        packs.append([first, *(others[place][1] for place in chosen)])
        left = [other for place, other in enumerate(others) if place not in chosen]
    if left:
        return None
    while len(packs) < number:
        # There are at least as many samples as packs, so that a pack of several is left.
        packs.append([max(packs, key=len).pop()])
    return packs


def _best_sum(sizes: list[int], room: int) -> set[int]:
    """Places in ``sizes`` whose sum is the largest that is at most ``room``.

    Bit ``n`` of ``reached`` says that ``n`` is the sum of some of the sizes seen so far.
    """
    reached, before = 1, []
    for size in sizes:
        before.append(reached)
        reached |= (reached << size) & ((1 << (room + 1)) - 1)
        if reached >> room:
            break
    total, chosen = reached.bit_length() - 1, set()
    for place in range(len(before) - 1, -1, -1):
        if not before[place] >> total & 1:
            chosen.add(place)
            total -= sizes[place]
    return chosen
