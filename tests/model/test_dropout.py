"""Keyed dropout: statistics of its masks, and independence of the batch."""

import pytest
import torch

from mtrain.errors import UserError
from mtrain.model.dropout import Dropout, mix64, row_keys


def splitmix64(x):
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_mix64_is_splitmix64_in_wrapping_int64():
    values = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    expected = [splitmix64(v % 2**64) for v in values]
    assert [v % 2**64 for v in mix64(torch.tensor(values)).tolist()] == expected
    assert expected[0] == 0xE220A8397B1DCDAF  # the reference implementation's first output from seed 0


def masks(p, keys, units=256, layer=0):
    return Dropout(p, layer)(torch.ones(len(keys), units), keys) == 0


ROWS = {
    "consecutive rows": torch.arange(4096),
    "powers of two": 2 ** torch.arange(62),
    "multiples of 2**32": torch.arange(4096) << 32,
}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ROWS)
def test_the_drop_rate_is_p_and_units_and_rows_are_uncorrelated(name, p):
    dropped = masks(p, row_keys(0, 7, ROWS[name])).double()
    rows, units = dropped.shape
    assert abs(dropped.mean() - p) < 5 * (p * (1 - p) / dropped.numel()) ** 0.5
    centred = (dropped - p) / (p * (1 - p)) ** 0.5
    for x in (centred, centred.T):
        among, samples = x.shape[1], x.shape[0]
        correlation = (x.T @ x / samples)[~torch.eye(among, dtype=torch.bool)] * samples**0.5  # about N(0, 1)
        assert abs(correlation.square().mean() - 1) < 0.02 + 6 / min(rows, units)
        assert correlation.abs().max() < (7 if p == 0.5 else 15)


def test_masks_of_steps_seeds_and_layers_are_unrelated():
    rows = torch.arange(2000)
    variants = [masks(0.5, row_keys(s, k, rows), layer=layer) for s, k, layer in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    for i, a in enumerate(variants):
        for b in variants[:i]:
            assert abs((a == b).double().mean() - 0.5) < 5 * 0.5 / a.numel() ** 0.5


def test_raw_powers_of_two_as_keys_still_drop_at_the_rate():
    dropped = masks(0.5, 2 ** torch.arange(63), units=4096)
    assert abs(dropped.double().mean(1) - 0.5).max() < 5 * 0.5 / 4096**0.5


def test_a_rows_mask_does_not_depend_on_the_batch():
    keys = row_keys(3, 9, torch.arange(32))
    order = torch.randperm(32)
    assert torch.equal(masks(0.5, keys)[order[:5]], masks(0.5, keys[order[:5]]))


def test_kept_units_are_scaled_and_gradients_follow_the_mask():
    x = torch.randn(8, 3, 16, requires_grad=True)
    y = Dropout(0.25, 0)(x, row_keys(0, 0, torch.arange(8)))
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, x / 0.75, 0))
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.75)


def test_without_keys_it_is_ordinary_dropout_and_in_evaluation_the_identity():
    x, keys = torch.randn(8, 16), row_keys(0, 0, torch.arange(8))
    layer = Dropout(0.5, 0)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    assert torch.equal(y, torch.nn.functional.dropout(x, 0.5))
    assert torch.equal(layer.eval()(x, keys), x)
    assert torch.equal(Dropout(0.0, 0)(x, keys), x)


def test_no_rows_are_no_trouble():
    assert Dropout(0.5, 0)(torch.empty(0, 4), torch.empty(0, dtype=torch.int64)).shape == (0, 4)


def test_an_impossible_probability_is_refused():
    with pytest.raises(UserError, match="dropout is 1"):
        Dropout(1.0, 0)
