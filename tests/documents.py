"""Documents in memory, and windows of their stream as samples, for tests."""

import numpy as np

from data.batch import Sample
from data.stream import DocumentStream


class Documents:
    """A reader in memory; counts the tokens that were read.

    Token = document * 1000 + offset, unless `draw` gives the tokens of a document of some length.
    """

    prefix = "documents"

    def __init__(self, lengths, draw=None):
        self.document_lengths = np.array(lengths)
        self.num_documents = len(lengths)
        self.tokens_read = 0
        make = draw or (lambda number, length: number * 1000 + np.arange(length))
        self.tokens = [make(number, length) for number, length in enumerate(lengths)]

    def read_spans(self, documents, offsets, lengths, out):
        self.tokens_read += len(out)
        at = 0
        for document, offset, length in zip(
            documents.tolist(), offsets.tolist(), lengths.tolist(), strict=True
        ):
            out[at : at + length] = self.tokens[document][offset : offset + length]
            at += length
        assert at == len(out)

    def read(self, document, offset, length):
        return self.tokens[document][offset : offset + length]

    def fingerprint(self):
        return f"documents {self.document_lengths.tolist()}"


def windows(stream: DocumentStream, starts, seq_length: int) -> list[Sample]:
    """Samples of consecutive tokens that begin at the given positions of the stream."""
    return [Sample(stream, np.array([[start, seq_length]]), start + seq_length) for start in starts]


class Letters:
    """A tokenizer of one id per ASCII letter."""

    vocab_size = 128
    eod = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))
