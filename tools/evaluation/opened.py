"""An opened model as evaluations ask it: texts scored and prompts continued, on any tp x cp."""

from collections.abc import Callable, Sequence

from data.tokenizers.tokenizer import Tokenizer
from data.units import show_bytes
from parallel.layout import free_memory
from tools.inference.decoding import Continuation, continue_batch, planned_bytes
from tools.inference.open_model import OpenModel
from tools.inference.sampling import Sampling
from tools.inference.scores import TextScores, score_texts


class OpenedModel:
    """Answers as `LanguageModel`; every process of the layout makes the same calls."""

    def __init__(self, model: OpenModel, batch_tokens: int):
        self.model = model
        self.batch_tokens = batch_tokens
        self.context_length = model.context_length
        self.first_ids = list(model.first_ids)

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.model.tokenizer is not None, "a model without one is refused"
        return self.model.tokenizer

    def score(self, texts: Sequence[list[int]]) -> Sequence[TextScores]:
        return score_texts(self.model, texts)

    def continue_prompts(
        self,
        prompts: Sequence[list[int]],
        new_tokens: Sequence[int],
        should_stop: Callable[[str], bool] | None = None,
    ) -> list[str]:
        stop_ids = self.model.stop_ids

        def end_early(continuation: Continuation) -> None:
            if should_stop is not None and should_stop(self._text_of(continuation)):
                continuation.limit = len(continuation.added)

        batch = [
            Continuation(number, prompt, limit)
            for number, (prompt, limit) in enumerate(zip(prompts, new_tokens, strict=True))
        ]
        needed = planned_bytes(self.model, batch)
        free = free_memory(self.model.layout.device)
        if needed > free:
            raise ValueError(
                f"batch_tokens = {self.batch_tokens}: keys and values of {len(batch)} prompts take "
                f"{show_bytes(needed)} per process, and {show_bytes(free)} are free. Fix: fewer, "
                "shorter lengths, or more processes (--context-parallel-size, "
                "--tensor-model-parallel-size)."
            )
        continue_batch(self.model, batch, Sampling(), stop_ids=stop_ids, on_token=end_early)
        return [self._text_of(continuation) for continuation in batch]

    def _text_of(self, continuation: Continuation) -> str:
        """Decode what was added."""
        return self.tokenizer.decode(continuation.text_ids)
