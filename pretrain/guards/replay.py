"""Replay: one microbatch's forward and backward run twice, and compared bit for bit on every rank.

Our steps are pure functions of weights and data, so that a difference is an error of computing: of
a core, a memory, a driver. Silent data corruption of this kind is what Meta found in a few of a
million devices (arXiv 2102.11245); nothing else shows it, since the loss goes on falling.

A GPU's kernels may add in any order, so that an equal run differs on every rank. Such differences
are told from faults by a vote of the stage's ranks, and what follows them is left out from then on.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from parallel.layout import Layout
from parallel.shard import own_shard
from pretrain.guards.trace import Comparison, Trace, find_origins
from pretrain.guards.verdict import WrongNumbers, any_rank, gather, place_of
from pretrain.step import CountedMicrobatch, Stepper


class Replay:
    """Runs microbatches twice and names the rank that computed something else; collective.

    Weights, moments, clock and random numbers stay as they are, and no gradient is left behind.

    Args:
        say: prints a line on one rank.
    """

    def __init__(self, layout: Layout, say: Callable[[str], None]):
        self.layout = layout
        self.say = say
        self._compared: dict[str, int] = {}
        """Phase -> how many passages of this rank repeat, where not all do."""

    def run(self, stepper: Stepper, microbatches: Sequence[CountedMicrobatch], phase: str) -> None:
        """Compare two runs: of the first microbatch, or with a pipeline of all of them.

        Raises:
            WrongNumbers: on all ranks, naming the rank and what it sent.
        """
        taken = microbatches if self.layout.pp.size > 1 else microbatches[:1]
        if self.layout.pp.size > 1 and not stepper.has_trained(taken):
            self._trace(stepper, taken)
        first = self._trace(stepper, taken)
        second = self._trace(stepper, taken)
        own = self._compare(first, second, self._compared.get(phase))
        if not any_rank(self.layout, found=True in own.differs):
            return
        everyone = gather(own, self.layout.world)
        origins = find_origins(everyone)
        unstable = self._unstable_stages(everyone, origins)
        faulty = [rank for rank in origins if everyone[rank].stage not in unstable]
        if faulty:
            raise WrongNumbers(describe(everyone, faulty))
        self._leave_out(everyone, phase)

    def _trace(self, stepper: Stepper, microbatches: Sequence[CountedMicrobatch]) -> Trace:
        """Run forward and backward, and note everything that is sent and what comes of it."""
        trace = Trace(self.layout.world.rank)
        # Ranks ask each other for signals by the time of day: not while passages are counted.
        stop = stepper.stop
        stepper.stop = None
        try:
            with trace:
                loss, _ = stepper.start(microbatches, train=True)
        finally:
            stepper.stop = stop
        trace.keep("loss", loss)
        for name, parameter in _parameters(stepper):
            trace.keep(f"gradient of {name}", own_shard(parameter.grad))
            parameter.grad = None
        return trace

    def _compare(self, first: Trace, second: Trace, compared: int | None) -> Comparison:
        """Compare two traces on the device; here the host waits."""
        assert first.passages == second.passages, "two equal runs take the same passages"
        if self.layout.device.type == "cuda":
            # Fingerprints were taken on the streams of those who send.
            torch.cuda.synchronize(self.layout.device)
        one, other = (
            torch.stack([value.to(self.layout.device) for value in trace.fingerprints])
            for trace in (first, second)
        )
        differs = (one != other).tolist()
        if compared is not None:
            differs[compared:] = [False] * (len(differs) - compared)
        return Comparison(
            place_of(self.layout.world.rank), self.layout.pp.rank, first.passages, differs
        )

    def _unstable_stages(self, everyone: list[Comparison], origins: list[int]) -> set[int]:
        """Find the stages whose kernels do not repeat: most of their ranks differ by themselves."""
        if self.layout.device.type == "cpu":
            return set()
        stages = [comparison.stage for comparison in everyone]
        own = [stages[rank] for rank in origins]
        # A stage of one rank has nobody to tell a fault from such kernels.
        return {stage for stage in own if 2 * own.count(stage) > stages.count(stage)}

    def _leave_out(self, everyone: list[Comparison], phase: str) -> None:
        """Compare from now on only what comes before the first passage that does not repeat."""
        own = everyone[self.layout.world.rank]
        firsts = [
            comparison.first
            for comparison in everyone
            if comparison.stage == own.stage and comparison.first is not None
        ]
        if firsts:
            self._compared[phase] = min(firsts)
        shown = next(comparison for comparison in everyone if comparison.first is not None)
        assert shown.first is not None
        self.say(
            f"replay: on most ranks {shown.passages[shown.first].name} does not repeat bit for "
            "bit, since kernels of this device add in any order; what follows it is left out from "
            f"now on ({shown.first} of {len(shown.passages)} values are compared)"
        )


def _parameters(stepper: Stepper) -> list[tuple[str, nn.Parameter]]:
    """List this rank's parameters, with the stage in the name where one name appears twice."""
    return [
        (name if number == 0 else f"{name} (stage {number + 1} of this rank)", parameter)
        for number, stage in enumerate(stepper.stages)
        for name, parameter in stage.named_parameters()
    ]


def describe(everyone: list[Comparison], faulty: list[int]) -> str:
    """Say which ranks computed something else, and where."""
    lines = []
    for rank in faulty:
        own = everyone[rank]
        assert own.first is not None
        after = own.passages[own.first - 1].name if own.first else "the start"
        lines.append(f"{own.place}: {own.passages[own.first].name} (after {after})")
    return (
        "a rank computes something else from the same numbers: of two equal runs, what differs "
        f"first is {'; '.join(lines)}. Take that device out of the run."
    )
