"""Tensors that wait for their backward in the host's memory.

On a GPU the copies run on a stream of their own, into pinned memory, while the model computes; when
backward takes a copy back, the one that it will ask for next is fetched ahead. On a CPU tensors are
in the host's memory as they are.

The host queues a whole forward long before the device has computed it. So memory is not given back
when a copy is queued: the computing stream waits for the copy of two sends ago, and what was sent
then is released in its order. At most IN_FLIGHT sends hold memory on the device beside what is
computed with.
"""

from collections import deque
from collections.abc import Callable

import torch

IN_FLIGHT = 2
"""Sends whose copies may be under way while the next layers compute."""


class HostCopy:
    """Some tensors on their way to the host, in its memory, or on their way back."""

    def __init__(self, host: "Host", tensors: list[torch.Tensor], release: Callable[[], None]):
        self.host = host
        self.before = host.latest
        host.latest = self
        self.kept = tensors
        self.sources: list[torch.Tensor] = []
        self.release = release
        self.sent: torch.Event | None = None
        self.arrived: tuple[list[torch.Tensor], torch.Event] | None = None
        # On a CPU there is nothing to copy.
        if host.stream is None:
            return
        # The copy begins when the computing stream has made the tensors.
        host.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(host.stream):
            self.kept = [
                torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
                for x in tensors
            ]
            self.sent = host.stream.record_event()
        self.sources = tensors

    def finish_sending(self) -> None:
        """Let the computing stream wait for the copy, then free the device's memory; once."""
        if self.sent is None:
            return
        torch.cuda.current_stream().wait_event(self.sent)
        self.sent = None
        self.sources = []
        self.release()

    def fetch(self) -> None:
        """Start to copy back, when what is queued so far is computed."""
        stream = self.host.stream
        if stream is None or self.arrived is not None or not self.kept:
            return
        # Made on the computing stream, whose freed memory it may take. The copy waits for those who
        # used that memory before.
        tensors = [torch.empty_like(x, device=self.host.device) for x in self.kept]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for tensor, kept in zip(tensors, self.kept, strict=True):
                tensor.copy_(kept, non_blocking=True)
                tensor.record_stream(stream)
            self.arrived = tensors, stream.record_event()

    def take(self) -> list[torch.Tensor]:
        """Return the tensors on the device, and fetch the copy before this one ahead; once."""
        self.host.finish_sending()
        self.fetch()
        tensors = self.kept
        self.kept = []
        if self.host.stream is not None:
            assert self.arrived is not None, "taken twice"
            tensors, event = self.arrived
            torch.cuda.current_stream().wait_event(event)
        # Backward asks for the copies in reverse order.
        if self.before is not None:
            self.before.fetch()
        self.before = None
        self.arrived = None
        return tensors


class Host:
    """The host's side of one stage: remembers what was sent last, which backward asks for first."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.latest: HostCopy | None = None
        self.in_flight: deque[HostCopy] = deque()

    def begin(self) -> None:
        """Begin a microbatch's forward: nothing before it is fetched ahead for it."""
        self.finish_sending()
        self.latest = None

    def send(
        self, tensors: list[torch.Tensor], release: Callable[[], None] = lambda: None
    ) -> HostCopy:
        """Start to copy contiguous tensors, which may be dropped at once, not changed.

        Args:
            release: frees memory under the tensors that others still hold; called when the copy is
                made, on a GPU.
        """
        while len(self.in_flight) >= IN_FLIGHT:
            self.in_flight.popleft().finish_sending()
        copy = HostCopy(self, tensors, release)
        if self.stream is not None:
            self.in_flight.append(copy)
        return copy

    def finish_sending(self) -> None:
        """Free the device's memory of all that was sent; the computing stream waits for it."""
        while self.in_flight:
            self.in_flight.popleft().finish_sending()
