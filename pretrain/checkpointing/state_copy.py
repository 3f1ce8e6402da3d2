"""A second copy of the training state in host memory, filled beside the next forward and backward.

A save that hides behind training writes this copy, not the live tensors. The memory is taken and
its pages are touched at the start of the run, so that the first save costs what later ones do; on a
GPU it is pinned, and a stream of its own copies.

torch's own `async_save` with a `DefaultStager` was the other choice. Its stager finds and allocates
the buffers in the first save, and has no point at which training waits for the copy alone.
`tools/bench/checkpoint.py` times the two beside each other.
"""

import mmap
import threading
from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor

ALIGNMENT_BYTES = 64
"""Each tensor of the copy begins at a multiple of this: a line of the CPU's cache."""


class StateCopy:
    """Holds a copy of `live` tensors, with the same names, shapes and placements.

    `begin` starts to fill it; until `wait` has returned nobody may write the live tensors. Whoever
    reads `tensors` waits with `wait_until_readable`.

    Args:
        live: name -> DTensor or plain tensor, as each `begin` gives them.
        device: on which training runs.
    """

    def __init__(self, live: Mapping[str, torch.Tensor], device: torch.device):
        self.device = device
        self.num_bytes = sum(_room(own_part(tensor)) for tensor in live.values())
        # Populated: no page of it is met for the first time during a save.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        self._memory = mmap.mmap(-1, max(self.num_bytes, 1), flags=flags)
        self._pin()
        self.tensors: dict[str, torch.Tensor] = {}
        """The copies, by name."""
        self._parts: dict[str, torch.Tensor] = {}
        self._lay_out(live)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        # On a GPU: its stream, and where in it the state is ready and the copy whole.
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._state_ready = torch.cuda.Event()
            self._copied = torch.cuda.Event()

    def _pin(self) -> None:
        """Let the GPU write into the memory by itself, exactly as large as it is.

        torch's pinned tensors are rounded up to a power of two each.
        """
        if self.device.type == "cuda":
            runtime = torch.cuda.cudart()
            assert runtime is not None, "there is a GPU"
            size = len(self._memory)
            torch.cuda.check_error(runtime.cudaHostRegister(self._address, size, 0))

    def close(self) -> None:
        """Give the memory back; nobody copies or reads any more."""
        if self.device.type == "cuda":
            runtime = torch.cuda.cudart()
            assert runtime is not None, "there is a GPU"
            torch.cuda.check_error(runtime.cudaHostUnregister(self._address))
        self.tensors.clear()
        self._parts.clear()

    @property
    def _address(self) -> int:
        return torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()

    def _lay_out(self, live: Mapping[str, torch.Tensor]) -> None:
        """Give each tensor its place in the memory, as a tensor with a storage of its own.

        Views of one large storage would be copied again by the writer.
        """
        offset = 0
        for name, tensor in live.items():
            source = own_part(tensor)
            if source.numel():
                flat = torch.frombuffer(
                    self._memory, dtype=source.dtype, count=source.numel(), offset=offset
                )
                copy = flat.view(source.shape)
            else:
                copy = torch.empty(source.shape, dtype=source.dtype, device="cpu")
            offset += _room(source)
            self._parts[name] = copy
            if isinstance(tensor, DTensor):
                # Not `from_local`, which would move the copy to the mesh's device.
                copy = DTensor(copy, tensor._spec, requires_grad=False)
            self.tensors[name] = copy

    def begin(self, live: Mapping[str, torch.Tensor]) -> None:
        """Start to copy what the live tensors hold now."""
        assert self._thread is None, "wait for the last copy first"
        # Their memory is looked up each time: a module may have moved a tensor.
        pairs = [(self._parts[name], own_part(tensor)) for name, tensor in live.items()]
        assert len(pairs) == len(self._parts), "the state has other tensors than at the start"
        if self._stream is not None:
            # What was computed until here comes first.
            self._state_ready.record(torch.cuda.current_stream(self.device))
        self._thread = threading.Thread(
            target=self._copy, args=(pairs,), name="state-copy", daemon=True
        )
        self._thread.start()

    def _copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        try:
            if self._stream is None:
                _copy_all(pairs)
                return
            torch.cuda.set_device(self.device)
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._state_ready)
                _copy_all(pairs)
                self._copied.record(self._stream)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Let everything that this process does from now on come after the copy.

        On a GPU the device waits and not the host.
        """
        if self._thread is None:
            return
        self._join(self._thread)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)
        self._thread = None

    def wait_until_readable(self) -> None:
        """Wait until the copy is whole in the host's memory, in any thread."""
        thread = self._thread
        if thread is not None:
            self._join(thread)
        if self._stream is not None:
            self._copied.synchronize()

    def _join(self, thread: threading.Thread) -> None:
        thread.join()
        if self._error is not None:
            raise RuntimeError(f"the state could not be copied: {self._error}") from self._error


def _copy_all(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy each pair's second tensor into its first.

    From a GPU in the order of the stream, from the host's memory at once.
    """
    for copy, source in pairs:
        copy.copy_(source, non_blocking=True)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor: its shard, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _room(part: torch.Tensor) -> int:
    """Return the bytes that a part takes in the copy."""
    return -(-part.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
