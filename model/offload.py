"""Tensors that wait for their backward in the host's memory.

On a GPU the copies run on a stream of their own, into pinned memory, while the model computes; when backward takes a
copy back, the one that it will ask for next is fetched ahead. On a CPU tensors are in the host's memory as they are.
"""

import torch


class HostCopy:
    """Some tensors on their way to the host, there, or on their way back."""

    def __init__(self, host: "Host", tensors: list[torch.Tensor]):
        self.host, self.before = host, host.latest
        host.latest = self
        self.kept, self.arrived = tensors, None
        if host.stream is None:
            return
        host.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(host.stream):
            self.kept = [torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
                         for x in tensors]
        for tensor in tensors:
            tensor.record_stream(host.stream)  # its memory is free again when the copy is done, not before

    def fetch(self) -> None:
        """Start the way back."""
        stream = self.host.stream
        if stream is None or self.arrived is not None or not self.kept:
            return
        with torch.cuda.stream(stream):
            tensors = [x.to(self.host.device, non_blocking=True) for x in self.kept]
            self.arrived = tensors, stream.record_event()

    def take(self) -> list[torch.Tensor]:
        """The tensors on the device; once."""
        self.fetch()
        tensors, self.kept = self.kept, []
        if self.host.stream is not None:
            tensors, event = self.arrived
            current = torch.cuda.current_stream()
            current.wait_event(event)
            for tensor in tensors:
                tensor.record_stream(current)
        if self.before is not None:
            self.before.fetch()
        self.before = self.arrived = None
        return tensors


class Host:
    """The host's side of one stage: remembers what was sent last, which backward asks for first."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.latest: HostCopy | None = None

    def begin(self) -> None:
        """A microbatch's forward begins: nothing before it is fetched ahead for it."""
        self.latest = None

    def send(self, tensors: list[torch.Tensor]) -> HostCopy:
        """Start to copy contiguous tensors; they may be dropped at once, not changed."""
        return HostCopy(self, tensors)
