"""A model that answers, from a run's checkpoint or a Hugging Face folder, on any tp x cp.

Each process holds its tensor-parallel part of every weight, in the dtype that it computes in, and
nothing is sharded over context parallelism. Tensors are read one after the other, so that memory
holds the part and one whole tensor.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from data.tokenizers.folder import HuggingFace, IdsFrom, tokenizer_files
from data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from model.attention_backends.choice import choose_attention
from model.build import check_layout
from model.config import ModelConfig
from model.gpt import GPTStage, Layer
from model.hf.architecture import VOCABULARY_ROWS
from model.rope import Rope
from model.sharding import shardings_for
from parallel.config import LayoutConfig
from parallel.layout import Layout, has_bf16_units
from pretrain.checkpointing.folders import CARRIED, LATEST, find_published
from pretrain.checkpointing.stored_tensors import StoredTensors
from pretrain.planner.head_counts import HeadCounts
from pretrain.state import compute_dtype
from tools.huggingface.config import interpret_config, read_config_file
from tools.huggingface.export_settings import declared_context
from tools.huggingface.fit import check_fit, settle_tie
from tools.huggingface.stored_model import StoredModel, open_stored_model, stored_tokenizer
from tools.huggingface.weights import Weights, open_weights
from tools.inference.generation_settings import GenerationSettings, read_generation_settings
from tools.inference.processes import ProcessArguments

Precision = Literal["auto", "fp64", "fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
Tensors = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class OpenModel:
    """Holds this process's part of a model, and what its source says of it."""

    stage: GPTStage
    """All layers, cut over tp, without gradients; `stage.layout` is the layout."""
    config: ModelConfig
    vocab_size: int
    """Token ids, without the padding of the embedding."""
    context_length: int
    """Longest context that the source declares, or was trained on."""
    tokenizer: Tokenizer | None
    """None where the source has none: texts are then token ids."""
    first_ids: tuple[int, ...]
    """Ids that a text begins with, before those of its words."""
    generation: GenerationSettings
    """Ids that end a text, and what the source says of sampling."""
    dtype: torch.dtype
    source: Path
    """The checkpoint's folder, or the Hugging Face folder."""
    notes: tuple[str, ...]
    """What a user should know of how it was opened, a line each."""

    @property
    def layout(self) -> Layout:
        return self.stage.layout

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a text."""
        return self.generation.stop_ids


@dataclass(frozen=True)
class _Source:
    """What was found at the place that --load names, before any weight is read."""

    folder: Path
    model: ModelConfig
    vocab_size: int
    rope: Rope
    context_length: int
    dtype: torch.dtype
    tensors: Callable[[], Tensors]
    """Reads the weights by our names, whole and on the CPU, one after the other."""
    tokenizer: Callable[[bool], Tokenizer | None]
    """Builds the tokenizer; the argument is whether special tokens in a text are kept."""
    generation: Path | None
    """The Hugging Face folder that holds generation settings; None where there is none."""
    notes: list[str]


@dataclass(kw_only=True)
class ModelArguments(ProcessArguments):
    """Holds how a model is opened: settings of every command that runs one."""

    dtype: Precision = "auto"
    """Type to compute in; auto = the source's, and fp32 on a CPU without units for bf16."""
    attention_backend: str = "auto"
    """Kernel that reads the prompts, as in training."""
    tokenizer_ids_from: IdsFrom | None = None
    """Which definition of a Hugging Face folder's tokenizer gives the ids; needed where they
    differ."""
    prepend_bos: bool | None = None
    """--prepend-bos or --no-prepend-bos: begin each text with the tokenizer's token for that. By
    default as the tokenizer of a Hugging Face folder does; not for a run that began here."""


