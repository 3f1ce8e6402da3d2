"""Batches: every token once, slices that concatenate, labels and boundaries where they belong."""

import numpy as np
import pytest
import torch

from data.batch import IGNORE, Batch, Sample, read_batch
from data.digest import DIGEST_BITS, digest
from data.loader import Loader
from data.mixture import fresh_mixture
from data.stream import DocumentStream
from tests.documents import Documents, windows

LENGTHS = [5, 1, 16, 3, 1, 1, 40, 2, 7, 8, 33, 11]
EPOCH = sum(LENGTHS)  # 128


@pytest.fixture
def stream():
    return DocumentStream(Documents(LENGTHS), np.arange(len(LENGTHS)), seed=5)


def expected_batch(stream, starts, seq_length, masking):
    """The whole microbatch, token by token, from the definition."""
    tokens = []
    labels = []
    positions = []
    cuts = []
    for start in starts:
        for i in range(seq_length):
            token, following = stream.read(start + i, 2).tolist()
            begins = i == 0 or masking and (token % 1000 == 0)
            cuts += [len(tokens)] if begins else []
            positions.append(0 if begins else positions[-1] + 1)
            tokens.append(token)
            labels.append(IGNORE if masking and following % 1000 == 0 else following)
    return tokens, labels, positions, cuts + [len(tokens)]


