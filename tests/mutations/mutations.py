"""Known bugs of this field, each as a change of one function, and the parity case that must notice
it.

Sources: the issue trackers of Megatron-LM, DeepSpeed, VeOmni, verl, trl, axolotl, torchtitan and
others.
"""

import dataclasses
import importlib
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

from data.batch import IGNORE
from model import parts
from model.activation_memory.settings import MemorySettings
from tests.dist.parity import Case

UNTIED = dict(untie_embeddings_and_output_weights=True)
MANY_KV = dict(num_attention_heads=4, num_query_groups=4)
OTHER_PARTS = Case(
    tp=2,
    model=dict(
        norm_placement="post",
        qk_layernorm=True,
        qk_layernorm_scope="all_heads",
        residual_multiplier=0.4,
        window_size=[4, 0],
        window_attn_skip_freq=[2],
        window_rotary_base=100.0,
    ),
    memory=MemorySettings("full"),
)
"""Layers of parts that Llama does not have."""
DEALT = Case(dp=2, meeting="microbatch")

MUON = Case(dp=2, steps=2, optimizer=dict(optimizer="muon"))
"""Each rank holds half of the rows of every matrix."""


@dataclasses.dataclass(frozen=True)
class Mutation:
    """`replace(original)` takes the place of `module.name` (a dotted name may go through a
    class)."""

    module: str
    name: str
    replace: Callable
    case: Case

    @contextmanager
    def applied(self):
        owner = importlib.import_module(self.module)
        *path, leaf = self.name.split(".")
        for part in path:
            owner = getattr(owner, part)
        original = owner.__dict__[leaf]
        plain = original.__func__ if isinstance(original, staticmethod) else original
        mutated = self.replace(plain)
        setattr(
            owner, leaf, staticmethod(mutated) if isinstance(original, staticmethod) else mutated
        )
        try:
            yield
        finally:
            setattr(owner, leaf, original)


def orthogonalized_by_halves(original):
    """The rows of each of two ranks by themselves."""

    def mutated(blocks, steps):
        halves = [block.chunk(2, dim=1) for block in blocks]
        return [torch.cat(original(pair, steps), dim=1) for pair in halves]

    return mutated


def embedding_among_the_hidden(original):
    def mutated(row, model, config):
        row = row._replace(role="hidden") if row.role == "embedding" else row
        return original(row, model, config)

    return mutated


def change_batch(change: Callable) -> Callable:
    """A `read_batch` whose result goes through `change(batch, samples, pieces)`."""

    def replace(original):
        def mutated(samples, seq_length, pieces, **options):
            return change(original(samples, seq_length, pieces, **options), samples, pieces)

        return mutated

    return replace


def change_dealing(change: Callable) -> Callable:
    """A `Loader._deal` whose slots go through `change(slots, dp_rank)`."""

    def replace(original):
        def mutated(self, number):
            dealt = original(self, number)
            return dataclasses.replace(dealt, slots=change(dealt.slots, self.dp_rank))

        return mutated

    return replace


def labels_shifted_after_slicing(batch, *_):
    labels = torch.cat([batch.tokens[1:], torch.tensor([IGNORE])])
    return dataclasses.replace(
        batch, labels=torch.where(batch.labels == IGNORE, IGNORE, labels), num_targets=-1
    )


def labels_across_documents(batch, samples, pieces):
    tokens = np.concatenate(
        [stream.read(intervals[0, 0] + 1, intervals[0, 1]) for stream, intervals, *_ in samples]
    )
    labels = np.concatenate([tokens[low:high] for low, high in pieces])
    return dataclasses.replace(batch, labels=torch.from_numpy(labels), num_targets=-1)


def window_across_documents(original):
    """All documents of a call as one."""

    def mutated(q, k, v, rows_q, rows_k, *scoring):
        whole_q = slice(rows_q[0].start, rows_q[-1].stop)
        whole_k = slice(rows_k[0].start, rows_k[-1].stop)
        return original(q, k, v, [whole_q], [whole_k], *scoring)

    return mutated


def norm_before_the_sum(original):
    """Each tp rank norms its part of what the MLP adds."""

    def mutated(layer, a_tD, settings):
        added_tD = layer.mlp(parts.enter_tensor_parallel(a_tD, layer.layout), settings.mlp_tiles)
        return parts.leave_tensor_parallel(layer.mlp_post_norm(added_tD), layer.layout)

    return mutated


