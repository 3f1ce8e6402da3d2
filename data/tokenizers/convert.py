"""A SentencePiece BPE model as a tokenizer of Hugging Face's `tokenizers`, id for id or refused.

transformers' own LlamaTokenizer is no use here: it prepends a space whatever the model says, and it
orders merges that give the same piece arbitrarily.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from data.tokenizers.identity import differing_parts

if TYPE_CHECKING:
    # protobuf makes these classes at import time.
    # pyrefly: ignore[missing-module-attribute]
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import Tokenizer

SPACE = "\u2581"
"""How SentencePiece, and tokenizers made after it, write a space inside pieces."""


def convert_sentencepiece(model: str) -> tuple[Tokenizer, dict[str, str]]:
    """Convert a model -> the same tokenizer for `tokenizers`, and its special tokens by role, such
    as `eos_token` -> `</s>`.

    Raises:
        ValueError: the model is not BPE.
    """
    # protobuf makes these classes at import time.
    # pyrefly: ignore[missing-module-attribute]
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    proto = read_model(model)
    if proto.trainer_spec.model_type != TrainerSpec.BPE:
        kind = TrainerSpec.ModelType.Name(proto.trainer_spec.model_type)
        raise ValueError(
            f"tokenizer_model = {model}: a {kind} model; only BPE converts to Hugging Face. Fix: "
            "convert it with transformers and train with --tokenizer-type HuggingFaceTokenizer."
        )
    # Pieces and merges.
    kinds = ModelProto.SentencePiece
    names = [piece.piece for piece in proto.pieces]
    unknown = next(piece.piece for piece in proto.pieces if piece.type == kinds.UNKNOWN)
    tokenizer = Tokenizer(
        BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=_merges(proto),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    # What is done to a text before, and to the pieces afterwards.
    tokenizer.normalizer = _normalizer(proto)
    steps: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    _add_tokens(tokenizer, proto)
    roles = {
        "bos_token": proto.trainer_spec.bos_id,
        "eos_token": proto.trainer_spec.eos_id,
        "pad_token": proto.trainer_spec.pad_id,
    }
    return tokenizer, {"unk_token": unknown} | {
        role: names[i] for role, i in roles.items() if i >= 0
    }


def _add_tokens(tokenizer: Tokenizer, proto: ModelProto) -> None:
    """Add control pieces as special tokens, and user-defined pieces as plain ones."""
    from tokenizers import AddedToken

    kinds = proto.SentencePiece
    tokenizer.add_special_tokens(
        [
            AddedToken(piece.piece, special=True, normalized=False)
            for piece in proto.pieces
            if piece.type in (kinds.CONTROL, kinds.UNKNOWN)
        ]
    )
    # normalized: SentencePiece looks for them after it wrote spaces as U+2581. With a dummy prefix
    # that would change the symbols themselves, and no way gives its ids
    # (refuse_inexact_conversion).
    normalized = not proto.normalizer_spec.add_dummy_prefix
    symbols = [
        name if normalized else name.replace(SPACE, " ") for name in user_defined_pieces(proto)
    ]
    tokenizer.add_tokens(
        [AddedToken(name, special=False, normalized=normalized) for name in symbols]
    )


def _merges(proto: ModelProto) -> list[tuple[str, str]]:
    """List every pair of pieces that makes a piece, best score first.

    SentencePiece ranks a merge by its result alone, and takes the leftmost of equals. In a run of
    one character, what was merged earlier is longer and further left, so the longer left part goes
    first.
    """
    scores = {
        piece.piece: piece.score
        for piece in proto.pieces
        if piece.type == proto.SentencePiece.NORMAL
    }
    pairs = [
        (-score, -cut, name)
        for name, score in scores.items()
        for cut in range(1, len(name))
        if name[:cut] in scores and name[cut:] in scores
    ]
    return [(name[:-cut], name[-cut:]) for _, cut, name in sorted(pairs)]


def _normalizer(proto: ModelProto):
    """Make SentencePiece's normalization: character map, spaces, dummy prefix, marks."""
    from tokenizers import Regex, normalizers

    spec = proto.normalizer_spec
    steps: list = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # Not Strip, which removes newlines and other scripts' spaces too.
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        # Last, since SentencePiece removes U+2581 that the text itself ends with, too.
        steps.append(normalizers.Replace(Regex(SPACE + r"+\z"), ""))
    return normalizers.Sequence(steps)


def read_model(model: str) -> ModelProto:
    """Read the definition in a .model file."""
    # protobuf makes these classes at import time.
    # pyrefly: ignore[missing-module-attribute]
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto()
    with open(model, "rb") as file:
        proto.ParseFromString(file.read())
    return proto


def tied_pieces(proto: ModelProto) -> list[str]:
    """List the pieces of several letters whose score another one has too.

    SentencePiece merges the leftmost of equal scores, a tokenizer.json the one that it lists first.
    """
    pieces = [
        piece for piece in proto.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1
    ]
    counts = Counter(piece.score for piece in pieces)
    return [piece.piece for piece in pieces if counts[piece.score] > 1]


def user_defined_pieces(proto: ModelProto) -> list[str]:
    """List the pieces that are found wherever they are written."""
    return [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]


def unsupported_settings(proto: ModelProto) -> str | None:
    """Name what in the definition no tokenizer.json can say, for any text; None if nothing."""
    if not proto.normalizer_spec.escape_whitespaces:
        return "escape_whitespaces = False"
    if proto.trainer_spec.treat_whitespace_as_suffix:
        return "treat_whitespace_as_suffix = True"
    if any(piece.type == piece.UNUSED for piece in proto.pieces):
        return "unused pieces"
    return None


def is_exact_conversion(model: str, definition: str) -> bool:
    """Tell whether a tokenizer.json provably gives every text the ids of a model."""
    try:
        refuse_inexact_conversion(model)
        converted, _ = convert_sentencepiece(model)
    except ValueError:
        return False
    return not differing_parts(definition, converted.to_str())


def refuse_inexact_conversion(model: str) -> None:
    """Raise ValueError if a tokenizer.json would give some texts other ids; it names them."""
    # The first reason that applies; each names a text that a person can try.
    proto = read_model(model)
    symbols = user_defined_pieces(proto)
    spaced = [symbol for symbol in symbols if " " in symbol]
    tied = tied_pieces(proto)
    texts = None
    if unsupported := unsupported_settings(proto):
        texts = f"many texts ({unsupported})"
    elif proto.normalizer_spec.precompiled_charsmap:
        texts = (
            "texts with letters that its normalization "
            f"({proto.normalizer_spec.name or 'a character map'}) changes"
        )
    elif symbols and proto.normalizer_spec.add_dummy_prefix:
        texts = (
            f"texts with its user-defined symbols, as {symbols[0]!r}, since it has a dummy prefix"
        )
    elif spaced:
        texts = f"texts with its user-defined symbol {spaced[0]!r}, which holds a space"
    elif symbols and proto.normalizer_spec.remove_extra_whitespaces:
        texts = f"texts with spaces beside its user-defined symbols, as {symbols[0]!r}"
    elif tied:
        texts = f"texts with pieces of equal score, as {tied[0]!r} and {tied[1]!r}"
    if texts:
        raise ValueError(
            f"tokenizer_model = {model}: no tokenizer.json gives the ids of SentencePiece on "
            f"{texts}. Fix: export without a tokenizer and use SentencePiece beside the model."
        )
