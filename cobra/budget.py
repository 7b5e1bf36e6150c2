"""Which rank gates are kept under a budget: the best selection there is, exactly.

    max Σ worth(kept)   where   Σ cost(kept) <= amount,   minimum <= rank <= maximum,   rank % multiple == 0,   tied ranks equal

Ranks are bought in steps: one gate, or `multiple` gates, in every group of a tie. Along a tie steps are worth less and less for
their cost, so all steps of one cost form one list, best first, and a selection is a count for each of the D costs. The greedy
selection buys the densest steps until one no longer fits; at the density where it stops, the price, every other one has

    worth(greedy) + price × left(greedy) - worth(counts)  =  Σ_d loss_d(count_d) + price × left(counts)        every term >= 0

so counts that lose more than the best selection known are ruled out. Nor are counts needed that differ from the greedy ones by
2 c steps, c the largest cost over their common divisor: some of these steps would cancel out, at no loss.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

UNITS = ("ranks", "parameters", "bytes", "flops")
OBJECTIVES = ("mass", "count")
TIES = {
    "qkv": r"(?:(?<=\.)|^)(?:to_|linear_|w)?(?:query|key|value|q|k|v)(?=(?:_proj|_lin|_global)?$)",
    "gate_up": r"(?:(?<=\.)|^)(?:(?:gate|up)(?=_proj$)|w[13]$|wi_[01]$)",
    "experts": r"(?:(?<=\.)|^)experts\.(?:expert_)?\d+",
}
SEARCHES = ((16, 100_000), (128, 200_000), (2**62, 2_000_000))  # steps from the greedy counts, combinations looked at

Limit = int | Mapping[str, int]
Values = Sequence[float] | np.ndarray | Tensor
Array = np.ndarray


@dataclass(frozen=True)
class Budget:
    """How much may be kept, counted in what, and what the ranks must keep to.

    unit: "ranks", "parameters", "bytes" or "flops"
    minimum, maximum: ranks of every group, or a mapping from names or name endings (the longest that fits holds) to ranks,
        which leaves the others free; rounded to the multiple, up and down
    multiple: every rank is a multiple of this, 0 included
    tied: "qkv", "gate_up", "experts" or regular expressions; groups whose names are equal once the match is taken out get equal
        ranks
    objective: what a kept gate is worth. "mass": value × cost, the expected number of active parameters, bytes, …; the order of
        the gates then does not depend on what they cost. "count": its value wherever it sits, so that narrow layers win
    """

    amount: int
    unit: str = "ranks"
    minimum: Limit = 0
    maximum: Limit | None = None
    multiple: int = 1
    tied: tuple[str, ...] = ()
    objective: str = "mass"

    def __post_init__(self):
        if isinstance(self.tied, list):
            object.__setattr__(self, "tied", tuple(self.tied))
        _require(is_whole(self.amount), f"amount={self.amount!r}", "an integer >= 0")
        _require(is_whole(self.multiple) and self.multiple > 0, f"multiple={self.multiple!r}", "an integer >= 1")
        for name, choices in (("unit", UNITS), ("objective", OBJECTIVES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, choices))}")
        for name in ("minimum", "maximum"):
            limit = getattr(self, name)
            if isinstance(limit, Mapping):
                object.__setattr__(self, name, limit := dict(limit))
            ranks = limit.values() if isinstance(limit, dict) else [limit]
            fits = all(map(is_whole, ranks)) or (limit is None and name == "maximum")
            _require(fits, f"{name}={limit!r}", "an integer >= 0, or a mapping from names to such")
        is_names = isinstance(self.tied, tuple) and all(isinstance(pattern, str) for pattern in self.tied)
        _require(is_names, f"tied={self.tied!r}", f"a tuple of regular expressions or of {', '.join(map(repr, TIES))}")
        for pattern in self.tied:
            try:
                re.compile(TIES.get(pattern, pattern))
            except re.error as error:
                raise ValueError(f"tied={pattern!r} is not a regular expression: {error}") from error

    @classmethod
    def of(cls, budget: int | Budget) -> Budget:
        """A number means ranks."""
        return budget if isinstance(budget, cls) else cls(budget)

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "tied": list(self.tied)}

    @classmethod
    def from_dict(cls, value: Mapping) -> Budget:
        """From `to_dict`; fields with a default may be left out. Raises ValueError for unknown fields and a missing amount."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in value:
            if name not in known:
                raise ValueError(f"a budget has no field {name!r}{_close(name, known)}")
        if "amount" not in value:
            raise ValueError("a budget needs the field 'amount'")
        return cls(**value)


