"""Describe what a batch holds on each rank, read by the trainer's own code."""

from collections.abc import Iterator

import torch

from data.batch import Sample
from data.loader import Loader
from data.mixture import Mixture
from data.tokenizers.tokenizer import Tokenizer
from parallel.context import rank_pieces
from pretrain.batches import dealing_of, ledger_at
from pretrain.config.flags import spell
from pretrain.config.load import load_config
from pretrain.data_outlook import describe_forecast, forecast_warnings
from pretrain.plan import Plan, make_plan
from pretrain.planner.model_size import document_cost_of
from pretrain.schedule.phase_table import describe
from pretrain.schedule.phases import Phase

SHOWN_DOCUMENTS = 8
"""Documents of a sample that are listed."""
SHOWN_TOKENS = 12
"""Tokens at the beginning and at the end of a slice that are shown."""


def describe_plan(flags: list[str], world_size: int) -> list[str]:
    """Describe the phases, what each will draw, and what to be warned of."""
    plan = make_plan(load_config(spell(flags)), world_size, only_print=True)
    return [
        describe(plan.phases, world_size),
        describe_forecast(plan.forecast),
        *(f"warning: {text}" for text in forecast_warnings(plan.ledger, plan.forecast)),
    ]


def describe_batch(flags: list[str], world_size: int, name: str, batch: int) -> list[str]:
    """Describe step `batch` of a phase: its samples, and each rank's part of them.

    Raises:
        ValueError: there is no such phase or step.
    """
    plan = make_plan(load_config(spell(flags)), world_size, only_print=True)
    phase = next((phase for phase in plan.phases if phase.name == name), None)
    if phase is None:
        raise ValueError(
            f"phase = {name}: the run has {', '.join(phase.name for phase in plan.phases)}. Fix: "
            "one of these."
        )
    if not 0 <= batch < phase.steps:
        raise ValueError(
            f"batch = {batch}: phase {name} has steps 0 to {phase.steps - 1}. Fix: one of these."
        )
    # The ledger as it will be at that step: what the run has drawn until then.
    clock = phase.start_of_step(batch)
    begun = plan.progress.clock if plan.progress and not plan.start.weights_only else 0
    ledger = ledger_at(
        plan.config.data,
        plan.corpus,
        plan.ledger,
        begun,
        plan.phases,
        clock,
        plan.rewinds,
        cost=document_cost_of(plan.config.model, plan.vocab_size),
    )
    mixture = ledger.mixture()
    first = ledger.samples_at(clock)
    count = phase.batch_at(clock) // phase.seq_length
    samples = mixture.samples(range(first, first + count))
    # The samples, with the documents that they are made of.
    sources = {id(stream): source for source, stream in plan.corpus.train.items()}
    lines = [
        f"phase {name}, step {batch} (clock {clock:,}): {count:,} samples of {phase.seq_length:,} "
        f"tokens, {phase.packing}, "
        f"{'documents apart' if phase.document_masking else 'documents not kept apart'}"
    ]
    for number, sample in enumerate(samples):
        lines += _describe_sample(number, sample, sources[id(sample.stream)], phase)
    # Each rank's slices of them.
    targets = 0
    for line, found in _describe_ranks(plan, phase, mixture, ledger.open.start, clock, world_size):
        lines.append(line)
        targets += found
    if targets == 0:
        lines.append(
            "warning: no token of this batch has a target, so that its loss is 0 and teaches "
            "nothing"
        )
    # What each source gave.
    totals: dict[str, int] = {}
    for sample in samples:
        source = sources[id(sample.stream)]
        totals[source] = totals.get(source, 0) + int(sample.intervals[:, 1].sum())
    lines += [f"total of {source}: {tokens:,} tokens" for source, tokens in totals.items()]
    return lines


def _describe_sample(number: int, sample: Sample, source: str, phase: Phase) -> list[str]:
    """Describe a sample: its documents, with the tokens of each that it holds."""
    spans = sample.stream.locate(sample.intervals)
    tokens = int(spans.lengths.sum())
    shown = [
        f"{document:,}[{offset:,}:{offset + length:,}]"
        for document, offset, length in zip(
            spans.documents.tolist(), spans.offsets.tolist(), spans.lengths.tolist(), strict=True
        )
    ][:SHOWN_DOCUMENTS]
    more = (
        f" and {len(spans.lengths) - len(shown):,} more" if len(spans.lengths) > len(shown) else ""
    )
    return [
        f"  sample {number}: {source}, {len(spans.lengths):,} documents, {tokens:,} tokens, "
        f"{phase.seq_length - tokens:,} padding",
        f"    documents {', '.join(shown)}{more}",
    ]


def _describe_ranks(
    plan: Plan, phase: Phase, mixture: Mixture, start: int, clock: int, world_size: int
) -> Iterator[tuple[str, int]]:
    """Give (line, targets that it reports) for each microbatch of each rank."""
    dp = phase.data_parallel_size(world_size)
    # Context parallel ranks: `a2a` of them trade tokens for heads, in `gather` groups.
    a2a, gather = phase.layout.context_levels
    tokenizer = plan.tokenizer
    data = plan.config.data
    cost = document_cost_of(plan.config.model, plan.vocab_size)
    for dp_rank in range(dp):
        for cp_rank in range(a2a * gather):
            pieces = rank_pieces(
                phase.seq_length * phase.micro_batch_size,
                cp_rank % a2a,
                a2a,
                cp_rank // a2a,
                gather,
            )
            # As this rank reads it in training, at once.
            loader = Loader(
                mixture,
                start,
                micro_batch_size=phase.micro_batch_size,
                dp_rank=dp_rank,
                dp_size=dp,
                global_batch_tokens=phase.batch_at(clock),
                pieces=pieces,
                prefetch=False,
                document_masking=phase.document_masking,
                eod=tokenizer.eod if tokenizer else None,
                eod_mask_loss=data.eod_mask_loss,
                vocab_size=plan.vocab_size,
                dealing=dealing_of(phase, dp, cost, train=True),
            )
            batches = loader.read(clock)
            for number, (batch, own) in enumerate(
                zip(batches, loader.own_samples().tolist(), strict=True)
            ):
                places = " and ".join(f"[{low:,}:{high:,}]" for low, high in pieces)
                begun = int((batch.positions == 0).sum())
                line = (
                    f"  dp {dp_rank} cp {cp_rank} microbatch {number}: samples "
                    f"{' '.join(map(str, own))}, tokens {places} of its microbatch, "
                    f"{batch.num_targets:,} targets, {begun:,} segments begin"
                )
                yield line, batch.num_targets
                first = _show(batch.tokens[:SHOWN_TOKENS], tokenizer)
                last = _show(batch.tokens[-SHOWN_TOKENS:], tokenizer)
                yield f"    {first} ... {last}", 0


def _show(tokens: torch.Tensor, tokenizer: Tokenizer | None) -> str:
    """Spell tokens as text, or as ids without a tokenizer."""
    ids = tokens.tolist()
    return repr(tokenizer.decode(ids)) if tokenizer else " ".join(map(str, ids))
