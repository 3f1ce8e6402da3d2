"""One training step on any layout, with everything that a single process can be compared on."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from data.dealing import Dealing, Meeting
from data.loader import Loader
from data.mixture import fresh_mixture
from data.stream import DocumentStream
from model.build import build_stages
from model.config import ModelConfig
from model.init import initialize
from model.attention_backends.choice import choose_attention
from model.activation_memory.settings import MemorySettings
from parallel.config import LayoutConfig
from parallel.context import token_pieces
from parallel.layout import World, build_layout
from pretrain.config.config import OptimizerConfig
from pretrain.checkpointing.replicas import check_replicas
from pretrain.optimizer import build_optimizer
from pretrain.qk_clip import LogitWatch
from pretrain.planner.model_size import document_cost_of
from pretrain.step import Stepper, train_step
from tools.plan_verify.recorder import Recorder
from tests.documents import Documents

VOCABULARY = 101  # no multiple of the padding: the last rows of the embedding hold no token
TOLERANCE = 1e-10
"""Largest absolute error over the tensor's largest absolute value, in fp64."""


def memory_stream(lengths: tuple[int, ...], seed: int) -> DocumentStream:
    """Random documents of lengths chosen so that they cross slice edges."""
    generator = np.random.default_rng(7)
    return DocumentStream(
        Documents(lengths, lambda _, n: generator.integers(0, VOCABULARY, size=n)), None, seed
    )


@dataclass(frozen=True)
class Case:
    """A layout, a model and a batch."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    schedule: str | None = None
    stages_per_rank: int | None = None
    context_levels: tuple[int, ...] = ()
    strategy: str = "optim_grads"
    model: dict = field(default_factory=dict)
    lengths: tuple[int, ...] = (1, 5, 40, 3, 17, 64, 2, 2, 90, 11, 1, 30)
    seq_length: int = 32
    micro_batch_size: int = 1
    samples: int = 8
    document_masking: bool = True
    memory: MemorySettings = MemorySettings()
    sequence_parallel: bool = False
    clip_grad: float = 1.0
    qk_clip: float | None = None
    steps: int = 1
    optimizer: dict = field(default_factory=dict)
    """Settings of the optimizer."""
    meeting: Meeting | None = None
    """Samples are dealt by their cost, to ranks that meet as often; None = in their order."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def single(self) -> "Case":
        """The same model and batch in one process."""
        return Case(
            model=self.model,
            lengths=self.lengths,
            seq_length=self.seq_length,
            samples=self.samples,
            document_masking=self.document_masking,
            clip_grad=self.clip_grad,
            qk_clip=self.qk_clip,
            steps=self.steps,
            optimizer=self.optimizer,
        )

    def model_config(self) -> ModelConfig:
        # Large initial weights: small ones would make every layer nearly the identity.
        shape = dict(
            num_layers=3,
            hidden_size=32,
            ffn_hidden_size=48,
            num_attention_heads=4,
            num_query_groups=2,
            init_method_std=0.2,
        )
        return ModelConfig(**(shape | self.model))

    def layout_config(self) -> LayoutConfig:
        return LayoutConfig(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            context_parallel_size=self.cp,
            pipeline_schedule=self.schedule,
            num_virtual_stages_per_pipeline_rank=self.stages_per_rank,
            cp_comm_type="a2a+allgather" if self.context_levels else "a2a",
            hierarchical_context_parallel_sizes=list(self.context_levels),
            sequence_parallel=self.sequence_parallel,
            data_parallel_sharding_strategy=self.strategy,
        )

    def build(self, world: World, seed: int = 1234, master=torch.float64, compute=torch.float64):
        """(layout, stages, optimizer, stepper, loader) as the trainer makes them."""
        layout = build_layout(self.layout_config(), world)
        attend, _ = choose_attention("auto", layout.device, compute)
        config = self.model_config()
        stages = build_stages(
            config,
            VOCABULARY,
            layout,
            attend,
            strategy=self.strategy,
            master_dtype=master,
            compute_dtype=compute,
        )
        initialize(stages, config, layout, seed)
        for stage in stages:
            stage.memory = self.memory
        watch = None
        if self.qk_clip is not None:
            watch = LogitWatch(stages, config, layout, compute, threshold=self.qk_clip)
        stepper = Stepper(
            stages, layout, config.hidden_size, compute, self.strategy, logit_watch=watch
        )
        dealing = None
        if self.meeting is not None:
            dealing = Dealing(document_cost_of(config, VOCABULARY), self.meeting)
        mixture = fresh_mixture([(1.0, memory_stream(self.lengths, seed))], self.seq_length)
        loader = Loader(
            mixture,
            micro_batch_size=self.micro_batch_size,
            global_batch_tokens=self.samples * self.seq_length,
            dp_rank=layout.dp.rank,
            dp_size=layout.dp.size,
            pieces=token_pieces(self.seq_length * self.micro_batch_size, layout),
            document_masking=self.document_masking,
            eod=None,
            eod_mask_loss=False,
            vocab_size=VOCABULARY,
            dealing=dealing,
        )
        optimizer = build_optimizer(stages, config, OptimizerConfig(lr=1e-3, **self.optimizer))
        return layout, stages, optimizer, stepper, loader


