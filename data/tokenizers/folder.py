"""A folder with a Hugging Face tokenizer: which of its definitions gives the ids, and the ids.

A folder defines its tokenizer twice: in tokenizer.json, and by what transformers' AutoTokenizer
makes of all its files. From transformers 5 on the class and the model_type may replace steps of
tokenizer.json, so that the two give other ids. Where they agree nobody has to care; where they do
not, one must be chosen.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.tokenizers.convert import is_exact_conversion
from data.tokenizers.identity import (
    SAMPLE_TEXT,
    compare_with_huggingface,
    deciding_parts,
    differing_parts,
    hash_files,
    hash_text,
    source_texts,
)
from data.tokenizers.sentencepiece_model import SentencePiece

if TYPE_CHECKING:
    from data.tokenizers.rules import FastRules

IdsFrom = Literal["tokenizer.json", "AutoTokenizer"]
"""Which of a folder's two definitions gives the ids."""
SpecialTokensInText = Literal["keep", "as-text", "refuse"]
HUGGINGFACE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
"""Files that AutoTokenizer reads besides config.json."""
FINGERPRINTED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
"""Frozen: descriptions that were stored earlier hold a hash of these."""


def tokenizer_files(folder: Path) -> list[str]:
    """List the files that AutoTokenizer reads in a folder; none where it has no tokenizer.

    config.json is one: its model_type names the class where nothing else does.
    """
    files = [str(folder / name) for name in HUGGINGFACE_FILES if (folder / name).is_file()]
    if files and (folder / "config.json").is_file():
        files.append(str(folder / "config.json"))
    return files


class TwoDefinitions(ValueError):
    """A folder's two definitions give other ids, and none was chosen."""


