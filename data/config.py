"""Settings of the data: which tokens, through which tokenizer, cut into which documents."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from data.blend import parse_blend
from data.tokenizers.folder import IdsFrom
from data.units import parse_tokens

Packing = Literal["concat", "best_fit"]
Balance = Literal["none", "deal", "window"]
Exhausted = Literal["repeat", "stop", "error"]
TokenizerType = Literal[
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "NullTokenizer",
]


@dataclass(kw_only=True)
class DataConfig:
    """Settings of a run's data; each field is a YAML key and a flag."""

    data_path: list[str] = field(
        default_factory=list, metadata=dict(per_phase=True, resume="effect", is_path=True)
    )
    """Sources, `[weight prefix ...]` or `[prefix ...]`, each cut into train, valid and test by
    --split. Weights are shares of the tokens and sum to anything; without them sources count by
    their tokens. PREFIX[64Ki:] is only the documents of at least 64Ki tokens, PREFIX[:64Ki] the
    shorter ones. A phase may have its own."""
    train_data_path: list[str] = field(
        default_factory=list, metadata=dict(resume="effect", is_path=True)
    )
    """Sources that are all trained on, instead of --data-path and --split."""
    valid_data_path: list[str] = field(
        default_factory=list, metadata=dict(resume="free", is_path=True)
    )
    """Validation data of its own: `NAME=PREFIX ...`, a set each, or sources as in --data-path, one
    set."""
    data_args_path: str | None = field(default=None, metadata=dict(resume="effect", is_path=True))
    """File with the words of --data-path, for very many sources."""
    data_cache_path: str | None = field(default=None, metadata=dict(resume="free", is_path=True))
    """Folder that keeps the indices of the data across starts; all processes of a node map the same
    files."""
    split: str = "969,30,1"
    """Shares of each source's documents for train, valid and test; drawn at random, not in file
    order."""
    tokenizer_type: TokenizerType = field(
        default="SentencePieceTokenizer", metadata=dict(resume="effect")
    )
    """SentencePiece (three spellings of one thing), a Hugging Face folder, or none (text of
    integers)."""
    tokenizer_model: str | None = field(default=None, metadata=dict(resume="effect", is_path=True))
    """The .model file of SentencePiece, or the Hugging Face tokenizer's folder."""
    tokenizer_ids_from: IdsFrom | None = field(default=None, metadata=dict(resume="effect"))
    """Which definition of a Hugging Face folder gives the ids: its tokenizer.json, or what
    transformers' AutoTokenizer makes of its files; needed where the two differ."""
    vocab_size: int | None = field(
        default=None, metadata=dict(resume="effect", at_least=2, fix="give the number of token ids")
    )
    """Token ids; needed for NullTokenizer and --mock-data, otherwise read from the tokenizer."""
    document_masking: bool = field(default=True, metadata=dict(per_phase=True, resume="effect"))
    """Attention, positions and targets stop at document ends; a phase may change it."""
    reset_position_ids: bool | None = field(default=None, metadata=dict(resume="effect"))
    """Megatron-LM's spelling of a part of --document-masking; given, it must agree with it."""
    reset_attention_mask: bool | None = field(default=None, metadata=dict(resume="effect"))
    """Megatron-LM's spelling of a part of --document-masking; given, it must agree with it."""
    eod_mask_loss: bool = False
    """No loss at positions whose input is the end-of-document token."""
    packing: Packing = field(default="concat", metadata=dict(per_phase=True, resume="effect"))
    """Samples are windows of the concatenated documents, or bins of whole documents (only those
    longer than a sample are cut); a phase may change it."""
    max_documents_per_sample: int | None = field(
        default=None, metadata=dict(per_phase=True, resume="effect", at_least=1)
    )
    """Documents of a sample at most, with --packing best_fit, so that no step has very many tiny
    ones; a sample that may hold no more is padded. A phase may change it."""
    balance: Balance = field(default="deal", metadata=dict(per_phase=True, resume="effect"))
    """Deal each step's samples to data ranks and microbatches by what they cost, so that the ranks
    wait little for each other, or in the order in which they are drawn (none); changes no step's
    loss, gradient or data. With window --packing best_fit also makes samples of nearly equal cost,
    for steps of few samples per rank, and steps of samples of like cost: those with long documents
    come together, in some steps. Other samples in another order, each token once as ever. A phase
    may change it."""
    data_exhausted: Exhausted = field(
        default="repeat", metadata=dict(per_phase=True, resume="effect")
    )
    """Where a source's tokens end: reshuffle and repeat it, draw only from the others, or refuse
    the run at its start; a phase may change it."""
    skip_data: list[str] = field(default_factory=list, metadata=dict(resume="effect"))
    """Windows of the clock, as 120B:121B, whose data is passed over when the run comes to them."""
    mock_data: bool = False
    """Train on seeded synthetic documents; reads no files and needs --vocab-size."""

    def validate(self) -> list[str]:
        """List all problems that show without touching the disk: `name = value: rule. Fix: ...`."""
        # Sources, tokenizer, then what depends on both.
        problems = self._path_problems() + self._tokenizer_problems()
        if self.data_path or self.mock_data:
            problems += _problems_of(lambda: parse_split(self.split))
        # Megatron-LM's two spellings are accepted, and may not say something else.
        for name in ("reset_position_ids", "reset_attention_mask"):
            value = getattr(self, name)
            if value is not None and value != self.document_masking:
                problems.append(
                    f"{name} = {value}: must agree with document_masking = "
                    f"{self.document_masking}. Fix: leave it out, or give "
                    f"--{'' if value else 'no-'}document-masking."
                )
        return problems

    def _path_problems(self) -> list[str]:
        """List what is wrong with the sources of training and validation data."""
        problems = []
        names = ("data_path", "train_data_path", "valid_data_path")
        given = [name for name in names if getattr(self, name)]
        # `NAME=PREFIX` validation sets are no blend; they are checked when they are opened.
        for name in given:
            words = getattr(self, name)
            if name != "valid_data_path" or not are_named(words):
                problems += _problems_of(lambda n=name, w=words: parse_blend(w, n))
        problems += _problems_of(lambda: parse_windows(self.skip_data))
        # Exactly one of mock_data, data_path and train_data_path says what is trained on.
        if self.mock_data:
            return problems + [
                f"{name} = {' '.join(getattr(self, name))}: cannot be combined with mock_data. "
                "Fix: remove one of them."
                for name in given
            ]
        if not self.data_path and not self.train_data_path:
            problems.append(
                "data_path = []: there is nothing to train on. Fix: give --data-path PREFIX, "
                "--train-data-path PREFIX or --mock-data."
            )
        if self.data_path and self.train_data_path:
            problems.append(
                f"train_data_path = {' '.join(self.train_data_path)}: cannot be combined with "
                "data_path, which is split. Fix: one of them."
            )
        # Validation sets come from a split or from files of their own, not from both.
        split_is_sound = not _problems_of(lambda: parse_split(self.split))
        makes_validation = split_is_sound and parse_split(self.split)[1] > 0
        if self.data_path and self.valid_data_path and makes_validation:
            problems.append(
                f"valid_data_path = {' '.join(self.valid_data_path)}: split = {self.split} makes "
                "validation sets, too. Fix: --train-data-path instead of --data-path, or a --split "
                "whose second share is 0."
            )
        return problems

    def _tokenizer_problems(self) -> list[str]:
        """List what is wrong with the tokenizer and the size of its vocabulary."""
        problems = []
        # Only a Hugging Face folder has two definitions to choose from.
        has_two_definitions = not self.mock_data and self.tokenizer_type == "HuggingFaceTokenizer"
        if self.tokenizer_ids_from is not None and not has_two_definitions:
            kind = "mock_data" if self.mock_data else f"tokenizer_type = {self.tokenizer_type}"
            problems.append(
                f"tokenizer_ids_from = {self.tokenizer_ids_from}: has no effect with {kind}. Fix: "
                "remove it."
            )
        if self.mock_data:
            if self.vocab_size is None:
                problems.append(
                    "vocab_size = None: must be given for mock_data. Fix: for example --vocab-size "
                    "1024."
                )
            if self.eod_mask_loss:
                problems.append(
                    "eod_mask_loss = True: mock_data has no end-of-document token. Fix: remove it."
                )
        elif self.tokenizer_type == "NullTokenizer":
            if self.vocab_size is None:
                problems.append(
                    "vocab_size = None: must be given for NullTokenizer. Fix: give --vocab-size."
                )
        elif not self.tokenizer_model:
            problems.append(
                f"tokenizer_model = {self.tokenizer_model}: must be given for "
                f"{self.tokenizer_type}. Fix: give --tokenizer-model."
            )
        return problems


