"""An independent oracle: transformers trained by plain PyTorch gives the same loss curve as our
trainer (tests/dist/oracle.py). Both in fp64.
"""

import pytest
import torch

from model.hf.architecture import VOCABULARY_ROWS
from model.hf.choice import architecture_of
from model.hf.config_json import huggingface_config
from model.rope import Rope
from parallel.layout import World
from pretrain.step import train_step
from tests.dist.oracle import train_transformers, widen_parameters
from tests.dist.parity import VOCABULARY, Case, named
from tests.marks import cases

LEARNING_RATE = 3e-3


def our_curve(world: World, case: Case, steps: int) -> tuple[list[float], dict]:
    """(losses of the steps, initial weights by name) on the case's layout."""
    _, stages, optimizer, stepper, loader = case.build(world)
    weights = {name: p.full_tensor().detach().numpy().copy() for name, p in named(stages)}
    losses = [
        train_step(
            stepper, optimizer, loader.read(step * loader.global_batch_tokens), LEARNING_RATE, 1.0
        ).loss
        for step in range(steps)
    ]
    return losses, weights


def oracle_model(case: Case, weights: dict):
    """transformers' model in fp64 with our initial weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = case.model_config()
    architecture = architecture_of(config)
    settings = huggingface_config(
        architecture, config, VOCABULARY, Rope(), 4096, "float64", None
    )
    kind = settings.pop("model_type")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **settings), attn_implementation="sdpa"
    )
    widen_parameters(model)
    state = {
        architecture.huggingface_name(name): torch.from_numpy(
            tensor[:VOCABULARY] if name in VOCABULARY_ROWS else tensor
        )
        for name, tensor in weights.items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


CASES = {
    "llama tp2 pp2 cp2": Case(
        tp=2, pp=2, cp=2, model=dict(untie_embeddings_and_output_weights=True)
    ),
    "qwen3 tied tp2 cp2 dp2 zero3": Case(
        tp=2, cp=2, dp=2, strategy="optim_grads_params", model=dict(qk_layernorm=True)
    ),
    "mistral windows pp2 cp2": Case(pp=2, cp=2, model=dict(window_size=[4, 0])),
    "qwen3 windows in some layers tp2 cp2": Case(
        tp=2,
        cp=2,
        model=dict(qk_layernorm=True, window_size=[5, 0], window_attn_skip_freq=[2]),
    ),
}


@pytest.mark.parametrize("name", cases(CASES, lambda name: "zero3" in name or "some layers" in name))
@pytest.mark.parametrize("steps", [8, pytest.param(20, marks=pytest.mark.long)])
def test_loss_curve_equals_transformers(pool, name, steps):
    case = CASES[name]
    results = pool.run(our_curve, case.world_size, case, steps)
    weights = {name: tensor for _, part in results for name, tensor in part.items()}
    expected = train_transformers(oracle_model(case, weights), case, steps, LEARNING_RATE)
    assert expected[-1] < 0.9 * expected[0], "the curve must go somewhere"
    for losses, _ in results:
        worst = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
        assert worst < 1e-10, f"relative error {worst:.1e}"