class HuggingFace:
    """Encodes by a folder with a Hugging Face tokenizer. eod is its eos token."""

    def __init__(self, model: str, *, ids_from: IdsFrom | None = None, keep_special: bool = False):
        """
        Args:
            ids_from: which definition gives the ids; None where both do.
            keep_special: special tokens that are written in a text are those tokens, and not text.

        Raises:
            ValueError: the folder cannot be read, or its definitions differ and none was chosen.
        """
        folder = Path(model)
        self.files = tokenizer_files(folder)
        if not self.files:
            raise ValueError(
                f"tokenizer_model = {model}: must be a local folder with tokenizer.json, so that "
                "every rank reads the same files. Fix: download it first (hf download NAME "
                "--local-dir DIR)."
            )
        self._fingerprint = hash_files(
            [file for file in self.files if Path(file).name in FINGERPRINTED_FILES]
        )
        # What transformers makes of the folder is read in any case: it names eos and bos.
        self._made = _read_with_transformers(model)
        declared = _read_tokenizer_json(folder)
        self.ids_from = _choose(model, declared, self._made, ids_from)
        if self.ids_from == "AutoTokenizer":
            self._backend = getattr(self._made, "backend_tokenizer", None)
        else:
            self._backend = _mark_special(declared, self._made.all_special_tokens)
        self._keep_special = keep_special
        if keep_special and self._made.split_special_tokens:
            raise ValueError(
                f"special_tokens_in_text = keep: {model} itself says split_special_tokens, that "
                "they are text. Fix: as-text."
            )
        # A tokenizer.json may cut or pad texts, which a corpus must not.
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = not keep_special
        # Added tokens may leave gaps, so the count of tokens is not the largest id.
        source = self._backend if self._backend is not None else self._made
        self.vocab_size = max(source.get_vocab().values(), default=-1) + 1
        self.eod = self._id_of(self._made.eos_token)
        self.bos = self._id_of(self._made.bos_token)

    @property
    def prefix_id(self) -> int | None:
        """Id that transformers puts before every text; None = it puts none there."""
        text = "a"
        plain = self._made.encode(text, add_special_tokens=False)
        whole = self._made.encode(text, add_special_tokens=True)
        # Some put an id behind a text only.
        return None if whole[:1] == plain[:1] else whole[0]

    def _id_of(self, token: str | None) -> int | None:
        """Find the id of a token; None where there is none."""
        if token is None:
            return None
        if self._backend is None:
            return self._made.convert_tokens_to_ids(token)
        return self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=False).ids
        return self._made.encode(
            text,
            add_special_tokens=False,
            verbose=False,
            split_special_tokens=not self._keep_special,
        )

    def decode(self, ids: Sequence[int]) -> str:
        # The libraries refuse numpy's integers.
        numbers = [int(i) for i in ids]
        if self._backend is not None:
            return self._backend.decode(numbers, skip_special_tokens=False)
        return self._made.decode(numbers, clean_up_tokenization_spaces=False)

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "type": "HuggingFaceTokenizer",
            "vocab_size": self.vocab_size,
            "fingerprint": self._fingerprint,
            "ids_from": self.ids_from,
            "eod": self.eod,
        }
        if self._backend is not None:
            found["ids"] = hash_text(
                json.dumps(deciding_parts(self._backend.to_str()), sort_keys=True)
            )
        else:
            # A class written in Python: its name, files and version are all that can be known.
            found["ids"] = hash_text(
                f"{self._made.__class__.__name__} {self._fingerprint} {version('transformers')}"
            )
        if self.ids_from == "AutoTokenizer":
            found["transformers"] = version("transformers")
        if self._sentencepiece is not None:
            found["sentencepiece"] = self._sentencepiece
        return found

    @cached_property
    def _sentencepiece(self) -> str | None:
        """Fingerprint of the folder's tokenizer.model, if it provably gives every text the same
        ids; else None."""
        model = next((file for file in self.files if Path(file).name == "tokenizer.model"), None)
        if model is None or self._backend is None or self._keep_special:
            return None
        try:
            pieces = SentencePiece(model)
        except (ImportError, ValueError):  # another kind of file; no run needs it beside the folder
            return None
        if (pieces.vocab_size, pieces.eod, pieces.bos) != (self.vocab_size, self.eod, self.bos):
            return None
        is_same = is_exact_conversion(model, self._backend.to_str())
        return pieces.describe()["fingerprint"] if is_same else None

    def fast_rules(self) -> FastRules:
        from data.tokenizers.rules import rules_of_tokenizer_json

        if self._backend is None:
            raise ValueError("it has no tokenizer.json")
        return rules_of_tokenizer_json(self._backend.to_str(), keep_special=self._keep_special)

    def special_texts(self) -> list[str]:
        if self._backend is None:
            return list(self._made.all_special_tokens)
        tokens = self._backend.get_added_tokens_decoder().values()
        return [token.content for token in tokens if token.special]

    def special_tokens_left(self) -> list[str]:
        unknown = self._made.unk_token
        words = [word for word in self.special_texts() if word != unknown]
        return [
            word for word in words if self._id_of(word) in self.encode(f"{word} a{word}b {word}")
        ]

    def save_huggingface(self, folder: str) -> None:
        """Copy the files and compare the ids.

        Raises:
            ValueError: transformers gives other ids beside the config.json that is already in the
                folder.
        """
        for file in self.files:
            if Path(file).name != "config.json":  # the model's own is there
                shutil.copy(file, Path(folder) / Path(file).name)
        try:
            self._compare(folder)
        except ValueError:
            settings_file = Path(folder) / "tokenizer_config.json"
            if self.ids_from != "tokenizer.json" or not settings_file.is_file():
                raise
            # The class in the settings made AutoTokenizer replace steps of tokenizer.json: name the
            # one that does not.
            settings = json.loads(settings_file.read_text(encoding="utf-8"))
            before = settings.get("tokenizer_class")
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            settings_file.write_text(
                json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            self._compare(folder)
            print(
                f"{settings_file}: tokenizer_class was {before}, now PreTrainedTokenizerFast, so "
                "that AutoTokenizer gives the ids of tokenizer.json",
                file=sys.stderr,
            )

    def _compare(self, folder: str) -> None:
        """Raise ValueError unless AutoTokenizer on the folder gives this tokenizer's ids."""
        definition = self._backend.to_str() if self._backend is not None else None
        compare_with_huggingface(
            self.encode, folder, definition, split_special_tokens=not self._keep_special
        )


def refuse_tokens_beside_model(folder: Path, tokenizer: SentencePiece) -> None:
    """Raise ValueError if a folder without tokenizer.json says what its tokenizer.model does not.

    That is a token beyond the model's pieces, or another piece as eos or bos.
    """
    fix = (
        "Fix: write its tokenizer.json with transformers "
        "(AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))."
    )
    # Tokens may be added in two files, in two spellings.
    found: dict[str, int] = _read_object(folder / "added_tokens.json")
    settings = _read_object(folder / "tokenizer_config.json")
    found |= {
        token["content"]: int(number)
        for number, token in settings.get("added_tokens_decoder", {}).items()
    }
    beyond = [content for content, number in found.items() if number >= tokenizer.vocab_size]
    if beyond:
        raise ValueError(
            f"tokenizer_model = {folder}: adds {len(beyond)} tokens, as {beyond[0]!r}, that its "
            f"tokenizer.model does not have. {fix}"
        )
    # A token is written as a text, or as an object that holds it.
    for role, number in (("eos_token", tokenizer.eod), ("bos_token", tokenizer.bos)):
        token = settings.get(role)
        content = token["content"] if isinstance(token, dict) else token
        if content is not None and tokenizer.id_of(content) != number:
            raise ValueError(
                f"tokenizer_model = {folder}: tokenizer_config.json has {role} = {content!r}, "
                f"which is not that of its tokenizer.model. {fix}"
            )


def _read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}). Fix: download it again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object. Fix: download it again.")
    return found


