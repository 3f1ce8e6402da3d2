"""Whether the checkpoint's clock leaves anything to train of the tokens that are asked for."""

from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.start import Start

MORE_TOKENS = "more tokens (phases that are trained stay in the YAML file, before the new ones)"
BEGIN_ANEW = "--finetune to begin anew with the weights"


def spent_tokens_problems(start: Start, resumed: Progress | None, end: int) -> list[str]:
    """List why --load cannot go on: its clock is beyond the last phase of this run.

    Args:
        resumed: how far the run had come whose clock goes on; None = the clock starts at 0.
        end: where the last phase ends on the clock.
    """
    if resumed is None or start.is_restart or end >= resumed.clock:
        return []
    return [f"{_rule(resumed, end)}. Fix: {MORE_TOKENS}, or {BEGIN_ANEW}."]


def spent_tokens_warnings(start: Start, resumed: Progress | None, end: int) -> list[str]:
    """Warn of a run that trains nothing, but for a finished one that only starts again."""
    if resumed is None or end > resumed.clock or resumed.evaluation_due is not None:
        return []
    if start.is_restart and end == resumed.clock:
        return []
    # A checkpoint in --save wins over --finetune.
    anew = f"another --save, --load of this one and {BEGIN_ANEW}"
    fix = f"{MORE_TOKENS}, or {anew if start.is_restart else BEGIN_ANEW}"
    return [f"{_rule(resumed, end)}: nothing is trained. Fix: {fix}"]


def _rule(resumed: Progress, end: int) -> str:
    return (
        f"train_tokens = {end:,}: counts from the beginning of the checkpoint's run, which has "
        f"trained {resumed.clock:,}"
    )
