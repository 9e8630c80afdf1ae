"""Each 4-bit format stores what it says: few values a group, the error that its grid allows, less with compensation."""

import pytest
import torch

from vitlib.network import grids


@pytest.mark.parametrize("name", grids.ROWS)
def test_a_format_has_16_values_a_group_and_a_plausible_error(name):
    row = grids.ROWS[name]
    if row.missing:
        pytest.skip(row.missing)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    gram = torch.eye(256) if row.compensates else None
    found = row.round(weight, gram)
    assert found.shape == weight.shape and found.dtype == torch.float32
    assert max(len(group.unique()) for group in found.view(-1, 64)[:20]) <= 16
    assert 0.05 < ((found - weight).norm() / weight.norm()).item() < 0.15
    assert 4 < row.bits <= 4.5


@pytest.mark.parametrize("name", [name for name, row in grids.ROWS.items() if row.compensates])
def test_compensation_lowers_the_error_of_outputs(name):
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(32, 128, generator=draw)
    inputs = torch.randn(500, 8, generator=draw) @ torch.randn(8, 128, generator=draw)
    inputs += 0.1 * torch.randn(500, 128, generator=draw)
    plain, better = (
        (inputs @ (grids.ROWS[name].round(weight, gram) - weight).T).norm() for gram in (None, inputs.T @ inputs)
    )
    assert better < plain / 2


def test_a_group_of_equal_signs_keeps_zero_on_the_grid():
    weight = torch.rand(8, 64) + 1
    weight[:, 0] = 0
    found = grids.int4(weight, None, symmetric=False)
    assert found[:, 0].abs().max() == 0 and (found - weight).abs().max() <= 0.51 * 2 / 15
    assert torch.isfinite(grids.int4(torch.zeros(4, 64), None, symmetric=False)).all()