def _read_with_transformers(model: str) -> Any:
    """Let AutoTokenizer read a folder. ValueError where it cannot."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises many kinds for a bad folder
        reason = (str(error).splitlines() or [error.__class__.__name__])[0]
        raise ValueError(
            f"tokenizer_model = {model}: transformers cannot read it ({reason}). Fix: give a "
            "folder with tokenizer.json and tokenizer_config.json."
        ) from None


def _read_tokenizer_json(folder: Path) -> Any:
    """Read the tokenizer that tokenizer.json defines; None where there is no such file."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # a plain Exception for all that is wrong in the file
        raise ValueError(
            f"tokenizer_model = {folder}: tokenizer.json cannot be read ({error}). Fix: download "
            "it again."
        ) from None


def _mark_special(declared: Any, names: Sequence[str]) -> Any:
    """Make these of a tokenizer's added tokens special ones, as transformers does.

    tokenizer_config.json may name an eos token that tokenizer.json does not call special; written
    in a text, it would end the document.
    """
    from tokenizers import Tokenizer

    parts = json.loads(declared.to_str())
    plain = [
        token
        for token in parts["added_tokens"]
        if token["content"] in names and not token["special"]
    ]
    for token in plain:
        token["special"] = True
    return Tokenizer.from_str(json.dumps(parts)) if plain else declared


def _choose(model: str, declared: Any, made: Any, asked: IdsFrom | None) -> IdsFrom:
    """Choose which definition gives the ids. ValueError where they differ and none was asked
    for."""
    if declared is None:
        if asked == "tokenizer.json":
            raise ValueError(
                f"tokenizer_ids_from = tokenizer.json: {model} has no such file. Fix: "
                "AutoTokenizer."
            )
        return "AutoTokenizer"
    if asked is not None:
        return asked
    # Without a choice, both must give the same ids: then either will do.
    if not made.is_fast:
        different = ["the class, which is written in Python"]
    else:
        different = differing_parts(declared.to_str(), made.backend_tokenizer.to_str())
    if not different:
        return "AutoTokenizer"
    raise TwoDefinitions(
        f"tokenizer_model = {model}: tokenizer.json and transformers' AutoTokenizer "
        f"({made.__class__.__name__}) define other ids ({', '.join(different)} differ"
        f"{_example(declared, made)}). Fix: --tokenizer-ids-from tokenizer.json or AutoTokenizer, "
        "whichever made the ids that the model knows."
    )


def _example(declared: Any, made: Any) -> str:
    """Show the first line at hand with two sorts of ids: `: 'text' is [ids] and [ids]`."""
    lines = [line for text in source_texts() for line in text.splitlines()]
    for text in [*SAMPLE_TEXT.splitlines(), *lines]:
        theirs = made.encode(text, add_special_tokens=False, verbose=False)
        ours = declared.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            # Where one is the beginning of the other, from its first token.
            pairs = zip(ours, theirs, strict=False)
            first = next((i for i, (one, other) in enumerate(pairs) if one != other), 0)
            ids = f"{ours[first : first + 6]} and {theirs[first : first + 6]}"
            return f": {text[:40]!r} is {ids} from token {first} on"
    return ", though in no text at hand"
