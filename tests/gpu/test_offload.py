"""Tensors that wait on the host: how many hold the device's memory meanwhile, and that they come
back as they went."""

import pytest
import torch

from model.activation_memory.offload import IN_FLIGHT, Host

pytestmark = pytest.mark.gpu
SENDS = 5
ELEMENTS = 2**20


@pytest.fixture
def host() -> Host:
    return Host(torch.device("cuda", 0))


def test_memory_is_given_up_send_by_send(host):
    released = []
    for number in range(SENDS):
        host.send(
            [torch.ones(ELEMENTS, device="cuda")], lambda number=number: released.append(number)
        )
        assert released == list(range(max(0, number + 1 - IN_FLIGHT)))
    host.finish_sending()
    assert released == list(range(SENDS)) and not host.in_flight


def test_at_most_the_sends_in_flight_hold_memory_although_the_host_runs_ahead(host):
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    large = 16 * ELEMENTS  # 64 MiB: a block of its own
    torch.cuda.reset_peak_memory_stats()
    for _ in range(SENDS):
        host.send([torch.ones(large, device="cuda")])
    host.finish_sending()
    assert torch.cuda.max_memory_reserved() - before <= (IN_FLIGHT + 1) * 4 * large


def test_what_was_sent_comes_back_in_reverse_order(host):
    copies = [
        host.send([torch.full((ELEMENTS,), float(number), device="cuda")])
        for number in range(SENDS)
    ]
    for number in reversed(range(SENDS)):
        (tensor,) = copies[number].take()
        assert tensor.is_cuda and tensor.unique().tolist() == [number]
    assert not host.in_flight


def test_a_forward_that_failed_leaves_nothing_in_flight(host):
    released = []
    host.send([torch.ones(ELEMENTS, device="cuda")], lambda: released.append(0))
    host.begin()
    assert released == [0] and not host.in_flight and host.latest is None
