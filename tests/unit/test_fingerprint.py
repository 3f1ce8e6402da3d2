"""Fingerprints of tensors, and which copy a vote calls wrong."""

import pytest
import torch

from pretrain.guards import fingerprint as fingerprint_module
from pretrain.guards.fingerprint import fingerprint
from pretrain.guards.weight_check import describe_flips, is_suspect

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def by_hand(tensor: torch.Tensor) -> int:
    """The same sum in Python's integers."""
    width = {torch.bfloat16: torch.int16}.get(tensor.dtype, torch.int32)
    values = tensor.reshape(-1).view(width).tolist()
    factors = [(i * 0x9E3779B97F4A7C15) % 2**64 | 1 for i in range(len(values))]
    total = sum(value * factor for value, factor in zip(values, factors, strict=True)) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_weighted_sum_of_the_bits(dtype, monkeypatch):
    tensor = torch.randn(7, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert int(fingerprint(tensor)) == by_hand(tensor)
    monkeypatch.setattr(fingerprint_module, "CHUNK_ELEMENTS", 10)
    assert int(fingerprint(tensor)) == by_hand(tensor), "in chunks"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flip_of_one_bit_is_seen(dtype):
    tensor = torch.randn(40, generator=torch.Generator().manual_seed(2)).to(dtype)
    before = int(fingerprint(tensor))
    data = tensor.view(torch.uint8)
    for byte in range(data.numel()):
        for bit in range(8):
            data[byte] ^= 1 << bit
            assert int(fingerprint(tensor)) != before, (byte, bit)
            data[byte] ^= 1 << bit
    assert int(fingerprint(tensor)) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_changed_signs_two_zeros_and_an_exchange_are_seen(dtype):
    tensor = torch.randn(8, generator=torch.Generator().manual_seed(3)).to(dtype)
    before = int(fingerprint(tensor))
    signs = tensor.clone()
    signs[[2, 5]] *= -1
    exchanged = tensor[[1, 0, 2, 3, 4, 5, 6, 7]]
    assert int(fingerprint(signs)) != before
    assert int(fingerprint(exchanged)) != before
    zeros = torch.zeros(4, dtype=dtype)
    assert int(fingerprint(-zeros)) != int(fingerprint(zeros))


def test_a_tensor_that_is_not_contiguous_and_an_empty_one_have_one_too():
    tensor = torch.arange(12.0).view(3, 4)
    assert int(fingerprint(tensor.T)) == int(fingerprint(tensor.T.contiguous()))
    assert int(fingerprint(tensor[:0])) == 0


def test_a_majority_names_the_wrong_copy_and_two_are_both_suspects():
    assert [is_suspect([7, 7, 7], own) for own in range(3)] == [False] * 3
    assert [is_suspect([7, 8, 7], own) for own in range(3)] == [False, True, False]
    assert [is_suspect([7, 8], own) for own in range(2)] == [True, True]
    assert [is_suspect([7, 7, 8, 8], own) for own in range(4)] == [True] * 4


def test_a_rank_whose_tensor_changed_is_named_and_its_copies_are_not():
    text = describe_flips(
        [
            ("rank 0 on a", [], ["model.x"]),
            ("rank 1 on b", ["model.x"], ["model.x"]),
            ("rank 2 on c", [], ["model.y"]),
        ]
    )
    assert "rank 0" not in text
    assert "rank 1 on b: model.x changed since the last update wrote it" in text
    assert "rank 2 on c: model.y is not the same as its copies" in text