@dataclass(frozen=True)
class Allocation:
    """What is kept, and how much of the budget that takes.

    kept: per group, the indices of the kept gates, ascending
    spent, amount: in `unit`
    step: the cheapest step that is still open, 0 where everything is kept
    optimal: proven that nothing else within the budget is worth more
    """

    kept: tuple[tuple[int, ...], ...]
    spent: int
    amount: int
    unit: str
    step: int
    optimal: bool

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(map(len, self.kept))

    def __str__(self) -> str:
        left = self.amount - self.spent
        why = f": {left:,} left, fewer than the cheapest step of {self.step:,}" if left else ""
        proof = "" if self.optimal else "; the best found, not proven to be the best there is"
        return f"{self.spent:,} of {self.amount:,} {self.unit}{why}{proof}"


def allocate(
    names: Sequence[str],
    values: Sequence[Values],
    costs: Sequence[int],
    budget: Budget,
    finer: Sequence[Values] | None = None,
) -> Allocation:
    """The gates that are kept: of all selections within the budget one that is worth most.

    Within a group the best gates are kept, in a tie the j-th best of all groups together. Equal gates are taken one index at a
    time round the groups, so that equal values give even ranks. Of selections worth the same the one that spends more is taken,
    then the one whose steps come earlier in their groups. What is left is less than any step that is still open.

    names: of the G groups
    values: per group, (r,) finite, >= 0, in any order
    costs: per group, what one rank costs in the budget's unit
    finer: per group, (r,) any numbers: of gates of one value those with the larger ones come first, instead of in turn

    Raises ValueError for a budget above the capacity or below the minima, limits that exclude each other, names and patterns
    that no group has, and values that are not finite and >= 0.
    """
    flat, sizes, cost = _read(names, values, costs)
    tie = _ties(names, budget.tied)
    low, high = _limits(names, sizes, tie, budget)
    step_cost = np.zeros_like(high)
    np.add.at(step_cost, tie, cost * budget.multiple)
    needed, capacity = int(low @ step_cost), int(high @ step_cost)
    if not needed <= budget.amount <= capacity:
        above = "capacity", "raise r_max or lower the budget"
        what, fix = above if budget.amount > capacity else ("minima", "lower the minimum or raise the budget")
        expected = f"expected {needed} to {capacity} {budget.unit}, the {what} of {len(names)} groups"
        raise ValueError(f"budget={budget.amount}: {expected}; {fix}")

    group = np.repeat(np.arange(len(sizes)), sizes)
    index = np.arange(len(flat)) - (np.cumsum(sizes) - sizes)[group]
    late = np.zeros_like(flat) if finer is None else _behind(flat, -np.concatenate([np.zeros(0), *map(np.asarray, finer)]))
    best = _sorted(group, _ranked(flat, late))  # group after group, the best first, equal ones by index

    # every tie's steps side by side; `index` counts places now, since `best` stays within its groups
    owner, first = np.repeat(np.arange(len(high)), high), np.cumsum(high) - high
    number = np.arange(len(owner)) - first[owner]
    used = index // budget.multiple < high[tie[group]]
    slot = (first[tie[group]] + index // budget.multiple)[used]
    weight = cost if budget.objective == "mass" else np.ones_like(cost)
    density = _means(flat[best][used], weight[group][used], slot, len(owner))
    if budget.objective == "count":
        density /= (step_cost / (np.bincount(tie) * budget.multiple))[owner]
    position = number.copy()
    if budget.multiple == 1:  # a gate bought alone comes as early as its index says
        alone = (np.bincount(tie) == 1)[tie[group[used]]]
        position[slot[alone]] = index[best][used][alone]

    order = np.flatnonzero(number >= low[owner])
    late = _means(late[best][used], weight[group][used], slot, len(owner))
    order = order[_sorted(_ranked(density[order], late[order]), position[order])]
    position = position + (int(position.max(initial=0)) + 1) * _behind(density, late)  # of one worth, finer values go first
    kinds = np.unique(step_cost[high > low])
    kind = np.searchsorted(kinds, step_cost)[owner[order]]
    taken, optimal = _select(density[order], kind, position[order], kinds, budget.amount - needed)
    bought = low + np.bincount(owner[order[taken]], minlength=len(low))
    ranks = bought[tie] * budget.multiple
    indices = index[np.sort(best[index < ranks[group]])].tolist()
    ends = np.cumsum(ranks).tolist()
    kept = tuple(tuple(indices[end - rank : end]) for end, rank in zip(ends, ranks.tolist(), strict=True))
    step = min(step_cost[bought < high].tolist(), default=0)
    return Allocation(kept, int(bought @ step_cost), budget.amount, budget.unit, step, optimal)


@dataclass(frozen=True)
class _Class:
    """The steps of one cost, and what it does to have 0, 1, … w of them.

    start: how many the greedy selection has
    loss: (w + 1,) Σ |density - price| × cost of the steps between a count and `start`
    lateness: (w + 1,) Σ position × cost of the steps of a count, fp64
    """

    cost: int
    start: int
    loss: Array
    lateness: Array

    @classmethod
    def of(cls, cost: int, start: int, density: Array, position: Array, price: float) -> _Class:
        gain = (density - price) * cost
        fewer, more = np.cumsum(gain[:start][::-1])[::-1], np.cumsum(-gain[start:])
        lateness = np.cumsum(position * float(cost))
        return cls(cost, start, np.concatenate((fewer, [0.0], more)), np.concatenate(([0.0], lateness)))

    def window(self, gap: float) -> tuple[int, int]:
        """The fewest and the most steps that lose no more than the gap."""
        inside = np.flatnonzero(self.loss <= gap)
        return int(inside[0]), int(inside[-1])


def _select(density: Array, kind: Array, position: Array, kinds: Array, amount: int) -> tuple[Array, bool]:
    """Which steps are taken, and whether that is proven to be worth most.

    density, kind, position: (S,) of every step in the greedy order; `kinds` (D,) are the costs
    """
    divisor = int(np.gcd.reduce(kinds)) or 1
    costs, amount = kinds // divisor, amount // divisor
    total = np.cumsum(costs[kind])
    bought = int(np.searchsorted(total, amount, side="right"))
    left = amount - int(total[bought - 1]) if bought else amount
    if bought == len(kind) or left == 0 or len(costs) == 1:
        return np.arange(bought), True
    price = float(density[bought])
    members = [np.flatnonzero(kind == d) for d in range(len(costs))]
    classes = [
        _Class.of(c, int(np.searchsorted(m, bought)), density[m], position[m], price)
        for c, m in zip(costs.tolist(), members, strict=True)
    ]
    found = (price * left, left, np.inf, [c.start for c in classes])
    for reach, work in SEARCHES:
        found, complete = _search(classes, left, price, found, reach, work)
        if complete or found[:2] == (0, 0):
            break
    loss, left, _, counts = found
    for d, c in enumerate(classes):  # buys nothing unless the search was cut short
        extra = min(left // c.cost, len(c.loss) - 1 - counts[d])
        counts[d], left = counts[d] + extra, left - extra * c.cost
    return np.concatenate([m[:n] for m, n in zip(members, counts, strict=True)]), complete or loss == 0


def _search(classes: list[_Class], left: int, price: float, found: tuple, reach: int, work: int) -> tuple[tuple, bool]:
    """The best selection that loses no more than the one found before.

    Class after class, the counts within `reach` of the greedy ones join all selections of the classes before. The class with
    the most counts comes last and takes what still fits.

    left: what the greedy selection leaves
    found, out: (loss against the bound, what is left, lateness, counts); out: also whether none had to be passed over
    work: combinations that are looked at, at most
    """
    near = 2 * max(c.cost for c in classes)
    rounding = 1e-15 * price * (left + sum(c.start * c.cost for c in classes))  # losses that differ by less are equal
    gap = found[0] + rounding
    windows = [c.window(gap) for c in classes]
    order = sorted(range(len(classes)), key=lambda d: windows[d][1] - windows[d][0])
    spent, loss, lateness = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    counts, complete = np.zeros((1, 0), np.int64), True
    for d in order[:-1]:
        c, (low, high) = classes[d], windows[d]
        complete &= reach >= min(near, max(c.start - low, high - c.start))
        low, high = max(low, c.start - min(reach, near)), min(high, c.start + min(reach, near))
        state = np.lexsort((lateness, loss, spent))
        state = state[np.diff(spent[state], prepend=spent[state[0]] - 1) > 0]  # the best of those that spend the same
        room = max(1, work // (len(classes) * (high - low + 1)))
        if len(state) > room:
            state = state[np.lexsort((np.abs(spent[state]), loss[state]))[:room]]
            complete = False
        total = loss[state, None] + c.loss[low : high + 1]
        row, count = np.nonzero(total <= gap)
        state, loss, count = state[row], total[row, count], count + low
        spent = spent[state] + (count - c.start) * c.cost
        lateness = lateness[state] + c.lateness[count]
        counts = np.column_stack((counts[state], count))
    c, (low, high) = classes[order[-1]], windows[order[-1]]
    count = np.minimum(c.start + (left - spent) // c.cost, high)
    fits = np.flatnonzero(count >= low)
    count = count[fits]
    remaining = left - spent[fits] - (count - c.start) * c.cost
    loss = loss[fits] + c.loss[count] + price * remaining
    lateness = lateness[fits] + c.lateness[count]
    if loss.min() > gap:
        return found, complete
    equal = np.flatnonzero(loss <= loss.min() + rounding)
    at = equal[np.lexsort((lateness[equal], remaining[equal]))[0]]
    chosen = np.empty(len(classes), np.int64)
    chosen[order] = [*counts[fits[at]], count[at]]
    return (float(loss[at]), int(remaining[at]), float(lateness[at]), chosen.tolist()), complete


def _means(value: Array, weight: Array, slot: Array, slots: int) -> Array:
    """(slots,) weighted mean of the values in each slot; of equal ones that value, to the bit.

    value, weight, slot: (n,); no slot is empty
    """
    least, largest = np.full(slots, np.inf), np.full(slots, -np.inf)
    np.minimum.at(least, slot, value)
    np.maximum.at(largest, slot, value)
    total = np.bincount(slot, weights=value * weight, minlength=slots)
    mean = total / np.bincount(slot, weights=weight, minlength=slots)
    return np.clip(mean, least, largest)  # a mean is within them but for its rounding


def _ranked(x: Array, late: Array) -> Array:
    """(n,) 0 for the largest value, 1 for the next, …, of equal values for the least late; equal pairs have equal numbers."""
    order = np.lexsort((late, -x)) if late.any() else np.argsort(-x)  # which is faster
    ranked = np.zeros(len(x), np.int64)
    ranked[order[1:]] = np.cumsum((x[order[1:]] != x[order[:-1]]) | (late[order[1:]] != late[order[:-1]]))
    return ranked


def _behind(x: Array, late: Array) -> Array:
    """(n,) 0 for the least late of those with equal x, 1 for the next, …"""
    if not late.any():
        return np.zeros(len(x), np.int64)
    ranked, value = _ranked(x, late), _ranked(x, np.zeros_like(x))
    first = np.full(len(x), len(x))
    np.minimum.at(first, value, ranked)
    return ranked - first[value]


def _sorted(major: Array, minor: Array) -> Array:
    """Indices in the order of two keys, integers >= 0, then of the index itself; faster than stable sorts of fp64."""
    n = len(major)
    return np.argsort((major * (int(minor.max(initial=0)) + 1) + minor) * n + np.arange(n))


def _read(names: Sequence[str], values: Sequence[Values], costs: Sequence[int]) -> tuple[Array, Array, Array]:
    """All values (n,) fp64; the groups' sizes and costs, (G,)."""
    if not len(names) == len(values) == len(costs):
        raise ValueError(f"{len(names)} names, {len(values)} groups of values, {len(costs)} costs: expected as many of each")
    arrays = [v.detach().double().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v, np.float64) for v in values]
    for name, array, cost in zip(names, arrays, costs, strict=True):
        _require(array.ndim == 1, f"values of {name} have shape {array.shape}", "one dimension, a value for each gate")
        whole = isinstance(cost, int | np.integer) and not isinstance(cost, bool)
        _require(whole and cost > 0, f"cost of {name} {cost!r}", "an integer >= 1")
    flat = np.concatenate([np.zeros(0), *arrays])
    sizes = np.array([len(array) for array in arrays], np.int64)
    bad = np.flatnonzero(~((flat >= 0) & (flat < np.inf)))
    if len(bad):
        name = names[int(np.searchsorted(np.cumsum(sizes), bad[0], side="right"))]
        first = f"{len(bad)} gate values are not finite and >= 0, the first {flat[bad[0]]} of {name}"
        raise ValueError(f"{first}: give probabilities or shares; if the training diverged, lower the learning rate")
    total = sum(int(cost) * len(array) for cost, array in zip(costs, arrays, strict=True))
    _require(total < 2**62, f"all gates together cost {total:,}", "less than 2**62; count in a larger unit")
    return flat, sizes, np.array(costs, np.int64)


def _ties(names: Sequence[str], patterns: tuple[str, ...]) -> Array:
    """(G,) the number of the tie that each group is in, in the order of their first groups."""
    root = list(range(len(names)))

    def find(g: int) -> int:
        while root[g] != g:
            g = root[g]
        return g

    for pattern in patterns:
        expression, firsts = re.compile(TIES.get(pattern, pattern)), {}
        for g, name in enumerate(names):
            if match := expression.search(name):
                pair = find(g), find(firsts.setdefault(name[: match.start()] + name[match.end() :], g))
                root[max(pair)] = min(pair)
        if not firsts:
            close = "; fused projections are one group already" if pattern in TIES else _close(pattern, [*TIES, *names])
            raise ValueError(f"tied={pattern!r} matches none of the {len(names)} groups{close}")
    return np.unique([find(g) for g in range(len(names))], return_inverse=True)[1]


def _limits(names: Sequence[str], sizes: Array, tie: Array, budget: Budget) -> tuple[Array, Array]:
    """(T,) fewest and most steps of every tie."""
    minimum = _per_group(names, "minimum", budget.minimum, np.zeros_like(sizes))
    maximum = np.minimum(_per_group(names, "maximum", budget.maximum, sizes), sizes)
    fewest, most = -(-minimum // budget.multiple), maximum // budget.multiple
    ties = int(tie.max(initial=-1)) + 1
    low, high = np.zeros(ties, np.int64), np.full(ties, np.iinfo(np.int64).max)
    np.maximum.at(low, tie, fewest)
    np.minimum.at(high, tie, most)
    for t in np.flatnonzero(low > high)[:1]:
        members = np.flatnonzero(tie == t)
        a, b = members[fewest[members].argmax()], members[most[members].argmin()]
        owner = "it" if a == b else f"{names[b]}, tied to it,"
        why = f"({sizes[b]} gates, maximum {maximum[b]}, multiple {budget.multiple}); lower the minimum or raise r_max"
        raise ValueError(f"minimum={minimum[a]} of {names[a]}: {owner} can have {high[t] * budget.multiple} ranks {why}")
    return low, high


def _per_group(names: Sequence[str], field: str, limit: Limit | None, default: Array) -> Array:
    """(G,) ranks."""
    if not isinstance(limit, Mapping):
        return default if limit is None else np.full_like(default, limit)
    ranks, unknown = default.copy(), set(limit)
    for g, name in enumerate(names):
        parts = name.split(".")
        fitting = [ending for k in range(len(parts)) if (ending := ".".join(parts[k:])) in limit]
        unknown -= set(fitting)
        if fitting:
            ranks[g] = limit[fitting[0]]
    for key in sorted(unknown, key=str)[:1]:
        raise ValueError(f"{field} names {key!r}, which no group has{_close(key, names)}")
    return ranks


def _close(word: object, names: Sequence[str]) -> str:
    """Names, or endings of names, that may have been meant."""
    known = sorted({".".join(name.split(".")[-depth:]) for name in names for depth in (1, 2, 99)})
    close = difflib.get_close_matches(str(word), known, n=3, cutoff=0.4) or sorted(known, key=len)[:6]
    return f" (did you mean {', '.join(map(repr, close))}?)"


def is_whole(value: object) -> bool:
    """Whether a value is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(holds: bool, given: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{given}: expected {expected}")
