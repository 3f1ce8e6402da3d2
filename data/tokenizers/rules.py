"""Which texts gigatoken encodes to the tokenizer's own ids, by the tokenizer's definition.

gigatoken reads a tokenizer.json and passes over what it does not know in it, so every part of the
definition must be one that it is known to do identically. Where that holds only for some texts, a
cheap test finds the others, and the tokenizer itself encodes those:

    added tokens       with flags, changed by normalization, overlapping, or beside a prefix
    NFC                texts that it changes: gigatoken's tables are of a newer Unicode
    letters            that Unicode assigned recently: they are letters to one of the two only
    character maps     all but printable ASCII: SentencePiece maps the longest match, not graphemes
    extra spaces       texts that begin or end with one
"""

import functools
import json
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data.tokenizers.added_tokens import AddedTokens
from data.tokenizers.convert import (
    SPACE,
    read_model,
    tied_pieces,
    unsupported_settings,
    user_defined_pieces,
)
from data.tokenizers.identity import byte_letters, flatten_steps
from data.tokenizers.splits import SPLITS
from data.tokenizers.text_search import TextSearch

RECLASSIFIED = "\u0295"
"""A small letter until Unicode 16, and one without case from 17 on."""
IGNORED_PARTS = ("truncation", "padding", "post_processor", "decoder")
"""Parts of a tokenizer.json that do not act on the ids of a text."""
BPE_DEFAULTS = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}
"""Settings of the model that gigatoken passes over -> the values with which they do nothing."""

Letters = Literal["assigned", "printable"]
"""Letters that a fast text may have: those that Unicode has assigned for long, or printable ASCII
and newlines."""


@dataclass(frozen=True)
class FastRules:
    """Tells which texts are fast (gigatoken encodes them identically) and which are slow (the
    tokenizer itself has to)."""

    definition: str
    """The tokenizer.json that gigatoken is given."""
    slow_words: tuple[str, ...] = ()
    """Texts that hold one of them are slow."""
    letters: Letters = "assigned"
    nfc: bool = False
    """A fast text is what NFC makes of it."""
    edges: bool = False
    """A fast text neither begins nor ends with a space."""
    slow_beginnings: tuple[str, ...] = ()
    """Texts that begin with one of them are slow."""

    @functools.cached_property
    def _search(self) -> TextSearch:
        return TextSearch(self.slow_words)

    def slow(self, texts: Sequence[str]) -> list[int]:
        """List the numbers of the texts that the tokenizer itself has to encode, ascending."""
        # The cheap tests first; each looks only at what is still fast where that pays.
        found = set(self._search.count(texts))
        if self.slow_beginnings:
            found |= {i for i, text in enumerate(texts) if text.startswith(self.slow_beginnings)}
        if self.edges:
            ends = [text[:1] + text[-1:] for text in texts]
            found |= {i for i, end in enumerate(ends) if end[:1].isspace() or end[-1:].isspace()}
        # isascii is a flag of the text, so that English costs nothing here.
        every = self.letters == "printable"
        wide = [i for i, text in enumerate(texts) if every or not text.isascii()]
        # One look at all together: most batches have no slow letter, and are done after it.
        if wide and _has_slow_letter("".join([texts[i] for i in wide]), self.letters):
            found |= {i for i in wide if _has_slow_letter(texts[i], self.letters)}
        if self.nfc:
            left = [i for i in wide if i not in found]
            found |= {i for i in left if not unicodedata.is_normalized("NFC", texts[i])}
        return sorted(found)


