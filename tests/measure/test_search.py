"""The search equals the enumeration of all choices, with and without pairs, in both directions."""

import itertools

import numpy as np
import pytest

from vitlib.measure import search


def everything(items: int, options: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(options), repeat=items))


def toy(seed: int, items: int = 6, options: int = 3):
    """Costs that fall and sizes that rise with the option, over several powers of ten, and pairs of either sign."""
    rng = np.random.default_rng(seed)
    cost = np.sort(10 ** rng.uniform(-6, -1, (items, options)))[:, ::-1]
    size = np.sort(rng.uniform(1, 16, (items, options))) * rng.integers(1, 5, (items, 1))
    pairs = [(i, j, 0, 0, rng.normal() * 0.3 * cost[[i, j], 0].sum()) for i in range(0, items, 2) for j in (i + 1,)]
    pairs.append((0, 3, 1, 0, 0.02))
    return cost, size, pairs


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("with_pairs", [False, True])
def test_the_choice_equals_brute_force(seed, with_pairs):
    cost, size, pairs = toy(seed)
    pairs = pairs if with_pairs else []
    all_choices = everything(*cost.shape)
    costs = np.array([search.total(cost, one, pairs) for one in all_choices])
    sizes = np.array([search.total(size, one) for one in all_choices])
    for share in (0.02, 0.3, 0.6, 1.0):
        budget = sizes.min() + share * (sizes.max() - sizes.min())
        found = search.choose(cost, size, budget, goal_pairs=pairs)
        assert search.total(size, found) <= budget * (1 + 1e-6)
        assert search.total(cost, found, pairs) == pytest.approx(costs[sizes <= budget].min(), rel=1e-6, abs=1e-10)
        limit = costs.min() + share * (costs.max() - costs.min())
        least = search.choose(size, cost, limit, use_pairs=pairs)
        assert search.total(cost, least, pairs) <= limit + 1e-7 * abs(costs).max()
        assert search.total(size, least) == pytest.approx(sizes[costs <= limit].min(), rel=1e-6)


def test_what_fits_no_budget_is_an_error():
    cost, size, _ = toy(0)
    with pytest.raises(ValueError, match="no choice fits"):
        search.choose(cost, size, size.min(axis=1).sum() * 0.99)
