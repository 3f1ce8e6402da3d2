"""Text to token ids and back: SentencePiece, Hugging Face, or none.

The libraries are imported by the class that uses them, so that a run on one needs only that one.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import xxhash

HUGGINGFACE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                     "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja")
SAMPLE_TEXT = ("def f(x):\n\tif x  >  1:\r\n\t\treturn  'a\\tb'   # 3.14159, 2026\n\n\n        pass\n \n"
               "<s> </s> <unk> <0x0A>\n日本語 é e\u0301 \u200b 😀 \x00\n" + "=" * 79 + "\n" + " " * 77 + "x\n  ")
"""What source code does to tokenizers: tabs, runs of spaces, newlines, digits, control tokens as text, rare letters."""


class Tokenizer(Protocol):
    """What the trainer and the tools ask of a tokenizer."""

    vocab_size: int
    """One more than the largest id that `encode` can give or `eod` can be."""
    eod: int | None
    """The end-of-document id, None where there is none."""
    files: list[str]
    """Paths that rebuild the tokenizer; stored beside a checkpoint."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no bos or eos is added. ValueError where the text has none."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        ...

    def describe(self) -> dict:
        """JSON-able identity: type, vocab_size and fingerprint of the files' bytes. Equal = the same tokenizer."""
        ...

    def to_tokenizer_json(self) -> str:
        """The contents of a tokenizer.json that gives the same ids (data/tokenizer_fast.py). ValueError if none can."""
        ...

    def special_texts(self) -> list[str]:
        """How control and added tokens are written in text."""
        ...

    def save_huggingface(self, folder: str) -> None:
        """Write what makes AutoTokenizer.from_pretrained(folder) give the same ids. ValueError if it can't."""
        ...


def build_tokenizer(type: str, model: str | None, vocab_size: int | None) -> Tokenizer:
    """The tokenizer of a `--tokenizer-type`.

    Args:
        model: the .model file (SentencePiece) or the folder (Hugging Face).
        vocab_size: used by NullTokenizer only.

    Raises:
        ValueError: unknown type, a missing or unreadable model, or a missing vocabulary size.
    """
    if type == "NullTokenizer":
        return NullTokenizer(vocab_size)
    classes = {"SentencePieceTokenizer": SentencePiece, "GPTSentencePieceTokenizer": SentencePiece,
               "Llama2Tokenizer": SentencePiece, "HuggingFaceTokenizer": HuggingFace}
    if type not in classes:
        raise ValueError(f"tokenizer_type = {type}: unknown. Fix: one of {', '.join(classes)}, NullTokenizer.")
    if not model:
        raise ValueError(f"tokenizer_model = {model}: must be given for {type}. Fix: give --tokenizer-model.")
    return classes[type](model)


class SentencePiece:
    """A SentencePiece .model file. eod is its eos piece (`</s>`). Text that contains U+2581 decodes as a space."""

    def __init__(self, model: str):
        import sentencepiece

        if not Path(model).is_file():
            raise ValueError(f"tokenizer_model = {model}: no such file. Fix: give SentencePiece's .model file, or "
                             "train one with tools.train_tokenizer.")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=model)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"tokenizer_model = {model}: not a SentencePiece model ({error}). Fix: give its .model "
                             "file, or --tokenizer-type HuggingFaceTokenizer for a Hugging Face folder.") from None
        self.files = [model]
        self.vocab_size = self._processor.get_piece_size()
        eos = self._processor.eos_id()
        self.eod = eos if eos >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def describe(self) -> dict:
        return {"type": "SentencePieceTokenizer", "vocab_size": self.vocab_size, "fingerprint": _hash(self.files)}

    def to_tokenizer_json(self) -> str:
        from data.tokenizer_huggingface import convert_sentencepiece

        return _without_special(convert_sentencepiece(self.files[0])[0].to_str())

    def special_texts(self) -> list[str]:
        pieces = self._processor
        return [pieces.id_to_piece(i) for i in range(self.vocab_size) if pieces.is_control(i) or pieces.is_unknown(i)]

    def save_huggingface(self, folder: str) -> None:
        """Write tokenizer.json, tokenizer_config.json and tokenizer.model, and compare the ids on source code.

        Raises:
            ValueError: transformers gives other ids, or the model is not BPE.
        """
        from transformers import PreTrainedTokenizerFast

        from data.tokenizer_huggingface import convert_sentencepiece

        backend, special = convert_sentencepiece(self.files[0])
        # split_special_tokens: "</s>" written in a text is text, as in SentencePiece, not the end of a document.
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False,
                                       split_special_tokens=True, **special)
        fast.save_pretrained(folder)
        shutil.copy(self.files[0], Path(folder) / "tokenizer.model")
        _compare_with_huggingface(self, folder)


