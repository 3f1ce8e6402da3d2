"""Which tokens may be drawn is what transformers' filters say, and draws are distributed so."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from data.tokenizers.tokenizer import NullTokenizer
from tools.inference.sampling import Sampling, choose_tokens, draw, keep_top_k, keep_top_p
from tools.inference.text_stream import TextStream


def logits_of(rows: int, vocabulary: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    # Rounded, so that some are equal.
    return (torch.randn(rows, vocabulary, generator=generator) * 3).round(decimals=1)


@pytest.mark.parametrize("count", [0, 1, 7, 50, 80])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.5, 1e-6])
def test_the_filters_are_those_of_transformers(count, share):
    theirs = LogitsProcessorList()
    if count:
        theirs.append(TopKLogitsWarper(count))
    if share < 1:
        theirs.append(TopPLogitsWarper(share))
    logits = logits_of(5)
    expected = theirs(torch.zeros(5, 1, dtype=torch.long), logits.clone())
    assert torch.equal(keep_top_p(keep_top_k(logits, count), share), expected)


def test_draws_follow_the_probabilities_of_transformers():
    ids = torch.tensor([[3, 5, 3]])
    sampling = Sampling(temperature=0.7, top_k=9, top_p=0.9, repetition_penalty=1.3, seed=5)
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(9),
            TopPLogitsWarper(0.9),
        ]
    )
    logits = logits_of(1)
    logits[0, [3, 5]] = logits.max()
    expected = theirs(ids, logits.clone()).softmax(dim=1)[0]
    seen = torch.zeros(1, 50, dtype=torch.bool)
    seen[0, ids[0]] = True
    count = 4000
    drawn = choose_tokens(
        logits.expand(count, -1), sampling, [0] * count, range(count), seen.expand(count, -1)
    )
    found = drawn.bincount(minlength=50) / count
    assert 1 < (expected > 0).sum() < 9
    assert (found[expected == 0] == 0).all()
    # Four standard deviations of the mean of so many draws.
    assert ((found - expected).abs() < 4 * (expected / count).sqrt() + 1e-9).all()


def test_a_repetition_penalty_changes_greedy_search_too():
    logits = torch.tensor([[2.0, 1.9, -1.0], [-0.1, -3.0, -0.11]])
    seen = torch.tensor([[True, False, True], [True, False, False]])
    sampling = Sampling(repetition_penalty=1.5)
    assert choose_tokens(logits, sampling, [0, 1], [4, 4], seen).tolist() == [1, 2]


def test_a_draw_depends_on_seed_prompt_and_position():
    draws = {draw(seed, number, place) for seed in (1, 2) for number in (1, 2) for place in (1, 2)}
    assert len(draws) == 8
    assert all(0 <= each < 1 for each in draws)
    assert draw(1, 2, 3) == draw(1, 2, 3)


class Bytes:
    """Decodes bytes as UTF-8, as byte-level tokenizers do."""

    def decode(self, ids) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["plain", "ä€😀 x", "😀"])
def test_a_stream_writes_whole_characters_that_are_the_text(text):
    stream = TextStream(Bytes())
    content = text.encode()
    pieces = [stream.add([byte], is_last=i == len(content) - 1) for i, byte in enumerate(content)]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_a_stream_writes_at_the_end_what_is_no_character():
    stream = TextStream(Bytes())
    assert stream.add("😀".encode()[:2]) == ""
    assert stream.add("😀".encode()[2:3], is_last=True) == "\ufffd"


def test_a_stream_of_ids_has_spaces_between_them():
    stream = TextStream(NullTokenizer(100))
    assert "".join([stream.add([5, 17]), stream.add([3]), stream.add([99])]) == "5 17 3 99"
