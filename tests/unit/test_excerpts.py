"""data/excerpts.py: microbatches laid out by hand equal a reckoning token by token, in every
slice."""

import numpy as np
import pytest
import torch

from data.batch import IGNORE
from data.excerpts import Excerpt, lay_out
from tests.documents import Documents


def excerpts(documents: Documents) -> list[Excerpt]:
    def read(number):
        return lambda start, count: documents.read(number, start, count)

    return [
        Excerpt(read(0), 0, 10, np.array([[3, 5], [9, 10]])),
        Excerpt(read(1), 4, 6, np.array([[5, 10]])),
        Excerpt(read(2), 0, 3, np.empty((0, 2), dtype=np.int64)),
    ]


def test_tokens_labels_and_positions_of_the_whole():
    documents = Documents((10, 12, 3))
    batch = lay_out(excerpts(documents), 24, [(0, 24)], padding=7, vocab_size=9999)
    assert batch.tokens.tolist() == [*range(10), *range(1004, 1010), *range(2000, 2003), *[7] * 5]
    assert batch.positions.tolist() == [*range(10), *range(6), *range(3), *range(5)]
    assert batch.cu_seqlens.tolist() == [0, 10, 16, 19, 24]
    labels = [IGNORE] * 24
    labels[2:4] = [3, 4]
    labels[8] = 9
    labels[10:15] = range(1005, 1010)
    assert batch.labels.tolist() == labels and batch.num_targets == 8


@pytest.mark.parametrize("total", [19, 24])
@pytest.mark.parametrize(
    "pieces", [[(0, 7)], [(7, 19)], [(3, 5), (14, 17)], [(9, 10), (15, 16)], [(18, 19)]]
)
def test_a_rank_reads_its_pieces_and_a_token_per_excerpt(pieces, total):
    documents = Documents((10, 12, 3))
    whole = lay_out(excerpts(documents), total, [(0, total)], padding=0, vocab_size=9999)
    part = lay_out(excerpts(documents), total, pieces, padding=0, vocab_size=9999)
    index = torch.cat([torch.arange(low, high) for low, high in pieces])
    for name in ("tokens", "labels", "positions"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[index]), name
    assert (
        torch.equal(part.cu_seqlens, whole.cu_seqlens)
        and part.num_targets == (part.labels != IGNORE).sum()
    )


def test_nothing_but_padding():
    batch = lay_out([], 6, [(0, 3)], padding=0, vocab_size=5)
    assert (
        batch.num_targets == 0
        and batch.cu_seqlens.tolist() == [0, 6]
        and batch.tokens.tolist() == [0] * 3
    )


def test_no_attention_to_speak_of_is_computed_for_long_padding():
    batch = lay_out(excerpts(Documents((10, 12, 3))), 5000, [(0, 5000)], padding=0, vocab_size=9999)
    assert batch.cu_seqlens.tolist() == [0, 10, 16, 19, 1043, 2067, 3091, 4115, 5000]
    assert batch.positions[-1] == 5000 - 4115 - 1


def test_ids_beyond_the_vocabulary_are_refused():
    with pytest.raises(
        ValueError, match="token id 1009 in the validation data: must be in .0, vocab_size = 1009."
    ):
        lay_out(excerpts(Documents((10, 12, 3))), 24, [(0, 24)], padding=0, vocab_size=1009)