def multiplier_of_one(original):
    """The second half's hand-written backward without residual_multiplier."""

    def mutated(layer, *args):
        kept = layer.residual_multiplier
        layer.residual_multiplier = 1.0
        try:
            return original(layer, *args)
        finally:
            layer.residual_multiplier = kept

    return mutated


def ropes_swapped(original):
    swapped = {"main": "window", "window": "main"}
    return property(lambda self: tuple(swapped[kind] for kind in original.fget(self)))


def sinks_of_the_next_rank(original):
    def mutated(self, sinks, split):
        axis = self.layout.cp_a2a
        start, stop = split.query[(axis.rank + 1) % axis.size]
        return sinks[start:stop]

    return mutated


def no_sinks_in_the_first_layer(original):
    """So low that they count for nothing; the parameter is still in the graph."""

    def mutated(self):
        weights = original(self)
        return weights if self.number else weights._replace(sinks=weights.sinks * 0 - 1e4)

    return mutated


def last_part_only(original):
    def mutated(self, *part):
        self.sum_m = None
        original(self, *part)

    return mutated


def one_big_document(batch, *_):
    total = int(batch.cu_seqlens[-1])
    return dataclasses.replace(batch, cu_seqlens=torch.tensor([0, total], dtype=torch.int32))


def positions_of_the_sample(batch, samples, pieces):
    return dataclasses.replace(
        batch, positions=torch.cat([torch.arange(low, high) for low, high in pieces])
    )


def positions_from_the_slice(batch, *_):
    starts_here = batch.positions.clone()
    first = int(starts_here[0])
    until = next((i for i, p in enumerate(starts_here.tolist()) if i and p == 0), len(starts_here))
    starts_here[:until] -= first
    return dataclasses.replace(batch, positions=starts_here)


def local_target_count(original):
    return lambda microbatches, layout: torch.tensor(
        sum(batch.num_targets for batch in microbatches)
    )


def count_over_dp_only(original):
    def mutated(microbatches, layout):
        return original(microbatches, dataclasses.replace(layout, dp_cp=layout.dp))

    return mutated


def averaged_gradients(original):
    def mutated(module, blocks, layout, *rest, **options):
        from torch.distributed.fsdp import FSDPModule

        original(module, blocks, layout, *rest, **options)
        for unit in module.modules():
            if isinstance(unit, FSDPModule):
                unit.set_gradient_divide_factor(float(layout.dp_cp.size))

    return mutated


def last_chunk_only(original):
    def mutated(ctx, grad):
        ctx.sum_tD.zero_()
        return original(ctx, grad)

    return mutated


def without_max(original):
    import torch.distributed as dist

    def mutated(x, axis, op=dist.ReduceOp.SUM):
        return x if op == dist.ReduceOp.MAX else original(x, axis, op)

    return mutated


def last_microbatch_not_reduced(original):
    def mutated(module, strategy, is_last):
        original(module, strategy, is_last=is_last)
        module.set_requires_gradient_sync(not is_last)

    return mutated


def fan_in_of_this_rank(original):
    """Scale o and down by their columns on this rank."""

    def mutated(config, fan_in):
        ratio = original(config, fan_in)
        return ratio if fan_in == "hidden" else ratio / torch.distributed.get_world_size()

    return mutated


def norm_of_this_rank(original):
    def mutated(stages, layout):
        grads = [p.grad.to_local() for stage in stages for p in stage.parameters()]
        return torch.nn.utils.get_total_norm(grads).double()

    return mutated


def scaled_gradients(original):
    def mutated(name):
        return lambda *args, **options: original(name)(*args, **(options | dict(scale_grads=True)))

    return mutated


def not_reduced_at_all(original):
    from torch.distributed.fsdp import FSDPModule

    class OwnPart:
        def allocate(self, size, *, dtype, device):
            return torch.empty(*size, dtype=dtype, device=device)

        def __call__(self, output_tensor, input_tensor, group, **_):
            output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])

    def mutated(*arguments, **options):
        module = arguments[0]
        original(*arguments, **options)
        for unit in module.modules():
            if isinstance(unit, FSDPModule):
                unit.set_custom_reduce_scatter(OwnPart())

    return mutated


def keys_in_the_order_of_groups(original):
    def mutated(k, v, axis):
        from parallel.collectives import gather_sequence

        return gather_sequence(k, axis), gather_sequence(v, axis)

    return mutated


