"""A model of ours as lm-evaluation-harness sees one: its interface `LM`, on any tp x cp.

The harness is optional: it is imported where a model of its class is made. Texts become ids as with
its own model `hf`: what the tokenizer puts before a text stands before them here, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tools.evaluation.model import LanguageModel
from tools.shared.door import warn

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

DEFAULT_NEW_TOKENS = 256
"""Tokens of a continuation where the task names none."""

Request = tuple[Any, list[int], list[int]]
"""The texts, the ids of the context, and those of the continuation."""


def make_harness_model(model: LanguageModel) -> Any:
    """Make a model of the harness's class that answers with ours."""
    from lm_eval.api.model import TemplateLM

    class HarnessModel(Answers, TemplateLM):
        """Encodes pairs of context and continuation as `TemplateLM` does; the rest is ours."""

    return HarnessModel(model)


class Answers:
    """Answers the harness's requests; each process of the layout makes the same calls."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model
        self.max_length = model.context_length
        self.truncated = 0
        """Requests whose context did not fit whole."""

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text; the harness begins a text with it where there is no bos."""
        eod = self.model.tokenizer.eod
        assert eod is not None, "checked before the harness starts"
        return eod

    @property
    def prefix_token_id(self) -> int:
        bos = self.model.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        ids = self.model.tokenizer.encode(string)
        first = self.model.first_ids
        # A text that begins with the id already gets no second one.
        if add_special_tokens is False or (first and ids[: len(first)] == first):
            return ids
        return [*first, *ids]

    # ------------------------------------------------------------ likelihoods

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            whole = [*context, *continuation]
            self.truncated += len(whole) > self.max_length + 1
            # The last token is only a target: one more than the context has room.
            texts.append(whole[-self.max_length - 1 :])
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for numbers in _batches(texts, self.model.batch_tokens):
            scores = self.model.score([texts[number] for number in numbers])
            for number, score in zip(numbers, scores, strict=True):
                begin = max(0, len(score.are_likeliest) - len(requests[number][2]))
                total = score.log_probabilities[begin:].double().sum()
                found[number] = float(total), bool(score.are_likeliest[begin:].all())
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        # The windows of each text; each token is a target once.
        windows: list[Request] = []
        owners = []
        for number, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    # ------------------------------------------------------------ generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        """Continue one context greedily, up to the first of its stop texts."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        values = normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS)
        if values.get("do_sample"):
            raise ValueError(
                "generation_kwargs: do_sample = true: only greedy continuations are made here. "
                "Fix: do_sample: false in the task, or --lm-eval-model hf."
            )
        # An empty text is in every text: it can stop none.
        given = handle_stop_sequences(values.get("until"), eos=None)
        stops = [stop for stop in given if stop]
        new_tokens = values["max_gen_toks"]
        room = self.max_length - new_tokens
        if room < 1:
            raise ValueError(
                f"generation_kwargs: max_gen_toks = {new_tokens}: must be below the model's "
                f"context of {self.max_length:,}. Fix: lower it in the task."
            )
        ids = self.tok_encode(context)
        self.truncated += len(ids) > room
        (text,) = self.model.continue_prompts(
            [ids[-room:]], [new_tokens], lambda text: any(stop in text for stop in stops)
        )
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def warn_of_truncation(self) -> None:
        """Say how many contexts lost their beginning."""
        if self.truncated:
            warn(
                f"{self.truncated:,} requests were longer than the model's context of "
                f"{self.max_length:,} tokens: their beginnings were left out"
            )


def _batches(texts: list[list[int]], most_tokens: int) -> list[list[int]]:
    """Share out the numbers of texts in parts of at most so many tokens, the longest first."""
    parts: list[list[int]] = []
    tokens = most_tokens
    for number in sorted(range(len(texts)), key=lambda number: -len(texts[number])):
        if tokens + len(texts[number]) > most_tokens:
            parts.append([])
            tokens = 0
        parts[-1].append(number)
        tokens += len(texts[number])
    return parts
