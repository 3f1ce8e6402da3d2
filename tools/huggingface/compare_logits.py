"""Is our model the one that transformers makes of a folder? Its answers to the same questions.

- fp64 logits: all but rounding is a fault, so that 1e-8 of the largest logit is allowed.
- fp32 logits, in which the model is used: 4 times what two ways of transformers itself differ.
- 64 tokens that follow a text, the largest logit each: the same ids, unless two logits are equal
  but for rounding.

Shapes: T tokens, t of them that are compared, V vocabulary.
"""

import torch

from data.batch import IGNORE, Batch
from model.gpt import GPTStage
from tools.huggingface.comparison_table import ComparisonTable
from tools.huggingface.double import compute_in_double
from tools.huggingface.questions import ComparedSequence, Questions
from tools.huggingface.transformers_answers import Answers
from tools.shared.message_text import count_of

ALLOWED_SHARE = 1e-8
"""Share of the largest logit by which ours may differ in fp64.

Angles are rounded to fp32 in both models, since that rounding belongs to the model: one rounded
otherwise in a few places stays below this.
"""
MULTIPLE_OF_WAYS = 4
"""Multiple of the difference between transformers' sdpa and eager that ours may have in fp32; with
eager only, of that between fp32 and fp64."""
MULTIPLE_OF_ROUNDING = 2
"""Multiple of the difference between transformers' fp32 and fp64 that ours may have in fp32.

Two models that round differently are each that far from fp64. It allows more than the ways do only
where all parts of a model round much more than its attention.
"""
TINY_PARAMETERS = 10_000_000
"""Parameters below which fp32 rounds little."""
TINY_SHARE = 1e-5
"""Share of the largest logit that a tiny model may differ by in fp32, if transformers' own rounding
allows it."""


def compare_answers(
    table: ComparisonTable,
    model: GPTStage,
    vocab_size: int,
    questions: Questions,
    answers: Answers,
) -> None:
    """Add our model's answers to the table, beside transformers'; the model ends in fp64.

    Args:
        model: computes in fp32.
    """
    columns = answers.double[0].shape[1]
    if columns != vocab_size:
        problem = f"transformers' model has {columns:,} token ids, ours {vocab_size:,}"
        table.add("token ids", f"{columns:,} ids", f"{vocab_size:,} ids", problem)
        return
    table.remark(f"transformers' own logits: {answers.describe()}")
    # fp32 first: a model that was made to compute in fp64 stays so.
    is_tiny = sum(parameter.numel() for parameter in model.parameters()) < TINY_PARAMETERS
    for sequence, logits in zip(questions.sequences, answers.single, strict=True):
        allowed = allowed_in_single(answers, float(logits.abs().max()), is_tiny=is_tiny)
        _add_logits(table, "fp32", model, sequence, logits, allowed)
    if questions.new_tokens:
        _add_continuation(table, model, vocab_size, questions, answers)

    compute_in_double(model, model.layers.values())
    for sequence, logits in zip(questions.sequences, answers.double, strict=True):
        allowed = ALLOWED_SHARE * float(logits.abs().max())
        _add_logits(table, "fp64", model, sequence, logits, allowed)


def our_logits(
    model: GPTStage, vocab_size: int, sequence: ComparedSequence, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute logits [t, V] of one sequence with our whole model, without padded ids.

    Args:
        rows: places of the tokens to compute them for; None = all.
    """
    ids = sequence.ids
    batch = Batch(
        tokens=ids,
        labels=torch.full_like(ids, IGNORE),
        positions=sequence.positions,
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
    )
    with torch.no_grad():
        hidden = model.hidden(ids, batch)
        return model.logits(hidden if rows is None else hidden[rows])[:, :vocab_size]


# ---------------------------------------------------------------- logits


def allowed_in_single(answers: Answers, largest: float, *, is_tiny: bool) -> float:
    """Return how far our fp32 logits may be from transformers'.

    Args:
        largest: of the logits.
    """
    least = MULTIPLE_OF_ROUNDING * answers.rounding
    between_ways = answers.between_ways
    allowed = MULTIPLE_OF_WAYS * (answers.rounding if between_ways is None else between_ways)
    if is_tiny:
        allowed = min(allowed, TINY_SHARE * largest)
    return max(allowed, least)


def _add_logits(
    table: ComparisonTable,
    precision: str,
    model: GPTStage,
    sequence: ComparedSequence,
    theirs: torch.Tensor,
    allowed: float,
) -> None:
    """Add the comparison of one sequence."""
    vocab_size = theirs.shape[1]
    differences = (our_logits(model, vocab_size, sequence, sequence.rows) - theirs).abs()
    difference = float(differences.max())
    place, token = divmod(int(differences.argmax()), vocab_size)
    position = int(sequence.positions[sequence.rows[place]])
    where = f"position {position:,}, token id {token:,}"
    problem = None
    # Written so that "not a number" fails, too.
    if not difference <= allowed:
        problem = (
            f"{precision} logits at {sequence.name} differ by {difference:.2e} ({where}), allowed "
            f"{allowed:.2e}"
        )
    largest = float(theirs.abs().max())
    table.add(
        f"{precision} logits, {sequence.name}",
        f"{difference:.2e}",
        f"{allowed:.2e}",
        problem,
        note=f"at {where}; largest logit {largest:.2f}",
    )


# ---------------------------------------------------------------- text that follows


def _add_continuation(
    table: ComparisonTable,
    model: GPTStage,
    vocab_size: int,
    questions: Questions,
    answers: Answers,
) -> None:
    """Add whether ours, too, takes each token that transformers' generate took.

    One pass over prompt and continuation shows it: if each token is the first choice after those
    before it, generating one after the other gives the same.
    """
    ids = answers.continued
    begin = len(questions.prompt)
    text = ComparedSequence("", ids, torch.arange(len(ids)))
    # The choice of a token is made where the one before it is.
    choices = our_logits(model, vocab_size, text, torch.arange(begin - 1, len(ids) - 1))
    taken = ids[begin:]
    best = choices.max(dim=1)
    gaps = best.values - choices.gather(1, taken[:, None])[:, 0]
    differ = best.indices != taken
    allowed = allowed_in_single(answers, float(choices.abs().max()), is_tiny=False)
    wrong = differ & ~(gaps <= allowed)

    note = f"after {count_of(begin, 'token')} of text"
    ties = int((differ & ~wrong).sum())
    if ties:
        note += f"; {count_of(ties, 'tie')}: two logits equal but for rounding"
    problem = None
    if wrong.any():
        first = int(wrong.nonzero()[0, 0])
        problem = (
            f"{int(wrong.sum())} of {len(taken)} tokens that follow a text differ, the first at "
            f"position {begin + first:,}: {int(best.indices[first]):,} instead of "
            f"{int(taken[first]):,}"
        )
    what = f"greedy continuation, {count_of(len(taken), 'token')}"
    table.add(what, count_of(int(wrong.sum()), "token"), "0 tokens", problem, note=note)
