"""One option for each of many items, so that the total cost is least within a budget: a multiple-choice knapsack.

Solved exactly as an integer programme by HiGHS (Huangfu & Hall, Math. Prog. Comp. 10, 2018) through SciPy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy  # its submodules load when first used, which takes seconds
from numpy.typing import ArrayLike, NDArray

Pair = tuple[int, int, int, int, float]  # items i and j, their options a and b, and the excess cost of both


def total(cost: ArrayLike, options: ArrayLike, pairs: Sequence[Pair] = ()) -> float:
    """The cost of choosing option `options[i]` (n,) for each item, `cost` (n, k), with the excess of pairs."""
    cost, options = np.asarray(cost, dtype=np.float64), np.asarray(options)
    excess = sum(extra for i, j, a, b, extra in pairs if options[i] == a and options[j] == b)
    return float(cost[np.arange(len(options)), options].sum() + excess)


def choose(
    goal: ArrayLike, use: ArrayLike, limit: float, *, goal_pairs: Sequence[Pair] = (), use_pairs: Sequence[Pair] = ()
) -> NDArray[np.intp]:
    """The options (n,) of least total `goal` whose `use` adds up to at most `limit`; both (n, k).

    Pairs add to the one or to the other. A pair has a variable of its own: between x + y - 1 and the smaller of x and
    y, so it is the product of two choices. ValueError where no choice fits the limit.
    """
    goal, use = (np.asarray(values, dtype=np.float64) for values in (goal, use))
    (n, k), pairs = goal.shape, [*goal_pairs, *use_pairs]
    width = n * k + len(pairs)
    extra = np.array([pair[-1] for pair in pairs], dtype=np.float64)
    in_goal, in_use = (extra, 0 * extra) if goal_pairs else (0 * extra, extra)
    one_each = np.zeros((n, width))
    for item in range(n):
        one_each[item, item * k : (item + 1) * k] = 1
    both = np.zeros((3 * len(pairs), width))
    for row, (i, j, a, b, _) in enumerate(pairs):
        first, second, own = i * k + a, j * k + b, n * k + row
        both[3 * row, [first, second, own]] = 1, 1, -1  # x + y - z <= 1
        both[3 * row + 1, [own, first]] = both[3 * row + 2, [own, second]] = 1, -1  # z <= x, z <= y
    scale = np.abs(use).sum(axis=0).max() or 1.0  # tolerances of the solver are absolute
    weight = 1e3 / (np.abs(goal).max() or 1.0)
    spent = np.concatenate([use.ravel(), in_use]) / scale
    constraints = [
        scipy.optimize.LinearConstraint(one_each, 1, 1),
        scipy.optimize.LinearConstraint(spent[None], -np.inf, limit / scale * (1 + 1e-9)),
    ]
    if pairs:
        constraints.append(scipy.optimize.LinearConstraint(both, -np.inf, np.tile([1, 0, 0], len(pairs))))
    kinds = np.concatenate([np.ones(n * k), np.zeros(len(pairs))])
    found = scipy.optimize.milp(
        weight * np.concatenate([goal.ravel(), in_goal]),
        integrality=kinds,
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 1e-9},
    )
    if found.x is None:
        raise ValueError(f"no choice fits the limit {limit:g}: {found.message}")
    return found.x[: n * k].reshape(n, k).argmax(axis=1)
