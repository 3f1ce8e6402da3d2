"""What the loss holds while it computes a chunk of tokens, in bytes.

model/loss.py puts the gradient of the logits in their place, so that they exist once.
"""

from dataclasses import dataclass

from model.loss import BLOCK_LOGITS


@dataclass(frozen=True, kw_only=True)
class LossBytes:
    """Holds the sizes of one rank's loss."""

    tokens: int
    chunk: int
    """Tokens whose logits exist at a time."""
    hidden: int
    vocabulary: int
    """This tp rank's part."""
    value: int
    """Bytes of a value in the compute dtype."""
    wide: int
    """The same in at least fp32."""
    is_capped: bool
    on_gpu: bool

    @property
    def at_work(self) -> int:
        """The most there is, beside the input, its gradient and that of the weight."""
        rows = min(self.tokens, self.chunk)
        logits = self.value * rows * self.vocabulary
        beside = self._beside_logits(rows)
        # A single chunk's gradient of the weight is the one that is kept.
        if self.tokens <= rows or self.value == self.wide:
            return logits + beside
        # Several are added up in fp32. What is kept is made of the sum at the end.
        weight = self.vocabulary * self.hidden
        kept = self.value * weight
        product = 0 if self.on_gpu else kept
        return max(logits + max(beside, product), kept) + (self.wide - self.value) * weight

    def _beside_logits(self, rows: int) -> int:
        """What the softmax makes beside a chunk's logits: wide or capped ones, the cap's slopes."""
        all_logits = rows * self.vocabulary
        # A fused kernel widens nothing in memory.
        if self.on_gpu:
            return 2 * self.value * all_logits if self.is_capped else 0
        # A CPU takes a block of rows at a time, one row at least.
        block = self.wide * min(all_logits, max(BLOCK_LOGITS, self.vocabulary))
        return block * ((self.value < self.wide) + self.is_capped)