def cut(total, rank, size):
    """The contiguous piece of one of `size` ranks."""
    return [(rank * total // size, (rank + 1) * total // size)]


@pytest.mark.parametrize("masking", [True, False])
@pytest.mark.parametrize(
    "starts, seq_length",
    [
        ([0], 16),
        ([3], 1),
        ([100], 64),
        ([120], 24),
        ([0, 16], 16),
        ([5, 77, 40], 8),
        ([250, 256], 6),
        ([0], 300),
    ],
)
def test_whole_microbatch(stream, starts, seq_length, masking):
    batch = read_batch(windows(stream, starts, seq_length), seq_length, document_masking=masking)
    tokens, labels, positions, cuts = expected_batch(stream, starts, seq_length, masking)
    assert batch.tokens.tolist() == tokens and batch.labels.tolist() == labels
    assert batch.positions.tolist() == positions and batch.cu_seqlens.tolist() == cuts
    assert batch.num_targets == sum(label != IGNORE for label in labels)
    assert [t.dtype for t in (batch.tokens, batch.labels, batch.positions, batch.cu_seqlens)] == [
        torch.int64,
        torch.int64,
        torch.int64,
        torch.int32,
    ]
    assert all(
        t.is_contiguous() for t in (batch.tokens, batch.labels, batch.positions, batch.cu_seqlens)
    )


@pytest.mark.parametrize("masking", [True, False])
@pytest.mark.parametrize(
    "starts, seq_length, cp_size",
    [
        ([0], 64, 2),
        ([0], 64, 8),
        ([96], 64, 64),
        ([7, 100, 3], 8, 3),
        ([7, 100], 9, 6),
        ([0, 50], 5, 5),
        ([0], 12, 1),
    ],
)
def test_slices_concatenate_to_the_whole(stream, starts, seq_length, cp_size, masking):
    whole = read_batch(windows(stream, starts, seq_length), seq_length, document_masking=masking)
    slices = [
        read_batch(
            windows(stream, starts, seq_length),
            seq_length,
            cut(len(starts) * seq_length, rank, cp_size),
            document_masking=masking,
        )
        for rank in range(cp_size)
    ]
    for name in ("tokens", "labels", "positions"):
        assert torch.equal(
            torch.cat([getattr(part, name) for part in slices]), getattr(whole, name)
        ), name
    assert all(torch.equal(part.cu_seqlens, whole.cu_seqlens) for part in slices)
    assert sum(part.num_targets for part in slices) == whole.num_targets


def test_a_rank_reads_only_its_slice():
    reader = Documents([4096])
    stream = DocumentStream(reader, np.array([0]), seed=0)
    read_batch(windows(stream, [0, 1024], 1024), 1024, cut(2048, 3, 8))
    assert reader.tokens_read == 2048 // 8 + 1
    reader.tokens_read = 0
    # Half of the second sample and the whole third.
    read_batch(windows(stream, [0, 1024, 2048], 512), 512, cut(1536, 1, 2))
    assert reader.tokens_read == 768 + 2


def test_no_attention_to_speak_of_is_computed_for_long_padding(stream):
    batch = read_batch([Sample(stream, np.array([[0, 3]]))] * 2, 2000)
    assert (
        batch.cu_seqlens.diff().max() == 1024
        and batch.cu_seqlens[-1] == 4000
        and 2000 in batch.cu_seqlens
    )
    assert batch.num_targets <= 6


def test_two_pieces_of_one_rank():
    """What two levels of context parallelism give a rank: two ranges, each with its own positions
    and labels."""
    stream = DocumentStream(Documents([7, 20, 13]), np.arange(3), seed=0)
    whole = read_batch(windows(stream, [0, 24], 16), 16)
    for pieces in ([(0, 8), (24, 32)], [(8, 16), (16, 24)], [(3, 5), (10, 20)]):
        part = read_batch(windows(stream, [0, 24], 16), 16, pieces)
        for name in ("tokens", "labels", "positions"):
            values = getattr(whole, name)
            assert torch.equal(getattr(part, name), torch.cat([values[a:b] for a, b in pieces])), (
                name,
                pieces,
            )
        assert torch.equal(part.cu_seqlens, whole.cu_seqlens)
        assert part.num_targets == int((part.labels != IGNORE).sum())


def test_label_at_the_edge_of_slice_and_sample():
    stream = DocumentStream(Documents([8, 8]), np.array([0]), seed=0)
    left, right = (read_batch(windows(stream, [0], 6), 6, cut(6, rank, 2)) for rank in range(2))
    assert left.labels.tolist() == [1, 2, 3]  # 3 is the first token of the other rank
    assert right.labels.tolist() == [4, 5, 6]  # 6 is outside the sample, of the same document
    following = read_batch(windows(stream, [6], 6), 6)
    assert following.tokens.tolist() == [6, 7, 0, 1, 2, 3] and following.positions.tolist() == [
        0,
        1,
        0,
        1,
        2,
        3,
    ]
    assert following.labels.tolist() == [
        7,
        IGNORE,
        1,
        2,
        3,
        4,
    ]  # the same document again is another document
    assert read_batch(windows(stream, [0], 8), 8).labels.tolist()[-1] == IGNORE
    assert read_batch(windows(stream, [0], 8), 8).cu_seqlens.tolist() == [0, 8]
    assert read_batch(windows(stream, [0], 8), 8, document_masking=False).labels.tolist()[-1] == 0


def test_one_token_documents_have_no_targets():
    stream = DocumentStream(Documents([1, 1, 1]), np.arange(3), seed=0)
    batch = read_batch(windows(stream, [0], 6), 6)
    assert batch.cu_seqlens.tolist() == list(range(7)) and batch.num_targets == 0
    assert batch.positions.tolist() == [0] * 6


def test_without_masking_no_token_is_a_target_twice():
    """A span that begins within its document has its first token's label elsewhere, at the end of
    the span before."""
    stream = DocumentStream(Documents([4, 6, 3]), None, seed=0)
    begins = {
        int(document): int(start)
        for document, start in zip(
            stream.spans(0, 13)[0], np.cumsum([0, *stream.spans(0, 13)[2][:-1]]), strict=True
        )
    }
    sample = Sample(stream, np.array([[begins[0], 4], [begins[1] + 2, 4], [begins[2], 2]]))
    batch = read_batch([sample], 12, document_masking=False)
    assert batch.tokens.tolist() == [0, 1, 2, 3, 1002, 1003, 1004, 1005, 2000, 2001, 0, 0]
    assert batch.labels.tolist() == [
        1,
        2,
        3,
        IGNORE,
        1003,
        1004,
        1005,
        2000,
        2001,
        2002,
        IGNORE,
        IGNORE,
    ]
    assert batch.cu_seqlens.tolist() == [0, 10, 12] and batch.positions.tolist() == [
        *range(10),
        0,
        1,
    ]
    for cut_at in range(1, 12):
        parts = [
            read_batch([sample], 12, [piece], document_masking=False)
            for piece in ((0, cut_at), (cut_at, 12))
        ]
        assert torch.cat([part.labels for part in parts]).tolist() == batch.labels.tolist(), cut_at
        assert torch.cat([part.tokens for part in parts]).tolist() == batch.tokens.tolist(), cut_at


def test_eod_mask_loss_looks_at_the_input():
    stream = DocumentStream(Documents([6]), np.array([0]), seed=0)
    plain = read_batch(windows(stream, [0], 6), 6, document_masking=False, eod=2)
    masked = read_batch(
        windows(stream, [0], 6), 6, document_masking=False, eod=2, eod_mask_loss=True
    )
    assert plain.labels.tolist() == [1, 2, 3, 4, 5, 0] and masked.labels.tolist() == [
        1,
        2,
        IGNORE,
        4,
        5,
        0,
    ]
    assert masked.num_targets == 5


def test_batch_refuses(stream):
    with pytest.raises(
        ValueError,
        match=r"token id 3001 in document 3 of documents: must be in \[0, vocab_size = 3001"
        r"\). Fix",
    ):
        read_batch(
            windows(DocumentStream(Documents(LENGTHS), np.array([3]), 0), [0], 3),
            3,
            vocab_size=3001,
        )
    with pytest.raises(ValueError, match="no end-of-document token. Fix"):
        read_batch(windows(stream, [0], 4), 4, eod_mask_loss=True)


def test_counts_its_own_targets_and_moves():
    batch = Batch(
        torch.zeros(3), torch.tensor([1, IGNORE, 2]), torch.zeros(3), torch.tensor([0, 3])
    )
    assert batch.num_targets == 2 and batch.to("cpu").num_targets == 2
    assert batch.to("meta").tokens.device.type == "meta"


def make_loader(stream, seq_length=8, **settings):
    return Loader(
        fresh_mixture([(1.0, stream)], seq_length),
        **{"micro_batch_size": 2, "global_batch_tokens": 32, "dp_rank": 0, "dp_size": 1} | settings,
    )


def test_prefetch_changes_nothing_and_hands_errors_on(stream):
    ahead = make_loader(stream)
    plain = make_loader(stream, prefetch=False)
    for clock in (0, 32, 64, 0, 8, 40, 1000):
        for ours, theirs in zip(ahead.read(clock), plain.read(clock), strict=True):
            assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(
                ours.labels, theirs.labels
            )
    streams = (DocumentStream(Documents(LENGTHS), None, seed) for seed in range(50))
    stream = next(stream for stream in streams if stream.spans(0, 33)[0].max() < len(LENGTHS) - 1)
    first = int(stream.spans(0, 33)[0].max())
    bad = next(c for c in range(0, 256, 32) if stream.read(c, 33).max() // 1000 > first)
    loader = make_loader(stream, vocab_size=(first + 1) * 1000)
    for clock in range(0, bad, 32):
        loader.read(clock)
    for _ in range(2):
        with pytest.raises(ValueError, match="token id"):
            loader.read(bad)


def test_which_rank_holds_which_sample(stream):
    """Microbatch j of data rank d: samples (j * dp + d) * micro and on, as the layout-independent
    order asks."""
    for d in range(2):
        loader = make_loader(stream, seq_length=4, global_batch_tokens=48, dp_rank=d, dp_size=2)
        assert loader.num_microbatches == 3
        for j, batch in enumerate(loader.read(12)):
            first = (j * 2 + d) * 2
            assert batch.tokens.tolist() == stream.read(12 + first * 4, 8).tolist()


def test_the_digest_of_a_global_batch_is_the_same_however_it_is_cut(stream):
    def of_layout(micro, dp, cp, clock=32, **settings):
        unit = 8 * micro // cp
        loaders = [
            make_loader(
                stream,
                micro_batch_size=micro,
                global_batch_tokens=64,
                dp_rank=d,
                dp_size=dp,
                pieces=[(c * unit, (c + 1) * unit)],
                **settings,
            )
            for d in range(dp)
            for c in range(cp)
        ]
        return (
            sum(batch.digest for loader in loaders for batch in loader.read(clock)) % 2**DIGEST_BITS
        )

    whole = of_layout(1, 1, 1)
    assert 0 < whole < 2**DIGEST_BITS
    assert [
        of_layout(*layout) for layout in ((8, 1, 1), (2, 2, 1), (1, 1, 4), (2, 4, 8), (4, 2, 2))
    ] == [whole] * 5
    assert of_layout(1, 1, 1, clock=40) != whole, "other samples"
    assert of_layout(1, 1, 1, document_masking=False) != whole, "the same inputs, other labels"
    batch = make_loader(stream, micro_batch_size=1).read(0)[0]
    swapped = Batch(batch.tokens.flip(0), batch.labels, batch.positions, batch.cu_seqlens)
    assert digest(swapped, [(0, 8)], [0], 8) != digest(batch, [(0, 8)], [0], 8) == batch.digest, (
        "the same tokens in other places"
    )


def test_loader_refuses(stream):
    with pytest.raises(
        ValueError, match="global_batch_tokens = 40: .*8 x 2 x 1 = 16. Fix: 32 or 48"
    ):
        make_loader(stream, global_batch_tokens=40)
