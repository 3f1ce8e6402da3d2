"""Do the weights of a Hugging Face folder fit what its config.json says?"""

import torch

from model.build import parameter_shapes
from model.config import ModelConfig
from model.hf.architecture import VOCABULARY_ROWS, Architecture
from tools.huggingface.config import FolderConfig
from tools.huggingface.weights import EMBEDDING, OUTPUT, Entry, Weights, first_few

_AGAIN = "Fix: download the folder again."


def settle_tie(settings: FolderConfig, weights: Weights) -> tuple[Weights, bool, list[str]]:
    """Decide as transformers does whether the embedding and the head are one tensor.

    The flag may say tied beside two tensors that differ: those stay two. Tied with one of them
    stored, either is both.

    Returns:
        (the weights without the second copy, whether they are tied, warnings).

    Raises:
        ValueError: a tensor is missing that transformers would draw at random.
    """
    is_tied = not settings.model["untie_embeddings_and_output_weights"]
    present = {EMBEDDING, OUTPUT} & weights.entries.keys()
    # Not tied: two tensors must be there. check_fit says so of the embedding.
    if not is_tied:
        if OUTPUT not in present:
            raise ValueError(
                "lm_head.weight is missing, and tie_word_embeddings = false: transformers would "
                "draw it at random. Fix: the folder of the whole model, or "
                "tie_word_embeddings = true where the model is tied."
            )
        return weights, False, []
    # Tied: one tensor, under the embedding's name.
    if not present:
        raise ValueError(f"model.embed_tokens.weight is missing. {_AGAIN}")
    entries = dict(weights.entries)
    if present == {OUTPUT}:
        entries[EMBEDDING] = entries.pop(OUTPUT)
    elif present == {EMBEDDING, OUTPUT}:
        if entries[EMBEDDING].shape != entries[OUTPUT].shape or not weights.are_equal(
            EMBEDDING, OUTPUT
        ):
            warning = (
                "tie_word_embeddings = true, but lm_head.weight differs from "
                "model.embed_tokens.weight: read as two tensors, as transformers does"
            )
            return weights, False, [warning]
        entries.pop(OUTPUT)
    return Weights(entries), True, []


def check_fit(
    config: ModelConfig, vocab_size: int, weights: Weights, architecture: Architecture
) -> None:
    """Compare names and shapes with the model that the settings describe.

    Raises:
        ValueError: a tensor is missing, left over, or has another shape.
    """
    problems = _size_misfits(config, vocab_size, weights, architecture)
    if not problems:
        shapes = parameter_shapes(config, vocab_size)
        # The folder's rows are not padded.
        for name in VOCABULARY_ROWS:
            if name in shapes:
                shapes[name] = torch.Size((vocab_size, shapes[name][1]))
        # Every name of one side must be on the other, with the same shape.
        entries = weights.entries
        problems += [
            f"{architecture.huggingface_name(name)} is missing"
            for name in shapes.keys() - entries.keys()
        ]
        problems += [
            f"{entries[name].name} is left over" for name in entries.keys() - shapes.keys()
        ]
        problems += [
            _misfit(entries[name], tuple(shape))
            for name, shape in shapes.items()
            if name in entries and entries[name].shape != shape
        ]
    if problems:
        named = "; ".join(first_few(sorted(problems)))
        raise ValueError(f"the weights do not fit config.json: {named}. {_AGAIN}")


def _misfit(entry: Entry, shape: tuple[int, ...]) -> str:
    """Say that a tensor has another shape than config.json means."""
    return f"{entry.name} has shape {entry.shape}, config.json means {shape}"


def _size_misfits(
    model: ModelConfig, vocab_size: int, weights: Weights, architecture: Architecture
) -> list[str]:
    """Compare the sizes alone, before a model is described: a typing error may make it huge."""
    if weights.num_layers != model.num_layers:
        return [
            f"num_hidden_layers = {model.num_layers}, but the weights hold {weights.num_layers} "
            "layers"
        ]
    heads = model.num_attention_heads * model.head_size
    groups = model.num_kv_heads * model.head_size
    # One tensor for each size.
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (vocab_size, model.hidden_size),
        OUTPUT: (vocab_size, model.hidden_size),
        "layers.0.mlp.gate.weight": (model.ffn_hidden_size, model.hidden_size),
        "layers.0.attention.q.weight": (heads, model.hidden_size),
        "layers.0.attention.k.weight": (groups, model.hidden_size),
    }
    found = []
    for name, shape in shapes.items():
        entry = weights.entries.get(name)
        if entry is not None and entry.shape != shape:
            found.append(_misfit(entry, shape))
        elif entry is None and name != OUTPUT:
            found.append(f"{architecture.huggingface_name(name)} is missing")
    return found


def padded_rows(config: ModelConfig, vocab_size: int, weights: Weights) -> dict[str, int]:
    """Return the rows, padding included, of the tensors that have one for each token."""
    rows = config.padded_vocab_size(vocab_size)
    return {name: rows for name in VOCABULARY_ROWS if name in weights.entries}