def named(stages: list, attribute: str | None = None) -> list[tuple[str, torch.Tensor]]:
    """(name, parameter, or that attribute of it) over all stages of a rank."""
    pairs = [pair for stage in stages for pair in stage.named_parameters()]
    return [(name, getattr(p, attribute) if attribute else p) for name, p in pairs]


def run_step(world: World, case: Case) -> dict:
    """Optimizer steps and an evaluation -> the last loss and norm, targets, valid, whole tensors by
    name.

    Gradients are those of the first step (clipped), weights those after the last.
    """
    return run_built(case, case.build(world))


def run_built(case: Case, built: tuple, recorder: Recorder | None = None) -> dict:
    """`run_step` on what `case.build` made; the recorder notes the collectives of the steps."""
    layout, stages, optimizer, stepper, loader = built
    gradients = {}

    def capture(*_):
        if not gradients:
            gradients.update(
                {name: grad.full_tensor().numpy() for name, grad in named(stages, "grad")}
            )

    optimizer.register_step_pre_hook(capture)
    batch_tokens = case.samples * case.seq_length
    clipped = []
    for step in range(case.steps):
        with recorder if recorder and step < 2 else nullcontext():
            result = train_step(
                stepper, optimizer, loader.read(step * batch_tokens), 1e-3, case.clip_grad
            )
        clipped.append(result.qk_clipped_heads)
        if recorder:
            recorder.step += 1
    weights = {name: p.full_tensor().detach().numpy() for name, p in named(stages)}
    drift = ""
    try:
        check_replicas(stages, layout)
    except RuntimeError as error:
        drift = str(error)
    watch = stepper.logit_watch
    assert (watch is None) == (case.qk_clip is None), "the stepper and the case differ"
    largest = None if watch is None else watch.largest.values_LN.numpy().copy()
    with recorder or nullcontext():
        valid, _ = stepper.run(loader.read(case.steps * batch_tokens), train=False)
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "num_targets": result.num_targets,
        "valid": valid,
        "largest_logits": largest,
        "clipped": clipped,
        "gradients": gradients,
        "weights": weights,
        "drift": drift,
    }


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute error over the largest absolute value."""
    assert found.shape == expected.shape and np.isfinite(found).all()
    largest = np.abs(expected).max()
    assert largest > 0, "comparing with zeros proves nothing"
    return float(np.abs(found - expected).max() / largest)


def compare(results: list[dict], expected: dict) -> None:
    """Assert that every rank's view equals the single process."""
    names = set()
    for rank, result in enumerate(results):
        assert result["num_targets"] == expected["num_targets"], (
            f"rank {rank}: {result['num_targets']} targets, expected {expected['num_targets']}"
        )
        for key in ("loss", "grad_norm", "valid"):
            assert abs(result[key] - expected[key]) <= TOLERANCE * abs(expected[key]), (
                f"rank {rank}: {key} {result[key]}, expected {expected[key]}"
            )
        if expected["largest_logits"] is not None:
            error = relative_error(result["largest_logits"], expected["largest_logits"])
            assert error <= TOLERANCE, f"rank {rank}: largest logits: relative error {error:.1e}"
            assert result["clipped"] == expected["clipped"] and any(expected["clipped"]), (
                f"rank {rank}: {result['clipped']} heads clipped, expected {expected['clipped']}"
            )
        for kind in ("gradients", "weights"):
            for name, tensor in result[kind].items():
                error = relative_error(tensor, expected[kind][name])
                assert error <= TOLERANCE, (
                    f"rank {rank}: {kind} of {name}: relative error {error:.1e}"
                )
                names.add((kind, name))
    missing = {(kind, name) for kind in ("gradients", "weights") for name in expected[kind]} - names
    assert not missing, f"no rank holds {sorted(missing)[:5]}"


def check_replicas_equal(results: list[dict]) -> None:
    """Assert that every rank that holds a weight has the same bits."""
    holders = {}
    for result in results:
        assert not result["drift"], result["drift"]
        for name, tensor in result["weights"].items():
            first = holders.setdefault(name, tensor)
            assert np.array_equal(tensor, first), f"replicas of {name} drifted apart"