def open_model(
    load: str,
    layout: Layout,
    *,
    step: int | None = None,
    precision: Precision = "auto",
    attention_backend: str = "auto",
    ids_from: IdsFrom | None = None,
    prepend_bos: bool | None = None,
) -> OpenModel:
    """Open a run's checkpoint or a Hugging Face folder; every process of the layout calls it.

    Args:
        load: --save folder of a run, or a folder with config.json and safetensors files.
        step: iteration of the checkpoint; None = the latest.
        precision: dtype of weights and products; auto = the source's, and fp32 on a CPU without
            units for bf16.
        ids_from: which definition of a Hugging Face tokenizer gives the ids.
        prepend_bos: do texts begin with a token of their own? None = as the tokenizer has it, where
            the model is from a Hugging Face folder; the data of a run that began here has none
            unless it was prepared so.

    Raises:
        ValueError: nothing that can be opened, or a layout that the model cannot have.
    """
    source = _find(load, step, layout, ids_from)
    config = LayoutConfig(
        tensor_model_parallel_size=layout.tp.size, context_parallel_size=layout.cp.size
    )
    if layout.cp_gather.size > 1:
        config.cp_comm_type = "a2a+allgather"
        config.hierarchical_context_parallel_sizes = [layout.cp_a2a.size, layout.cp_gather.size]
    # The rows of the embedding are padded for this layout, whatever the source's padding.
    model = dataclasses.replace(source.model, make_vocab_size_divisible_by=layout.tp.size)
    problems = check_layout(model, source.vocab_size, config)
    if problems:
        raise ValueError("\n".join(problems))
    dtype = _choose_dtype(precision, source.dtype, layout.device)

    heads = HeadCounts.make(model, config)
    kv_heads = max(heads.k, heads.paired)
    attend, line = choose_attention(
        attention_backend,
        layout.device,
        dtype,
        (heads.m, kv_heads if heads.m % kv_heads == 0 else heads.m, model.head_size),
        needs=model.scoring_needs,
    )
    stage = GPTStage(model, source.vocab_size, layout, attend)
    stage.rope = source.rope
    _fill(stage, model, source, dtype)
    _place_side_by_side(stage)
    tokenizer = _build_tokenizer(source.tokenizer)
    eod = tokenizer.eod if tokenizer is not None else None
    if prepend_bos is None and source.generation is None:
        prepend_bos = False
    first_ids = _first_ids(tokenizer, prepend_bos)
    notes = [*source.notes, line]
    if first_ids:
        notes.append(f"texts begin with id {first_ids[0]} (--no-prepend-bos: they do not)")
    return OpenModel(
        stage=stage.eval(),
        config=model,
        vocab_size=source.vocab_size,
        context_length=source.context_length,
        tokenizer=tokenizer,
        first_ids=first_ids,
        generation=read_generation_settings(source.generation, eod, tokenizer),
        dtype=dtype,
        source=source.folder,
        notes=tuple(notes),
    )


def _first_ids(tokenizer: Tokenizer | None, prepend_bos: bool | None) -> tuple[int, ...]:
    """Return the ids that a text begins with.

    Args:
        prepend_bos: None = what the tokenizer puts there by itself.

    Raises:
        ValueError: it is asked for, and there is no such id.
    """
    if tokenizer is None or prepend_bos is False:
        return ()
    found = tokenizer.prefix_id if isinstance(tokenizer, HuggingFace) else None
    if found is None and prepend_bos:
        found = tokenizer.bos
    if found is None and prepend_bos:
        raise ValueError(
            "prepend_bos = True: the tokenizer has no beginning-of-sequence token. Fix: remove it."
        )
    return () if found is None else (found,)


