"""Recompute levels and offload on a GPU: the same gradients, and less memory."""

import pytest
import torch
from torch import nn

from model.config import ModelConfig
from model.gpt import GPTStage
from model.kernels import choose_attention
from model.memory import MemorySettings
from parallel.layout import single_process_layout

pytestmark = pytest.mark.gpu
LAYERS, TOKENS, WIDTH = 8, 8192, 1024
CONFIG = ModelConfig(num_layers=LAYERS, hidden_size=WIDTH, ffn_hidden_size=2816, num_attention_heads=16,
                     num_query_groups=4)


class Batch:
    def __init__(self, device: torch.device):
        generator = torch.Generator().manual_seed(1)
        self.tokens, self.labels = (torch.randint(500, (TOKENS,), generator=generator).to(device) for _ in range(2))
        self.positions = torch.cat([torch.arange(3000), torch.arange(TOKENS - 3000)]).to(device)
        self.cu_seqlens = torch.tensor([0, 3000, TOKENS], dtype=torch.int32)


def gradients(settings: MemorySettings) -> tuple[list[torch.Tensor], int]:
    """Gradients of all parameters, and the bytes at the peak above what was there before the forward."""
    device = torch.device("cuda", 0)
    attend, _ = choose_attention("auto", device, torch.bfloat16)
    stage = GPTStage(CONFIG, 500, single_process_layout(device), attend).bfloat16().to_empty(device=device)
    torch.manual_seed(0)
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.05)
    batch, stage.memory = Batch(device), settings
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stage.begin_step([batch], TOKENS)
    stage(torch.empty(0, device=device)).backward()
    torch.cuda.synchronize()
    return [p.grad for p in stage.parameters()], torch.cuda.max_memory_allocated() - before


@pytest.fixture(scope="module")
def plain():
    return gradients(MemorySettings())


@pytest.mark.parametrize("settings", [
    MemorySettings("selective"), MemorySettings("full"), MemorySettings("attention_kept"),
    MemorySettings("full", LAYERS), MemorySettings("attention_kept", LAYERS),
    MemorySettings("attention_kept", LAYERS - 2, 4, 4, 1024)], ids=str)
def test_the_gradients_are_those_without_any_of_it(plain, settings):
    for found, expected in zip(gradients(settings)[0], plain[0], strict=True):
        assert (found - expected).norm() <= 0.02 * expected.norm()


def test_attention_kept_adds_the_output_and_its_log_sum_exp_to_full():
    full, kept = (gradients(MemorySettings(level))[1] for level in ("full", "attention_kept"))
    of_layer = TOKENS * (WIDTH * 2 + CONFIG.num_attention_heads * 4)
    # full makes them for a layer at a time
    assert 0.9 * (LAYERS - 1) * of_layer < kept - full < 1.1 * LAYERS * of_layer


def test_offloaded_tensors_leave_the_gpu_and_come_back(plain):
    on_device, offloaded = (gradients(MemorySettings("attention_kept", count)) for count in (0, LAYERS))
    for found, expected in zip(offloaded[0], on_device[0], strict=True):
        assert (found - expected).norm() <= 0.02 * expected.norm()  # flash kernels add up dq in no fixed order
    kept = 2 * TOKENS * WIDTH * 2  # of a layer: its input and its attention's output, in bf16
    assert on_device[1] - offloaded[1] > 0.7 * (LAYERS - 3) * kept