def _has_slow_letter(text: str, letters: Letters) -> bool:
    """Tell whether a text has a letter that a fast one may not have."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return bool(_slow_letters(letters)[codes].any())


@functools.cache
def _slow_letters(letters: Letters) -> np.ndarray:
    """Mark the letters that a fast text may not have: bool [code points].

    The tokenizers library knows Unicode 16 and gigatoken 17, and they differ in nothing that both
    have assigned but RECLASSIFIED. Python 3.11 to 3.14 know 14 to 16, so that what this Python has
    not assigned holds all the rest. A text of assigned letters that is in NFC is so under every
    later Unicode and every earlier one.
    """
    codes = range(sys.maxunicode + 1)
    if letters == "printable":
        return np.array([not (32 <= code < 127 or code == 10) for code in codes])
    slow = np.array([unicodedata.category(chr(code)) == "Cn" for code in codes])
    slow[ord(RECLASSIFIED)] = True
    return slow


def rules_of_tokenizer_json(definition: str, *, keep_special: bool) -> FastRules:
    """Make the rules for a tokenizer of Hugging Face's.

    Args:
        keep_special: special tokens that are written in a text are those tokens, and not text.

    Raises:
        ValueError: says what in the definition gigatoken does otherwise.
    """
    parts = json.loads(definition)
    model = parts["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"gigatoken does not read {model['type']} models")
    # Settings that gigatoken passes over must have a value with which they do nothing.
    for name, harmless in BPE_DEFAULTS.items():
        if model.get(name) not in harmless:
            raise ValueError(f"gigatoken passes over {name} = {model[name]!r}")
    _check_merges(model)
    if model.get("byte_fallback"):
        return _rules_of_byte_fallback(parts, keep_special=keep_special)
    return _rules_of_byte_level(parts, keep_special=keep_special)


def _rules_of_byte_level(parts: dict[str, Any], *, keep_special: bool) -> FastRules:
    """Make the rules for byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    # Every piece is written in the letters of bytes, but for the added tokens.
    contents = {token["content"] for token in parts["added_tokens"]}
    alphabet = set(byte_letters())
    vocabulary = parts["model"]["vocab"]
    if not alphabet <= vocabulary.keys():
        raise ValueError("its vocabulary does not have all bytes")
    odd = next(
        (word for word in vocabulary if not alphabet.issuperset(word) and word not in contents),
        None,
    )
    if odd is not None:
        raise ValueError(f"its vocabulary holds {odd!r}, which is not written in bytes")
    # Then the steps before it: normalization, the split into words, added tokens.
    nfc = _only_nfc(parts.get("normalizer"))
    prefix = _check_byte_level(parts.get("pre_tokenizer"))
    added = AddedTokens(parts["added_tokens"], keep_special=keep_special, nfc=nfc, alone=prefix)
    return FastRules(_without_ignored(parts, added.fast), added.slow, nfc=nfc)


def _rules_of_byte_fallback(parts: dict[str, Any], *, keep_special: bool) -> FastRules:
    """Make the rules for BPE after SentencePiece, as Llama 2 has it."""
    # Every byte has a token, as itself or as a letter of ASCII.
    model = parts["model"]
    for byte in range(256):
        is_letter = byte < 128 and chr(byte) in model["vocab"]
        if f"<0x{byte:02X}>" not in model["vocab"] and not is_letter:
            raise ValueError(f"its vocabulary does not have the byte 0x{byte:02X}")
    if model.get("ignore_merges"):
        raise ValueError("gigatoken passes over ignore_merges beside byte_fallback")
    # Steps that clean a text up (extra spaces, other letters) are known only for plain texts.
    steps = flatten_steps(parts.get("normalizer"), "normalizers")
    cleans = [
        step["type"]
        for step in steps
        if step["type"] in ("Strip", "Precompiled") or step.get("pattern") == {"Regex": " {2,}"}
    ]
    # Of the other steps only those that write spaces as marks are known.
    prefix = False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif step["type"] not in ("Strip", "Precompiled") and step not in (
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ):
            raise ValueError(
                f"its normalizer has the step {json.dumps(step, ensure_ascii=False)[:80]}"
            )
    # A mark before each text may come from the pre-tokenizer, too.
    metaspace = _check_metaspace(parts.get("pre_tokenizer"))
    prefix = prefix or metaspace not in (None, "never")
    active = [token for token in parts["added_tokens"] if keep_special or not token["special"]]
    if steps and any(token["normalized"] for token in active):
        raise ValueError("it looks for added tokens in the normalized text")
    added = AddedTokens(
        parts["added_tokens"], keep_special=keep_special, nfc=False, alone=prefix or bool(cleans)
    )
    # Where a mark is added only if there is none, those in the text itself decide.
    marks = (SPACE,) if cleans or metaspace is not None else ()
    return FastRules(
        _without_ignored(parts, added.fast),
        (*added.slow, *marks),
        letters="printable" if "Precompiled" in cleans else "assigned",
        edges=bool(cleans) or metaspace is not None,
    )


