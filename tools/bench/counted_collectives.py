"""Count the bytes that all-to-all sends to other ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """Count the bytes to other ranks of each all-to-all through torch.distributed meanwhile.

    deepspeed.comm wraps it. Any other collective is an error: it would not be counted.
    """
    sent: list[int] = []
    single = dist.all_to_all_single
    several = dist.all_to_all

    def all_to_all_single(
        output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False
    ):
        size = dist.get_world_size(group)
        rows = input_split_sizes or [len(input) // size] * size
        # What a rank keeps is not sent.
        rows_sent = sum(rows) - rows[dist.get_rank(group)]
        sent.append(rows_sent * input[0].numel() * input.element_size())
        return single(output, input, output_split_sizes, input_split_sizes, group, async_op)

    def all_to_all(output_tensor_list, input_tensor_list, group=None, async_op=False):
        mine = dist.get_rank(group)
        sent.append(sum(x.nbytes for peer, x in enumerate(input_tensor_list) if peer != mine))
        return several(output_tensor_list, input_tensor_list, group, async_op)

    def refuse(*_, **__):
        raise AssertionError("a collective that the benchmark does not count")

    others = (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "broadcast",
        "gather",
        "scatter",
        "send",
        "recv",
        "isend",
        "irecv",
        "batch_isend_irecv",
    )
    # Any collective that is not counted ends the benchmark.
    wrapped = {
        "all_to_all_single": all_to_all_single,
        "all_to_all": all_to_all,
        **dict.fromkeys(others, refuse),
    }
    originals = {name: getattr(dist, name) for name in wrapped}
    try:
        for name, function in wrapped.items():
            setattr(dist, name, function)
        yield sent
    finally:
        # Whatever happened inside, torch.distributed is as it was.
        for name, function in originals.items():
            setattr(dist, name, function)