def _choose_dtype(precision: Precision, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in."""
    if precision != "auto":
        return DTYPES[precision]
    is_narrow = stored in (torch.bfloat16, torch.float16)
    return torch.float32 if is_narrow and not has_bf16_units(device) else stored


# ---------------------------------------------------------------- weights


def _fill(stage: GPTStage, model: ModelConfig, source: _Source, dtype: torch.dtype) -> None:
    """Put this process's part of every weight in place of the stage's meta parameters."""
    layout = stage.layout
    shapes = {name: parameter.shape for name, parameter in stage.named_parameters()}
    shardings = shardings_for(list(shapes), model, layout.tp.size)
    for name, tensor in source.tensors():
        # Rows of padding are the source's own business: cut or added up to this layout's.
        if name in VOCABULARY_ROWS:
            real = tensor[: source.vocab_size]
            missing = shapes[name][0] - real.shape[0]
            tensor = nn.functional.pad(real, (0, 0, 0, missing))
        expected = shapes.pop(name)
        assert tensor.shape == expected, (name, tensor.shape, expected)
        dim = shardings[name].dim
        part = tensor if dim is None else tensor.chunk(layout.tp.size, dim)[layout.tp.rank]
        # A copy in any case: a view would keep the whole tensor.
        local = part.to(layout.device, dtype, copy=True).contiguous()
        owner_name, _, leaf = name.rpartition(".")
        owner = stage.get_submodule(owner_name)
        setattr(owner, leaf, nn.Parameter(local, requires_grad=False))
    assert not shapes, f"{source.folder} holds no {', '.join(shapes)}"


def _place_side_by_side(stage: GPTStage) -> None:
    """Make q, k and v of each layer rows of one tensor: one product gives all three."""
    for layer in stage.layers.values():
        assert isinstance(layer, Layer)
        attention = layer.attention
        parts = (attention.q, attention.k, attention.v)
        joined = torch.cat([part.weight for part in parts])
        all_rows = joined.split([part.weight.shape[0] for part in parts])
        for part, rows in zip(parts, all_rows, strict=True):
            part.weight = nn.Parameter(rows, requires_grad=False)


def _tensors_of_checkpoint(folder: Path) -> Tensors:
    """Read the weights of a checkpoint, one after the other."""
    stored = StoredTensors(folder)
    for name in sorted(stored.entries):
        if name.startswith("model."):
            yield name.removeprefix("model."), stored.read(name)


def _tensors_of_folder(weights: Weights) -> Tensors:
    """Read the weights of a Hugging Face folder, one after the other."""
    for name in weights.entries:
        yield name, weights.read(name)


# ---------------------------------------------------------------- where it comes from


def _find(load: str, step: int | None, layout: Layout, ids_from: IdsFrom | None) -> _Source:
    """Find out what `load` is, and read its settings."""
    folder = Path(load)
    is_folder_of_files = (folder / "config.json").is_file() and not (folder / LATEST).exists()
    if not is_folder_of_files and find_published(folder, step) is not None:
        # Checksums are compared once; who finds damage ends all processes.
        return _of_checkpoint(open_stored_model(load, step, verify=layout.world.is_first))
    if not is_folder_of_files:
        found = "nothing to open" if folder.is_dir() else "no such folder"
        raise ValueError(
            f"load = {load}: {found}. Fix: give the --save folder of a run, or a Hugging Face "
            "folder (config.json and safetensors files)."
        )
    if step is not None:
        raise ValueError(
            f"ckpt_step = {step}: {load} is a Hugging Face folder, which has no steps. "
            "Fix: leave it out."
        )
    return _of_folder(folder, ids_from)


def _of_checkpoint(stored: StoredModel) -> _Source:
    """Say what a checkpoint holds."""
    folder = stored.folder
    carried = folder / CARRIED
    return _Source(
        folder=folder,
        model=stored.config.model,
        vocab_size=stored.vocab_size,
        rope=stored.rope,
        context_length=declared_context(stored),
        dtype=compute_dtype(stored.config.optimizer),
        tensors=lambda: _tensors_of_checkpoint(folder),
        tokenizer=lambda keep: stored_tokenizer(folder, stored.config, keep_special=keep),
        generation=carried if stored.carried else None,
        notes=[f"{folder}: step {stored.progress.step:,}, rope {stored.rope.describe()}"],
    )


def _of_folder(folder: Path, ids_from: IdsFrom | None) -> _Source:
    """Say what a Hugging Face folder holds."""
    content = read_config_file(folder)
    settings = interpret_config(content)
    weights = open_weights(folder, settings.architecture)
    notes = settings.warnings + weights.warnings
    weights, is_tied, tie_warnings = settle_tie(settings, weights)
    model = ModelConfig(
        **settings.model | {"untie_embeddings_and_output_weights": not is_tied},
        make_vocab_size_divisible_by=1,
    )
    check_fit(model, settings.vocab_size, weights, settings.architecture)

    def tokenizer(keep_special: bool) -> Tokenizer | None:
        if not tokenizer_files(folder):
            return None
        return build_tokenizer(
            "HuggingFaceTokenizer",
            str(folder),
            None,
            ids_from=ids_from,
            keep_special=keep_special,
        )

    named = content.get("dtype", content.get("torch_dtype"))
    return _Source(
        folder=folder,
        model=model,
        vocab_size=settings.vocab_size,
        rope=model.rope,
        context_length=settings.max_position_embeddings,
        dtype=getattr(torch, named) if named in ("bfloat16", "float16") else torch.float32,
        tensors=lambda: _tensors_of_folder(weights),
        tokenizer=tokenizer,
        generation=folder,
        notes=[*notes, *tie_warnings],
    )


def _build_tokenizer(build: Callable[[bool], Tokenizer | None]) -> Tokenizer | None:
    """Build the tokenizer so that a chat's special tokens in a text are those tokens."""
    try:
        return build(True)
    except ValueError:
        # SentencePiece, and folders that say so, take them for text. Any other error comes again.
        return build(False)
