"""The attention backend over cuDNN's frontend, on packed documents.

It makes a plan for each new count of documents and longest document, so `auto` never takes it.
"""

from model.attention_backends.backend import Attend, Backend
from model.scoring import PLAIN, Scoring


def make_cudnn(_crossover: int) -> Attend:
    """Make the attend function."""
    # pyrefly: ignore[missing-import]  (an optional package)
    from cudnn import sdpa_torch

    def attend(q, k, v, documents, scoring=PLAIN, sinks=None, /):
        assert scoring == Scoring(scale=scoring.scale), "Backend.missing was asked before"
        assert sinks is None, "Backend.missing was asked before"
        # The log-sum-exp is asked for since the backward needs it.
        out, _ = sdpa_torch(
            q,
            k,
            v,
            scale=scoring.scale,
            is_causal=True,
            causal_bottom_right=documents.bounds_q != documents.bounds_k,
            cu_seqlens_q=documents.cu_q,
            cu_seqlens_kv=documents.cu_k,
            max_seqlen_q=documents.max_q,
            max_seqlen_kv=documents.max_k,
            return_lse=True,
        )
        return out

    return attend


BACKEND = Backend(
    name="cudnn",
    make=make_cudnn,
    modules=("cudnn.sdpa.fwd.torch_op",),
    keeps_graph=False,
    why_not_scored=lambda needs, _: f"{needs.named()} are not proven with cuDNN's front end",
)
