"""What a step moves beside its products and its attention: counted again, operator by operator."""

import pytest
import torch

from model.activation_memory.settings import MemorySettings
from parallel.config import LayoutConfig
from pretrain.planner.pointwise import WEIGHT, layer_bytes
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.workload import Workload
from tools.bench.contenders import Ours, make_sample, one_process, preset
from tools.bench.traffic import Traffic

VOCABULARY = 512
TOKENS = 512


OTHER_PARTS = dict(norm_placement="both", activation_func="gelu_tanh", residual_multiplier=0.4)


def counted(layers: int, dtype: str, recompute: str | None, parts: dict) -> tuple[float, int]:
    """(pointwise bytes of one step, parameters of the model)."""
    config = preset(
        "tiny",
        num_layers=layers,
        hidden_size=192,
        ffn_hidden_size=448,
        num_attention_heads=6,
        num_query_groups=3,
        kv_channels=32,
        recompute_granularity=recompute,
        **parts,
    )
    # Backward in this thread, where the mode sees it.
    with one_process() as layout, torch.autograd.set_multithreading_enabled(False):
        ours = Ours(config, VOCABULARY, dtype, layout, 0)
        sample = make_sample([TOKENS], VOCABULARY, 0)
        ours.step(sample)
        traffic = Traffic("cpu")
        with traffic:
            ours.step(sample)
        parameters = sum(each.numel() for each in ours.stages[0].parameters())
    return traffic.groups()["pointwise"], parameters


@pytest.mark.parametrize(
    "dtype, recompute, parts",
    [
        *[(dtype, level, {}) for dtype in ("bfloat16", "float32") for level in (None, "full")],
        ("bfloat16", "selective", OTHER_PARTS),
        ("float32", "full", OTHER_PARTS),
    ],
)
def test_a_layer_moves_what_the_table_says(dtype, recompute, parts):
    few, parameters_of_few = counted(1, dtype, recompute, parts)
    more, parameters_of_more = counted(3, dtype, recompute, parts)
    config = preset(
        "tiny",
        num_layers=1,
        hidden_size=192,
        ffn_hidden_size=448,
        num_attention_heads=6,
        num_query_groups=3,
        kv_channels=32,
        **parts,
    )
    model = MemoryModel(config, VOCABULARY, compute_bytes=2 if dtype == "bfloat16" else 4)
    load = Workload(LayoutConfig(), 1, TOKENS, 1, 1, MemorySettings(recompute))
    expected = 2 * layer_bytes(model, load) + WEIGHT * (parameters_of_more - parameters_of_few)
    assert more - few == pytest.approx(expected, rel=0.06)
