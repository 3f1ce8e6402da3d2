"""An independent oracle: transformers trained by plain PyTorch gives the same loss curve as our
trainer.

The oracle shares only the data pipeline with us (labels and document pieces;
tests/unit/test_batch.py checks those against the definition): each document piece of a sample goes
through transformers by itself, the losses are summed and divided by the number of targets, and
torch.optim.AdamW updates. Both in fp64.
"""

import numpy as np
import pytest
import torch

from data.batch import IGNORE, read_batch
from model.hf.architecture import VOCABULARY_ROWS
from model.hf.choice import architecture_of
from model.hf.config_json import huggingface_config
from model.rope import Rope
from parallel.layout import World
from pretrain.config.config import OptimizerConfig
from pretrain.step import train_step
from tests.dist.parity import VOCABULARY, Case, memory_stream, named
from tests.documents import windows
from tests.marks import cases

STEPS = 20
LEARNING_RATE = 3e-3


def our_curve(world: World, case: Case) -> tuple[list[float], dict]:
    """(losses of 20 steps, initial weights by name) on the case's layout."""
    _, stages, optimizer, stepper, loader = case.build(world)
    weights = {name: p.full_tensor().detach().numpy().copy() for name, p in named(stages)}
    losses = [
        train_step(
            stepper, optimizer, loader.read(step * loader.global_batch_tokens), LEARNING_RATE, 1.0
        ).loss
        for step in range(STEPS)
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
    model = model.to(torch.float64)
    state = {
        architecture.huggingface_name(name): torch.from_numpy(
            tensor[:VOCABULARY] if name in VOCABULARY_ROWS else tensor
        )
        for name, tensor in weights.items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm_in_fp64.__get__(module)
    return model


def norm_in_fp64(self, x):
    """transformers' RMSNorm casts to fp32; here it stays in fp64."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def oracle_curve(case: Case, weights: dict) -> list[float]:
    model = oracle_model(case, weights)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    ours = OptimizerConfig()
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": ours.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(ours.adam_beta1, ours.adam_beta2),
        eps=ours.adam_eps,
    )
    stream = memory_stream(case.lengths, 1234)
    losses = []
    for step in range(STEPS):
        loss = 0.0
        targets = 0
        for sample in range(case.samples):
            start = (step * case.samples + sample) * case.seq_length
            batch = read_batch(windows(stream, [start], case.seq_length), case.seq_length)
            bounds = batch.cu_seqlens.tolist()
            for a, b in zip(bounds, bounds[1:], strict=False):
                logits = model(input_ids=batch.tokens[None, a:b], use_cache=False).logits[0]
                loss = loss + torch.nn.functional.cross_entropy(
                    logits, batch.labels[a:b], ignore_index=IGNORE, reduction="sum"
                )
                targets += int((batch.labels[a:b] != IGNORE).sum())
        loss = loss / targets
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


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


@pytest.mark.parametrize("name", cases(CASES, lambda name: "zero3" in name))
def test_loss_curve_equals_transformers(pool, name):
    case = CASES[name]
    results = pool.run(our_curve, case.world_size, case)
    weights = {name: tensor for _, part in results for name, tensor in part.items()}
    expected = oracle_curve(case, weights)
    assert expected[-1] < 0.9 * expected[0], "the curve must go somewhere"
    for losses, _ in results:
        worst = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
        assert worst < 1e-10, f"relative error {worst:.1e}"
