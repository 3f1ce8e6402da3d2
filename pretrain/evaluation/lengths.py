"""Which lengths an evaluation can have in a phase, and the batches that it reads of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.tokenizers.tokenizer import Tokenizer
from parallel.layout import Layout
from parallel.schedule import accepts
from pretrain.config.logging_config import LoggingConfig
from pretrain.evaluation.passkey_texts import check_passkey_lengths
from pretrain.schedule.phases import Phase

MUCH_LARGER = 4
"""Times a phase's microbatch that an evaluation's may have without a warning: nothing is kept for a
backward."""


@dataclass(frozen=True)
class ValidationBatch:
    """The batches of a validation loss at some length."""

    seq_length: int
    micro_batch_size: int
    """Samples per microbatch: as many as the phase's microbatch has tokens for, at least one."""
    batch_samples: int
    """Samples per global batch that are counted: the phase's tokens, in whole samples."""

    @staticmethod
    def of(phase: Phase, seq_length: int) -> "ValidationBatch":
        """Shape batches of samples of `seq_length` like those of the phase."""
        # As many tokens as training has, in samples of another length.
        micro_batch_tokens = phase.seq_length * phase.micro_batch_size
        return ValidationBatch(
            seq_length,
            max(1, micro_batch_tokens // seq_length),
            max(1, round(phase.global_batch_tokens / seq_length)),
        )

    def global_batch_tokens(self, layout: Layout) -> int:
        """Tokens that the ranks read together.

        `batch_samples`, or the next number above it that data parallelism and the pipeline schedule
        take.
        """
        # Whole microbatches on each data-parallel rank.
        samples_at_once = self.micro_batch_size * layout.dp.size
        wanted = -(-self.batch_samples // samples_at_once)
        return microbatch_count(wanted, layout) * samples_at_once * self.seq_length


def microbatch_count(wanted: int, layout: Layout) -> int:
    """Find the least number of microbatches, at least `wanted`, that the pipeline schedule runs.

    Args:
        wanted: microbatches of each data-parallel rank.
    """
    count = max(1, wanted)
    while not accepts(layout.schedule, layout.pp.size, count):
        count += 1
    return count


def check_passkeys(settings: LoggingConfig, tokenizer: Tokenizer | None) -> list[str]:
    """Name the lengths that hold no passkey trial, as `name = value: rule. Fix: ...`."""
    if settings.eval_iters == 0 or not settings.eval_passkey_lengths or tokenizer is None:
        return []
    return check_passkey_lengths(tokenizer, settings.eval_passkey_lengths)


def check_lengths(settings: LoggingConfig, phase: Phase) -> list[str]:
    """Name the lengths that the phase's layout cannot cut, as `name = value: rule. Fix: ...`."""
    if settings.eval_iters == 0:
        return []
    # Context parallelism gives each rank as many tokens of a microbatch.
    multiple = phase.layout.token_multiple
    problems = []
    for length in settings.eval_seq_lengths:
        if length < 1:
            continue  # said by the configuration's own check
        micro = ValidationBatch.of(phase, length).micro_batch_size
        if micro * length % multiple:
            problems.append(
                f"eval_seq_lengths = {length}: the {micro} x {length} tokens of a "
                f"microbatch must be a multiple of {multiple}, so that every rank gets as "
                f"many. Fix: for example {-(-length // multiple) * multiple}."
            )
    for length in settings.eval_passkey_lengths:
        if length % multiple:
            problems.append(
                f"eval_passkey_lengths = {length}: must be a multiple of {multiple}, so that every "
                f"rank gets as many tokens. Fix: for example {-(-length // multiple) * multiple}."
            )
    return problems


def length_warnings(settings: LoggingConfig, phases: Sequence[Phase]) -> list[str]:
    """Warn of lengths whose microbatches may not fit into the phase's memory."""
    if not settings.eval_iters:
        return []
    found = []
    for phase in phases:
        own = phase.seq_length * phase.micro_batch_size
        for name in ("eval_seq_lengths", "eval_passkey_lengths"):
            for length in getattr(settings, name):
                if length > MUCH_LARGER * own:
                    found.append(
                        f"phase {phase.name!r}: {name} = {length}: a microbatch has "
                        f"{length / own:.0f} times the tokens of the phase's own on each rank and "
                        "may not fit into memory"
                    )
    return found