def rules_of_sentencepiece(model: str, definition: str) -> FastRules:
    """Make the rules for a SentencePiece model.

    Args:
        definition: the tokenizer.json that the model converts to.

    Raises:
        ValueError: says what in the model gigatoken does otherwise.
    """
    proto = read_model(model)
    if unsupported := unsupported_settings(proto):
        raise ValueError(f"gigatoken does not do {unsupported}")
    # The model's own normalization, in steps that gigatoken does or that make a text slow.
    spec = proto.normalizer_spec
    parts = json.loads(definition)
    steps = []
    if spec.precompiled_charsmap:
        converted = parts["normalizer"]["normalizers"]
        steps.append(next(step for step in converted if step["type"] == "Precompiled"))
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    symbols = user_defined_pieces(proto)
    # A symbol is an added token to gigatoken, where nothing changes it or what is beside it.
    changing = spec.precompiled_charsmap or spec.remove_extra_whitespaces or spec.add_dummy_prefix
    exact = not changing and not any(SPACE in symbol or " " in symbol for symbol in symbols)
    pieces = tied_pieces(proto) if exact else symbols + tied_pieces(proto)
    words = _forms(pieces)
    # A dummy prefix makes a piece of what follows it.
    prefixed = [piece.removeprefix(SPACE) for piece in pieces if piece.startswith(SPACE)]
    beginnings = _forms(prefixed) if spec.add_dummy_prefix else []
    if spec.remove_extra_whitespaces or any(SPACE in piece for piece in pieces):
        words.append(SPACE)  # among spaces it makes more forms of a piece than these two
    kept = [
        token | {"normalized": False}
        for token in parts["added_tokens"]
        if not token["special"] and exact
    ]
    parts["normalizer"] = {"type": "Sequence", "normalizers": steps}
    rules = rules_of_tokenizer_json(json.dumps(parts | {"added_tokens": kept}), keep_special=False)
    return FastRules(
        rules.definition,
        (*rules.slow_words, *words),
        letters=rules.letters,
        edges=rules.edges,
        slow_beginnings=tuple(beginnings),
    )


def _forms(pieces: Sequence[str]) -> list[str]:
    """List how pieces are written in a text: with spaces, or with the marks themselves."""
    return [form for piece in pieces for form in (piece, piece.replace(SPACE, " "))]


def _check_merges(model: dict[str, Any]) -> None:
    """Raise ValueError where gigatoken ranks the merges in another way than their list."""
    vocabulary = model["vocab"]
    merges = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
        for merge in model["merges"]
    ]
    if len(set(merges)) < len(merges):
        raise ValueError("it lists a merge twice")
    if any(part.startswith("<0x") and len(part) == 6 for merge in merges for part in merge):
        raise ValueError("it merges bytes")
    made = [vocabulary[left + right] for left, right in merges]
    # Byte-level merges whose tokens are in order are ranked by the token, all others by their place
    # in the list.
    if not model.get("byte_fallback") and made == sorted(made) and len(set(made)) < len(made):
        raise ValueError("two of its merges make the same token, one after the other")


def _check_byte_level(step: dict | None) -> bool:
    """Tell whether a space is put before texts. ValueError: gigatoken does a step otherwise."""
    # Either ByteLevel alone, which splits as GPT-2 does, or known splits and then ByteLevel.
    steps = flatten_steps(step, "pretokenizers")
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return bool(steps[0]["add_prefix_space"])
    if len(kinds) < 2 or kinds[-1] != "ByteLevel" or set(kinds[:-1]) != {"Split"}:
        raise ValueError(
            f"gigatoken does not split texts as {' and '.join(kinds) or 'no pre-tokenizer'} do"
        )
    if steps[-1].get("use_regex", True) or steps[-1]["add_prefix_space"]:
        raise ValueError("gigatoken passes over use_regex or add_prefix_space after another split")
    for split in steps[:-1]:
        if split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
            raise ValueError(
                f"gigatoken passes over the settings of the split {json.dumps(split)[:80]}"
            )
    if tuple(split["pattern"]["Regex"] for split in steps[:-1]) not in SPLITS.values():
        raise ValueError(
            f"gigatoken is not known to split by {steps[0]['pattern']['Regex'][:60]}..."
        )
    return False


def _check_metaspace(step: dict | None) -> str | None:
    """Tell when a mark is put before texts; None without Metaspace. ValueError: other steps."""
    steps = flatten_steps(step, "pretokenizers")
    if not steps:
        return None
    if steps == [
        {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        }
    ]:
        return None
    if [step["type"] for step in steps] != ["Metaspace"] or steps[0]["replacement"] != SPACE:
        raise ValueError(
            f"gigatoken does not split texts as {' and '.join(step['type'] for step in steps)} do"
        )
    return steps[0].get("prepend_scheme", "always")


def _only_nfc(step: dict | None) -> bool:
    """Tell whether there is a normalizer, and it is NFC. ValueError: another one."""
    kinds = [step["type"] for step in flatten_steps(step, "normalizers")]
    if set(kinds) - {"NFC"}:
        raise ValueError(f"gigatoken does not normalize as {' and '.join(kinds)} do")
    return bool(kinds)


def _without_ignored(parts: dict[str, Any], added: list[dict[str, Any]]) -> str:
    """Write a tokenizer.json without the parts that decide no ids, and with these added tokens."""
    return json.dumps(parts | dict.fromkeys(IGNORED_PARTS) | {"added_tokens": added})