def parse_split(split: str) -> tuple[float, float, float]:
    """Read Megatron's `969,30,1` -> shares of train, valid and test that sum to 1; missing ones are
    0.

    Raises:
        ValueError: not one to three numbers >= 0 with a train share above 0.
    """
    try:
        weights = [float(part) for part in split.split(",")]
    except ValueError:
        weights = []
    are_weights = all(0 <= weight < math.inf for weight in weights)
    if not 1 <= len(weights) <= 3 or not are_weights or weights[0] == 0:
        raise ValueError(
            f"split = {split}: must be one to three numbers >= 0 (train, valid, test), train above "
            "0. Fix: for example 969,30,1."
        )
    # Any sum is fine: the shares are what is left after dividing by it.
    weights += [0.0] * (3 - len(weights))
    train, valid, test = (weight / sum(weights) for weight in weights)
    return train, valid, test


def parse_windows(words: list[str]) -> list[tuple[int, int]]:
    """Read `START:END` windows of the clock -> sorted (start, end).

    Raises:
        ValueError: not a window of at least one token, or two overlap.
    """
    # Each word by itself, then all of them beside each other.
    windows = []
    for word in words:
        parts = word.split(":")
        try:
            start, end = (parse_tokens(part) for part in parts) if len(parts) == 2 else (0, 0)
        except ValueError as error:
            raise ValueError(f"skip_data = {word}: {error}. Fix: for example 120B:121B.") from None
        if end <= start:
            raise ValueError(
                f"skip_data = {word}: must be START:END in tokens, END above START. Fix: for "
                "example 120B:121B."
            )
        windows.append((start, end))
    # Windows that overlap would pass over more than either says.
    windows.sort()
    for (_, end), (start, _) in zip(windows, windows[1:], strict=False):
        if start < end:
            raise ValueError(f"skip_data = {' '.join(words)}: windows overlap. Fix: join them.")
    return windows


def are_named(words: Sequence[str]) -> bool:
    """Tell whether these are `NAME=PREFIX` validation sets; a "=" further on in a path is none."""
    return all(re.fullmatch(r"[^/=]+=.+", word) for word in words)


def _problems_of(check: Callable[[], object]) -> list[str]:
    """List the lines of the ValueError that a check raises; none where it passes."""
    try:
        check()
    except ValueError as error:
        return str(error).splitlines()
    return []
