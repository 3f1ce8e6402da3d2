"""Text of tokens that come one by one: what can be written already, and what must wait."""

from collections.abc import Sequence

from data.tokenizers.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""What decoders give for bytes that are no whole character yet."""


class TextStream:
    """Gives the text that each new token adds; the pieces together are the text of all tokens.

    A token's text depends on the one before it (spaces), so the last tokens are decoded together
    with the new one. Source: the incremental detokenization of vLLM.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.context = 0
        """First token that is decoded again with new ones."""
        self.written = 0
        """Tokens whose text was given."""

    def add(self, ids: Sequence[int], *, is_last: bool = False) -> str:
        """Take new tokens -> the text that can be written.

        Args:
            is_last: no more will come: bytes that are no character are written as they decode.
        """
        self.ids += ids
        known = self.tokenizer.decode(self.ids[self.context : self.written])
        text = self.tokenizer.decode(self.ids[self.context :])
        if text.endswith(UNFINISHED) and not is_last:
            return ""
        self.context = self.written
        self.written = len(self.ids)
        return text[len(known) :]
