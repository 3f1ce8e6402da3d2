"""Settings of the data: which tokens, through which tokenizer, cut into which documents."""

from dataclasses import dataclass, field
from typing import Literal

TokenizerType = Literal["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer",
                        "HuggingFaceTokenizer", "NullTokenizer"]


@dataclass(kw_only=True)
class DataConfig:
    data_path: list[str] = field(default_factory=list)
    """Prefix of a .bin/.idx pair, cut into train, valid and test by --split. One prefix; blends are not supported
    yet."""
    train_data_path: list[str] = field(default_factory=list)
    """Prefix of the training documents, instead of --data-path and --split."""
    valid_data_path: list[str] = field(default_factory=list)
    """Prefix of the validation documents, beside --train-data-path."""
    split: str = "969,30,1"
    """Shares of the documents of --data-path for train, valid and test; drawn at random, not in file order."""
    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """SentencePiece (three spellings of one thing), a Hugging Face folder, or none (text of integers)."""
    tokenizer_model: str | None = None
    """The .model file of SentencePiece, or the Hugging Face tokenizer's folder."""
    vocab_size: int | None = None
    """Token ids; needed for NullTokenizer and --mock-data, otherwise read from the tokenizer."""
    document_masking: bool = True
    """Attention, positions and targets stop at document ends; a phase may change it."""
    reset_position_ids: bool | None = None
    """Megatron-LM's spelling of a part of --document-masking; given, it must agree with it."""
    reset_attention_mask: bool | None = None
    """Megatron-LM's spelling of a part of --document-masking; given, it must agree with it."""
    eod_mask_loss: bool = False
    """No loss at positions whose input is the end-of-document token."""
    packing: Literal["concat"] = "concat"
    """Samples are windows of the concatenated documents; the only packing built."""
    mock_data: bool = False
    """Train on seeded synthetic documents; reads no files and needs --vocab-size."""

    def validate(self) -> list[str]:
        """All problems that show without touching the disk, as `name = value: rule. Fix: ...`."""
        problems = self._path_problems() + self._tokenizer_problems()
        if self.data_path or self.mock_data:
            try:
                parse_split(self.split)
            except ValueError as error:
                problems.append(str(error))
        for name in ("reset_position_ids", "reset_attention_mask"):
            value = getattr(self, name)
            if value is not None and value != self.document_masking:
                problems.append(f"{name} = {value}: must agree with document_masking = {self.document_masking}. "
                                f"Fix: leave it out, or give --{'' if value else 'no-'}document-masking.")
        return problems

    def _path_problems(self) -> list[str]:
        problems = []
        names = ("data_path", "train_data_path", "valid_data_path")
        given = [name for name in names if getattr(self, name)]
        for name in given:
            if len(getattr(self, name)) > 1:
                problems.append(f"{name} = {' '.join(getattr(self, name))}: blends are not supported yet. Fix: give "
                                "one prefix without a weight; merge corpora with tools.preprocess_data.")
        if self.mock_data:
            return problems + [f"{name} = {' '.join(getattr(self, name))}: cannot be combined with mock_data. "
                               "Fix: remove one of them." for name in given]
        if not self.data_path and not self.train_data_path:
            problems.append("data_path = []: there is nothing to train on. Fix: give --data-path PREFIX, "
                            "--train-data-path PREFIX or --mock-data.")
        if self.data_path and len(given) > 1:
            problems.append(f"{given[1]} = {' '.join(getattr(self, given[1]))}: data_path is split, so it cannot be "
                            "combined with a path of its own for a split. Fix: --train-data-path instead of "
                            "--data-path, or --data-path alone.")
        return problems

    def _tokenizer_problems(self) -> list[str]:
        problems = []
        if self.vocab_size is not None and self.vocab_size < 2:
            problems.append(f"vocab_size = {self.vocab_size}: must be at least 2. Fix: give the number of token ids.")
        if self.mock_data:
            if self.vocab_size is None:
                problems.append("vocab_size = None: must be given for mock_data. Fix: for example --vocab-size 1024.")
            if self.eod_mask_loss:
                problems.append("eod_mask_loss = True: mock_data has no end-of-document token. Fix: remove it.")
        elif self.tokenizer_type == "NullTokenizer":
            if self.vocab_size is None:
                problems.append("vocab_size = None: must be given for NullTokenizer. Fix: give --vocab-size.")
        elif not self.tokenizer_model:
            problems.append(f"tokenizer_model = {self.tokenizer_model}: must be given for {self.tokenizer_type}. "
                            "Fix: give --tokenizer-model.")
        return problems


def parse_split(split: str) -> tuple[float, float, float]:
    """Megatron's `969,30,1` -> shares of train, valid and test that sum to 1; missing ones are 0.

    Raises:
        ValueError: not one to three numbers >= 0 with a train share above 0.
    """
    try:
        weights = [float(part) for part in split.split(",")]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 3 or not all(0 <= weight < float("inf") for weight in weights) or weights[0] == 0:
        raise ValueError(f"split = {split}: must be one to three numbers >= 0 (train, valid, test), train above 0. "
                         "Fix: for example 969,30,1.")
    weights += [0.0] * (3 - len(weights))
    train, valid, test = (weight / sum(weights) for weight in weights)
    return train, valid, test
