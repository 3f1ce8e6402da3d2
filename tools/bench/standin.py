"""Run one rank of many in one process, with local copies instead of what ranks exchange.

torch's fake process group makes the groups; what the trainer exchanges through torch.distributed is
replaced by copies within the device that move as many bytes, and counted. Results are not those of
a real run, and no time passes on a wire: that has to be modelled from the bytes.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from parallel.layout import Axis, Layout, single_process_layout


class _Done:
    """Stand for the handle of a copy that was put on the current stream."""

    def wait(self, timeout=None) -> bool:
        return True


@contextmanager
def one_rank_of(size: int, device: torch.device) -> Iterator[tuple[Layout, Counter]]:
    """Make rank 0 of `size` context-parallel ranks.

    Yields:
        its layout, and the bytes that it would send to the others, by collective.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    sent: Counter = Counter()
    try:
        # FSDP2 shards over all ranks, of which this process holds one.
        mesh = init_device_mesh(device.type, (size, 1), mesh_dim_names=("dp_cp", "tp"))

        def axis(name: str) -> Axis:
            return Axis(name, 0, size, tuple(range(size)), dist.group.WORLD)

        layout = replace(
            single_process_layout(device),
            mesh=mesh,
            world=axis("world"),
            dp_cp=axis("dp_cp"),
            cp=axis("cp"),
            cp_a2a=axis("cp_a2a"),
        )
        with _local_copies(sent):
            yield layout, sent
    finally:
        dist.destroy_process_group()


@contextmanager
def _local_copies(sent: Counter) -> Iterator[None]:
    """Replace the collectives by copies within the device, and count what they would send."""

    def all_gather_into_tensor(output_tensor, input_tensor, group=None, async_op=False):
        size = dist.get_world_size(group)
        sent["all_gather"] += (size - 1) * input_tensor.nbytes
        source = input_tensor.reshape(-1)
        for place in output_tensor.view(size, -1):
            # FSDP2 gathers from within the output.
            if place.data_ptr() != source.data_ptr():
                place.copy_(source)
        return _Done() if async_op else None

    def reduce_scatter_tensor(output, input, op=dist.ReduceOp.SUM, group=None, async_op=False):
        size = dist.get_world_size(group)
        sent["reduce_scatter"] += (size - 1) * output.nbytes
        torch.sum(input.view(size, -1), 0, out=output.view(-1))
        return _Done() if async_op else None

    def all_to_all_single(
        output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False
    ):
        source = input.reshape(-1)
        target = output.view(-1)
        kept = (
            input_split_sizes[0] if input_split_sizes else len(input) // dist.get_world_size(group)
        )
        # What a rank keeps is not sent.
        sent["all_to_all"] += input.nbytes - input[:kept].nbytes
        for start in range(0, len(target), len(source)):
            part = target[start : start + len(source)]
            part.copy_(source[: len(part)])
        return _Done() if async_op else None

    replaced = {
        "all_gather_into_tensor": all_gather_into_tensor,
        "all_gather_single": all_gather_into_tensor,
        "reduce_scatter_tensor": reduce_scatter_tensor,
        "reduce_scatter_single": reduce_scatter_tensor,
        "all_to_all_single": all_to_all_single,
    }
    # torch 2.13 has them all.
    replaced = {name: function for name, function in replaced.items() if hasattr(dist, name)}
    originals = {name: getattr(dist, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(dist, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
