"""The real trainer with a fault in it: `HOOK` in the environment names one of `HOOKS`."""

import errno
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from parallel.layout import launched_rank
from pretrain import train, training_loop
from pretrain.batches import Feed
from pretrain.checkpointing.saver import Saver
from pretrain.evaluation.evaluate import Evaluator
from pretrain.step import Stepper

SLOW_SECONDS = 6.0
"""What a slow part takes on rank 0, while the others wait."""
FAULTY_RANK = 1


def before(owner: Any, name: str, act: Callable[..., None]) -> None:
    """Have `act` called before a function, with its arguments."""
    original = getattr(owner, name)

    def replaced(*args: Any, **options: Any) -> Any:
        act(*args, **options)
        return original(*args, **options)

    setattr(owner, name, replaced)


def once(act: Callable[[], None]) -> Callable[..., None]:
    """Let it act the first time only, whatever it is called with."""
    calls = []

    def acting(*args: Any, **options: Any) -> None:
        if not calls:
            calls.append(1)
            act()

    return acting


def loop_in_the_reader() -> None:
    """One rank never comes back from reading step 6, in the first launch."""
    mark = Path(os.environ["HERE"]) / "has_looped"

    def act(feed: Feed, clock: int) -> None:
        if launched_rank() == FAULTY_RANK and clock >= 5 * 256 and not mark.exists():
            mark.touch()
            while True:
                time.sleep(0.01)

    before(Feed, "read", act)


def fail_in_the_reader(error: Exception, *, once_only: bool) -> None:
    """One rank's reader raises when it comes to step 5, in each launch or in the first."""
    mark = Path(os.environ["HERE"]) / "has_failed"

    def act(feed: Feed, clock: int) -> None:
        if launched_rank() != FAULTY_RANK or clock < 4 * 128 or (once_only and mark.exists()):
            return
        mark.touch()
        raise error

    before(Feed, "read", act)


def be_slow_where_it_is_allowed() -> None:
    """Rank 0 takes long to plan, in its first evaluation, its first step and each save."""

    def sleep(*args: Any, **options: Any) -> None:
        if launched_rank() == 0:
            time.sleep(SLOW_SECONDS)

    before(train, "make_plan", sleep)
    before(Evaluator, "run", once(sleep))
    before(training_loop, "train_step", once(sleep))
    before(Saver, "save", sleep)


def be_slow_in_every_step() -> None:
    """One rank takes longer than its equals for each microbatch."""

    def act(stepper: Stepper, count: int, *, train: bool) -> None:
        if train and launched_rank() == FAULTY_RANK:
            time.sleep(0.3)

    before(Stepper, "_accumulate", act)


HOOKS = {
    "loop in the reader": loop_in_the_reader,
    "fail in the reader": partial(
        fail_in_the_reader, RuntimeError("the corpus is a pear"), once_only=False
    ),
    "fail once in the reader": partial(
        fail_in_the_reader, OSError(errno.EIO, "the disk is a pear"), once_only=True
    ),
    "slow parts": be_slow_where_it_is_allowed,
    "slow rank": be_slow_in_every_step,
}

if __name__ == "__main__":
    hook = os.environ.get("HOOK")
    if hook:
        HOOKS[hook]()
    sys.exit(train.main())
