"""The attention backend over transformer-engine."""

from model.attention_backends.backend import Attend, Backend
from model.scoring import PLAIN, Scoring


def make_te(_crossover: int) -> Attend:
    """Make the attend function."""
    from transformer_engine.pytorch import DotProductAttention

    modules = {}  # a module is made for one shape of heads, one mask and one scale

    def attend(q, k, v, documents, scoring=PLAIN, sinks=None, /):
        assert scoring == Scoring(scale=scoring.scale), "Backend.missing was asked before"
        assert sinks is None, "Backend.missing was asked before"
        # A document that began on an earlier rank has more keys than queries.
        has_all_keys = documents.bounds_q == documents.bounds_k
        mask = "padding_causal" if has_all_keys else "padding_causal_bottom_right"
        key = (q.shape[1], k.shape[1], q.shape[2], mask, scoring.scale)
        if key not in modules:
            modules[key] = DotProductAttention(
                q.shape[1],
                q.shape[2],
                num_gqa_groups=k.shape[1],
                qkv_format="thd",
                attn_mask_type=mask,
                attention_dropout=0.0,
                softmax_scale=scoring.scale,
            )
        out = modules[key](
            q,
            k,
            v,
            cu_seqlens_q=documents.cu_q,
            cu_seqlens_kv=documents.cu_k,
            max_seqlen_q=documents.max_q,
            max_seqlen_kv=documents.max_k,
        )
        return out.view(q.shape)

    return attend


BACKEND = Backend(
    name="te",
    make=make_te,
    modules=("transformer_engine",),
    keeps_graph=False,
    why_not_scored=lambda needs, _: f"{needs.named()} are not proven with transformer-engine",
)