class HuggingFace:
    """A folder with a Hugging Face tokenizer. eod is its eos token. Its special tokens are parsed in text too."""

    def __init__(self, model: str):
        from transformers import AutoTokenizer

        folder = Path(model)
        self.files = [str(folder / name) for name in HUGGINGFACE_FILES if (folder / name).is_file()]
        if not self.files:
            raise ValueError(f"tokenizer_model = {model}: must be a local folder with tokenizer.json, so that every "
                             "rank reads the same files. Fix: download it first (hf download NAME --local-dir DIR).")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
        except Exception as error:  # transformers raises many kinds for a bad folder
            reason = (str(error).splitlines() or [error.__class__.__name__])[0]
            raise ValueError(f"tokenizer_model = {model}: transformers cannot read it ({reason}). Fix: give a folder "
                             "with tokenizer.json and tokenizer_config.json.") from None
        # Added tokens may leave gaps, so the count of tokens is not the largest id.
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.eod = self._tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)

    def describe(self) -> dict:
        return {"type": "HuggingFaceTokenizer", "vocab_size": self.vocab_size, "fingerprint": _hash(self.files)}

    def to_tokenizer_json(self) -> str:
        if not self._tokenizer.is_fast:
            raise ValueError("it has no tokenizer.json")
        definition = self._tokenizer.backend_tokenizer.to_str()
        # What tokenizer.json cannot say: special tokens written in a text are text.
        return _without_special(definition) if self._tokenizer.split_special_tokens else definition

    def special_texts(self) -> list[str]:
        return list(self._tokenizer.get_added_vocab())

    def save_huggingface(self, folder: str) -> None:
        """Copy the files and compare the ids.

        Raises:
            ValueError: transformers gives other ids beside the config.json that is already in the folder.
        """
        for file in self.files:
            shutil.copy(file, Path(folder) / Path(file).name)
        _compare_with_huggingface(self, folder)


class NullTokenizer:
    """Text of integers, for data that is already tokenized.

    eod is `vocab_size - 1`. Megatron-Core's class counts the end-of-document token beside its vocab_size argument
    (V gives V + 1 ids and eod = V); here vocab_size is the number of ids, eod among them. For data made there with
    V, give V + 1.
    """

    def __init__(self, vocab_size: int | None):
        if vocab_size is None or vocab_size < 2:
            raise ValueError(f"vocab_size = {vocab_size}: NullTokenizer needs at least 2. Fix: give --vocab-size, one "
                             "more than the largest id.")
        self.vocab_size, self.eod = vocab_size, vocab_size - 1
        self.files: list[str] = []

    def encode(self, text: str) -> list[int]:
        """Ids of whitespace-separated integers. ValueError: not integers in [0, vocab_size)."""
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise ValueError(f"NullTokenizer: text must be whitespace-separated integers ({error}). Fix: the input, "
                             "or another --tokenizer-type.") from None
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong}: must be in [0, vocab_size = {self.vocab_size}). Fix: the input, or a "
                             "larger --vocab-size.")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(i)) for i in ids)

    def describe(self) -> dict:
        return {"type": "NullTokenizer", "vocab_size": self.vocab_size, "fingerprint": _hash([])}

    def to_tokenizer_json(self) -> str:
        raise ValueError("its text is integers")

    def special_texts(self) -> list[str]:
        return []

    def save_huggingface(self, folder: str) -> None:
        raise ValueError(f"tokenizer_type = NullTokenizer: there is no tokenizer to write to {folder}. Fix: put the "
                         "files of the tokenizer that made the ids there.")


def _hash(files: list[str]) -> str:
    """xxh3 of the files' names and bytes, hex. A single file's name does not count: it is renamed freely."""
    digest = xxhash.xxh3_128()
    for file in sorted(files, key=lambda file: Path(file).name):
        if len(files) > 1:
            digest.update(Path(file).name.encode() + b"\0")
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _without_special(definition: str) -> str:
    """A tokenizer.json under which special tokens written in a text are text."""
    parts = json.loads(definition)
    parts["added_tokens"] = [token for token in parts["added_tokens"] if not token["special"]]
    return json.dumps(parts)


def _compare_with_huggingface(tokenizer: Tokenizer, folder: str) -> None:
    """Raises ValueError unless AutoTokenizer on the folder gives our ids on source code."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    # This package's own files are the source code at hand.
    texts = [SAMPLE_TEXT] + [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    for text in texts:
        if theirs.encode(text, add_special_tokens=False, verbose=False) == tokenizer.encode(text):
            continue
        config = Path(folder) / "config.json"
        kind = json.loads(config.read_text()).get("model_type") if config.is_file() else None
        raise ValueError(
            f"{folder}: transformers' {theirs.__class__.__name__} gives other ids than the tokenizer trained with, on "
            f"the text that begins {text[:30]!r} (model_type {kind}). Fix: transformers ties some model types, qwen2 "
            "among them, to a tokenizer class of their own; otherwise only BPE models trained by "
            "tools.train_tokenizer are sure to convert.")