def gathered_gradient_of_the_own_group(original):
    """The gradient of a gathered key is taken from this group's queries only."""

    def mutated(grad, axis):
        rows = grad.shape[0] // axis.size
        return original(grad, axis) * 0 + grad[axis.rank * rows : (axis.rank + 1) * rows]

    return mutated


def contiguous_pieces(original):
    def mutated(total, layout):
        share = total // layout.cp.size
        return [(layout.cp.rank * share, (layout.cp.rank + 1) * share)]

    return mutated


def watched_over_dp_only(original):
    def mutated(self, is_good):
        self.layout = dataclasses.replace(self.layout, world=self.layout.dp)
        return original(self, is_good)

    return mutated


ACROSS_EDGES = Case(cp=2, model=UNTIED)
SINKS = Case(cp=2, model=dict(softmax_type="learnable"))
TWO_LEVELS = Case(cp=4, context_levels=(2, 2))
MUTATIONS = {
    "loss divided by this rank's targets (Megatron-LM#7513)": Mutation(
        "pretrain.step", "count_targets", local_target_count, ACROSS_EDGES
    ),
    "targets counted over dp without cp (VeOmni#338)": Mutation(
        "pretrain.step", "count_targets", count_over_dp_only, ACROSS_EDGES
    ),
    "gradients averaged over cp instead of summed (verl#2857)": Mutation(
        "model.build", "shard_module", averaged_gradients, ACROSS_EDGES
    ),
    "labels shifted after slicing (verl#5227)": Mutation(
        "data.loader", "read_batch", change_batch(labels_shifted_after_slicing), ACROSS_EDGES
    ),
    "targets across documents": Mutation(
        "data.loader", "read_batch", change_batch(labels_across_documents), ACROSS_EDGES
    ),
    "attention across documents (trl#6843)": Mutation(
        "data.loader", "read_batch", change_batch(one_big_document), ACROSS_EDGES
    ),
    "attention kernel without the documents' boundaries (axolotl#3608)": Mutation(
        "model.gpt",
        "pack_documents",
        lambda original: (
            lambda cu_seqlens, pieces, device: original(cu_seqlens[[0, -1]], pieces, device)
        ),
        ACROSS_EDGES,
    ),
    "positions of the sample, not the document (torchtitan#2559)": Mutation(
        "data.loader", "read_batch", change_batch(positions_of_the_sample), ACROSS_EDGES
    ),
    "positions that restart at the slice (Megatron-LM#5243)": Mutation(
        "data.loader", "read_batch", change_batch(positions_from_the_slice), ACROSS_EDGES
    ),
    "heads in the wrong order after the exchange": Mutation(
        "model.attention",
        "heads_to_seq",
        lambda original: lambda o, split, axis: original(o, split, axis).flip(1),
        Case(cp=2, model=MANY_KV),
    ),
    "gradient of a shared key/value head overwritten, not summed": Mutation(
        "parallel.ulysses",
        "_store",
        lambda original: (
            lambda grad, block, start, stop, written: original(grad, block, start, stop, 0)
        ),
        Case(cp=4),
    ),
    "query heads paired with the wrong key/value head": Mutation(
        "model.attention_core",
        "_repeat_heads",
        lambda original: lambda x_TkH, uses: original(x_TkH, uses[::-1]),
        Case(
            cp=3,
            seq_length=36,
            model=dict(num_attention_heads=8, num_query_groups=2, hidden_size=64),
        ),
    ),
    "partial gradient of a replicated parameter not reduced over tp": Mutation(
        "model.parts",
        "local_part",
        lambda original: lambda parameter, **options: original(parameter),
        Case(tp=2, model=dict(qk_layernorm=True)),
    ),
    "replicated parameter counted on every tp rank in the norm (Megatron-LM#7452)": Mutation(
        "pretrain.step", "Shard", lambda original: object, Case(tp=2)
    ),
    "norm of this rank's gradients only": Mutation(
        "pretrain.step", "global_grad_norm", norm_of_this_rank, Case(dp=2)
    ),
    "no reduction of dx behind a column-parallel layer": Mutation(
        "model.parts", "copy_to", lambda original: lambda x, axis: x, Case(tp=2)
    ),
    "no sum over tp at all": Mutation(
        "parallel.collectives",
        "all_reduce",
        lambda original: lambda x, axis, *op: x if axis.name == "tp" else original(x, axis, *op),
        Case(tp=2, cp=2),
    ),
    "norm weights not reduced under sequence parallelism (Megatron-LM#7452)": Mutation(
        "model.build",
        "shardings_for",
        lambda original: (
            lambda names, config, tp, sequence_parallel: original(names, config, tp, False)
        ),
        Case(tp=2, sequence_parallel=True),
    ),
    "muP by what a rank's own columns sum": Mutation(
        "model.config",
        "ModelConfig.fan_in_ratio",
        fan_in_of_this_rank,
        Case(tp=2, model=dict(use_mup=True, mup_base_hidden_size=8)),
    ),
    "window a token too long": Mutation(
        "model.config",
        "ModelConfig.windows",
        lambda original: property(lambda self: (self.window_size[0] + 2,) * self.num_layers),
        Case(tp=2, model=dict(window_size=[4, 0])),
    ),
    "window left out of the first layer": Mutation(
        "model.config",
        "ModelConfig.windows",
        lambda original: property(lambda self: (None, *original.fget(self)[1:])),
        Case(cp=2, model=dict(window_size=[4, 0])),
    ),
    "sinks of another rank's heads": Mutation(
        "model.attention_core", "AttentionCore.sinks_here", sinks_of_the_next_rank, SINKS
    ),
    "sinks ignored in one layer": Mutation(
        "model.attention", "Attention._projections", no_sinks_in_the_first_layer, SINKS
    ),
    "gradient of the sinks from the last document only": Mutation(
        "model.attention_backends.sinks", "SinkGradients.add", last_part_only, SINKS
    ),
    "cap on the scores ignored in the gradient": Mutation(
        "model.attention_backends.tiled",
        "_scores",
        lambda original: lambda *given, **options: (original(*given, **options)[0], None),
        Case(tp=2, model=dict(attn_logit_softcapping=0.7)),
    ),
    "cap on the logits ignored in the gradient": Mutation(
        "model.loss",
        "_cap_",
        lambda original: lambda logits, cap: (original(logits, cap)[0], torch.ones_like(logits)),
        Case(tp=2, model=dict(final_logit_softcapping=0.9)),
    ),
    "window across documents": Mutation(
        "model.attention_backends.sdpa",
        "windowed_attention",
        window_across_documents,
        Case(tp=2, model=dict(window_size=[4, 0])),
    ),
    "norm after the MLP before the sum over tp": Mutation(
        "model.gpt", "Layer._added_by_mlp", norm_before_the_sum, OTHER_PARTS
    ),
    "norm over all heads by each tp rank for its own": Mutation(
        "model.norm_over_heads",
        "_mean_over",
        lambda original: lambda own_t1, tp: own_t1,
        OTHER_PARTS,
    ),
    "residual multiplier left out of the MLP's hand-written backward": Mutation(
        "model.gpt", "Layer.mlp_gradient", multiplier_of_one, OTHER_PARTS
    ),
    "ropes of layers with a window and without swapped": Mutation(
        "model.config", "ModelConfig.layer_ropes", ropes_swapped, OTHER_PARTS
    ),
    "tied embedding's two gradients not summed": Mutation(
        "pretrain.step",
        "sum_tied_gradients",
        lambda original: lambda stages, layout: None,
        Case(pp=2),
    ),
    "tied embedding's two gradients not summed on the rank that holds both": Mutation(
        "pretrain.step",
        "sum_tied_gradients",
        lambda original: lambda stages, layout: None,
        Case(pp=2, schedule="ZBV", model=dict(num_layers=4)),
    ),
    "tied embedding counted twice in the norm": Mutation(
        "pretrain.step",
        "global_grad_norm",
        lambda original: (
            lambda stages, layout: original(
                [
                    SimpleNamespace(is_first=True, named_parameters=stage.named_parameters)
                    for stage in stages
                ],
                layout,
            )
        ),
        Case(pp=2, schedule="ZBV", model=dict(num_layers=4)),
    ),
    "norm without the other pipeline stages (wrong group)": Mutation(
        "pretrain.step",
        "global_grad_norm",
        lambda original: (
            lambda stages, layout: original(stages, dataclasses.replace(layout, world=layout.dp_cp))
        ),
        Case(pp=2, cp=2),
    ),
    "gradients not reduced over cp (VeOmni#1059)": Mutation(
        "model.build", "shard_module", not_reduced_at_all, ACROSS_EDGES
    ),
    "gathered keys in the order of the groups, not of the tokens": Mutation(
        "model.attention_core", "gather_keys", keys_in_the_order_of_groups, TWO_LEVELS
    ),
    "gradient of a gathered key from one group only": Mutation(
        "parallel.collectives",
        "reduce_scatter_rows",
        gathered_gradient_of_the_own_group,
        TWO_LEVELS,
    ),
    "contiguous slices under the balanced order of two levels": Mutation(
        "tests.dist.parity", "token_pieces", contiguous_pieces, TWO_LEVELS
    ),
    "heads exchanged between the groups and keys gathered inside them (wrong group)": Mutation(
        "tests.dist.parity",
        "build_stages",
        lambda original: (
            lambda config, vocab_size, layout, *args, **options: original(
                config,
                vocab_size,
                dataclasses.replace(layout, cp_a2a=layout.cp_gather, cp_gather=layout.cp_a2a),
                *args,
                **options,
            )
        ),
        TWO_LEVELS,
    ),
    "data ranks deal a step's samples differently": Mutation(
        "data.loader",
        "Loader._deal",
        change_dealing(lambda slots, dp_rank: np.roll(slots, dp_rank)),
        DEALT,
    ),
    "a sample dealt twice and another one not at all": Mutation(
        "data.loader",
        "Loader._deal",
        change_dealing(lambda slots, _: np.where(slots == 3, 2, slots)),
        DEALT,
    ),
    "gradients divided by the number of microbatches under pp": Mutation(
        "parallel.pipeline", "torch_schedule", scaled_gradients, Case(pp=2)
    ),
    "the last microbatch's gradient not reduced": Mutation(
        "pretrain.step", "set_microbatch", last_microbatch_not_reduced, Case(dp=2)
    ),
    "softmax maximum of this tp rank only": Mutation(
        "model.loss", "all_reduce", without_max, Case(tp=2)
    ),
    "padded rows of the vocabulary take part in the softmax (Megatron-Bridge#5375)": Mutation(
        "model.gpt",
        "LossSettings",
        lambda original: lambda tp, _vocab_size, *others: original(tp, 1 << 30, *others),
        Case(tp=2),
    ),
    "the last tokens of an MLP in tiles dropped (TransformerEngine#1930)": Mutation(
        "model.mlp",
        "_tiles",
        lambda original: lambda total, count: original(total - total % count, count),
        Case(cp=2, memory=MemorySettings(mlp_tiles=3)),
    ),
    "gradient of the input from the last group of heads only": Mutation(
        "model.attention_chunks",
        "_Linear.backward",
        last_chunk_only,
        Case(cp=2, model=MANY_KV, memory=MemorySettings(attention_head_chunks=2)),
    ),
    "largest logits of this data rank's documents only": Mutation(
        "pretrain.qk_clip",
        "all_reduce",
        lambda original: lambda x, axis, op: x,
        Case(dp=2, qk_clip=0.5),
    ),
    "largest logits not compared over cp": Mutation(
        "pretrain.qk_clip",
        "LogitWatch.after_update",
        watched_over_dp_only,
        Case(cp=2, context_levels=(1, 2), qk_clip=0.5),
    ),
    "rows of q and k scaled by the factors of other heads": Mutation(
        "pretrain.qk_clip",
        "_own_rows",
        lambda original: lambda parameter, layout: original(parameter, layout) * 0,
        Case(tp=2, qk_clip=0.5),
    ),
    "Muon: a rank's own rows orthogonalized by themselves": Mutation(
        "pretrain.muon.muon", "orthogonalize_all", orthogonalized_by_halves, MUON
    ),
    "Muon: the update's scale by its rows, where it is wider": Mutation(
        "pretrain.muon.muon",
        "scale_of",
        lambda original: lambda rows, columns, *others: original(rows, rows, *others),
        MUON,
    ),
    "Muon: the rows of an update given back in another order": Mutation(
        "pretrain.muon.exchange",
        "Bucket.shards_of",
        lambda original: (
            lambda bucket, pieces, like: [shard.flip(0) for shard in original(bucket, pieces, like)]
        ),
        MUON,
    ),
    "Muon: the embedding among the hidden matrices": Mutation(
        "pretrain.parameter_groups", "_treatment", embedding_among_the_hidden, MUON
    ),
}
