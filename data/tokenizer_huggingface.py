"""A SentencePiece BPE model as a tokenizer of Hugging Face's `tokenizers`, id for id.

transformers' own LlamaTokenizer is no use here: it prepends a space whatever the model says, and it
orders merges that give the same piece arbitrarily.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import Tokenizer

SPACE = "\u2581"
"""How SentencePiece writes a space inside pieces."""


def convert_sentencepiece(model: str) -> tuple[Tokenizer, dict[str, str]]:
    """The same tokenizer for `tokenizers`, and its special tokens by role (`eos_token` -> `</s>`).

    Raises:
        ValueError: the model is not BPE.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE

    proto = ModelProto()
    with open(model, "rb") as file:
        proto.ParseFromString(file.read())
    if proto.trainer_spec.model_type != TrainerSpec.BPE:
        kind = TrainerSpec.ModelType.Name(proto.trainer_spec.model_type)
        raise ValueError(f"tokenizer_model = {model}: a {kind} model; only BPE converts to Hugging Face. Fix: convert "
                         "it with transformers and train with --tokenizer-type HuggingFaceTokenizer.")
    kinds = ModelProto.SentencePiece
    names = [piece.piece for piece in proto.pieces]
    unknown = next(piece.piece for piece in proto.pieces if piece.type == kinds.UNKNOWN)
    tokenizer = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=_merges(proto),
                              unk_token=unknown, fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback))
    tokenizer.normalizer = _normalizer(proto)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(piece.piece, special=True, normalized=False) for piece in proto.pieces
                                  if piece.type in (kinds.CONTROL, kinds.UNKNOWN)])
    tokenizer.add_tokens([AddedToken(piece.piece.replace(SPACE, " "), special=False, normalized=False)
                          for piece in proto.pieces if piece.type == kinds.USER_DEFINED])
    roles = {"bos_token": proto.trainer_spec.bos_id, "eos_token": proto.trainer_spec.eos_id,
             "pad_token": proto.trainer_spec.pad_id}
    return tokenizer, {"unk_token": unknown} | {role: names[i] for role, i in roles.items() if i >= 0}


def _merges(proto: ModelProto) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first.

    SentencePiece ranks a merge by its result alone, and takes the leftmost of equals. In a run of one
    character, what was merged earlier is longer and stands left, so the longer left part goes first.
    """
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == proto.SentencePiece.NORMAL}
    pairs = [(-score, -cut, name) for name, score in scores.items() for cut in range(1, len(name))
             if name[:cut] in scores and name[cut:] in scores]
    return [(name[:-cut], name[-cut:]) for _, cut, name in sorted(pairs)]


def _normalizer(proto: ModelProto):
    """SentencePiece's normalization: character map, extra spaces, dummy prefix, spaces as U+2581."""
    from tokenizers import Regex, normalizers

    spec, steps = proto.normalizer_spec, []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
