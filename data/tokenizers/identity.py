"""What makes two tokenizers the same: what they say of themselves, and the ids that they give.

A description is what `Tokenizer.describe` returns and what corpora and checkpoints store:

    type          the kind of tokenizer
    vocab_size    one more than its largest id
    fingerprint   of the bytes of its files
    ids           of all that decides the ids of a text (Hugging Face folders only)
    ids_from      where those ids are defined: tokenizer.json or AutoTokenizer
    eod           the id that ends a document (Hugging Face folders only)
    transformers  its version, where AutoTokenizer made the tokenizer
    sentencepiece fingerprint of the .model file that gives every text the same ids, where that is
                  proven (Hugging Face folders only)

`eod` decides no id of a text, but which id ends documents in a corpus and generation in a model:
folders of one tokenizer.json may differ in it. Descriptions without `ids` were stored before it
existed, and are compared by the fingerprint of the files. A .model file and the folder that an
export made of it are one tokenizer, known by `sentencepiece`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

SAMPLE_TEXT = (
    "def f(x):\n\tif x  >  1:\r\n\t\treturn  'a\\tb'   # 3.14159, 2026\n\n\n        pass\n \n"
    "<s> </s> <unk> <0x0A>\n日本語 é e\u0301 \u200b 😀 \x00\n"
    + "=" * 79
    + "\n"
    + " " * 77
    + "x\n  "
)
"""What tokenizers differ on: tabs, runs of spaces, newlines, control tokens, rare letters."""


def same_tokenizer(theirs: dict | None, ours: dict | None) -> bool:
    """Tell whether two descriptions are those of one tokenizer."""
    if not theirs or not ours:
        return theirs == ours
    # A folder that was proven to give the ids of the other's .model file.
    if {theirs.get("type"), ours.get("type")} == {"SentencePieceTokenizer", "HuggingFaceTokenizer"}:
        pieces, folder = sorted((theirs, ours), key=lambda each: each["type"], reverse=True)
        made_of = folder.get("sentencepiece")
        is_made_of_it = made_of is not None and made_of == pieces.get("fingerprint")
        return is_made_of_it and folder.get("vocab_size") == pieces.get("vocab_size")
    both = theirs.keys() & ours.keys()
    # What both have: older descriptions lack `ids` and `eod`.
    compared = ["type", "vocab_size", "ids" if "ids" in both else "fingerprint"]
    if "eod" in both:
        compared.append("eod")
    return all(theirs.get(name) == ours.get(name) for name in compared)


def hash_files(files: list[str]) -> str:
    """Hash the files' names and bytes -> xxh3, hex. A single file may have any name."""
    digest = xxhash.xxh3_128()
    for file in sorted(files, key=lambda file: Path(file).name):
        if len(files) > 1:
            digest.update(Path(file).name.encode() + b"\0")
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def hash_text(text: str) -> str:
    """Hash a text -> xxh3, hex."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def source_texts() -> list[str]:
    """List `SAMPLE_TEXT` and the source code at hand, all of data/."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return [SAMPLE_TEXT] + [path.read_text(encoding="utf-8") for path in files]


def compare_with_huggingface(
    encode: Callable[[str], list[int]], folder: str, definition: str | None, **settings
) -> None:
    """Raise ValueError unless AutoTokenizer on the folder gives the ids of `encode`.

    Args:
        definition: the tokenizer.json that gives the ids of `encode`; None where there is none, and
            source code alone is compared.
        settings: for AutoTokenizer.from_pretrained.
    """
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(folder, **settings)
    # Texts at hand first, whose difference can be shown, then the definitions.
    other = next(
        (
            f"on the text that begins {text[:30]!r}"
            for text in source_texts()
            if theirs.encode(text, add_special_tokens=False, verbose=False) != encode(text)
        ),
        None,
    )
    if other is None and definition is not None and theirs.is_fast:
        # A sample holds few of the texts that, say, an added token's flags act on.
        different = differing_parts(definition, theirs.backend_tokenizer.to_str())
        if different:
            other = f"on some texts, since their {' and '.join(different)} differ"
    if other is None:
        return
    config = Path(folder) / "config.json"
    kind = json.loads(config.read_text()).get("model_type") if config.is_file() else None
    raise ValueError(
        f"{folder}: transformers' {theirs.__class__.__name__} gives other ids than the tokenizer "
        f"trained with, {other} (model_type {kind}). Fix: transformers ties some model types, "
        "qwen2 among them, to a tokenizer class of their own; otherwise only BPE models trained by "
        "bash launch/ithaca.sh train-tokenizer are sure to convert."
    )


# ---------------------------------------------------------------- definitions of tokenizer.json


def flatten_steps(step: dict | None, children: str) -> list[dict[str, Any]]:
    """List the steps of a normalizer or pre-tokenizer, one after another.

    Args:
        children: name of the list of steps in a Sequence: `normalizers` or `pretokenizers`.
    """
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for child in step[children] for inner in flatten_steps(child, children)]
    return [step]


def deciding_parts(definition: str) -> dict[str, Any]:
    """Pick what in a tokenizer.json decides the ids of a text, in one spelling."""
    parts = json.loads(definition)
    # Settings that do nothing are written as null, as empty, or not at all.
    model = dict(parts["model"])
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if not model.get(name):
            model.pop(name, None)
    steps = flatten_steps(parts.get("pre_tokenizer"), "pretokenizers")
    if _writes_all_bytes(model, steps):
        for name in ("unk_token", "fuse_unk"):  # nothing is unknown
            model.pop(name, None)
    return {
        "normalizer": flatten_steps(parts.get("normalizer"), "normalizers"),
        # trim_offsets: where a token is in the text, not which it is.
        "pre_tokenizer": [
            {key: value for key, value in step.items() if key != "trim_offsets"} for step in steps
        ],
        "model": model,
        "added_tokens": sorted(parts["added_tokens"], key=lambda token: token["id"]),
    }


def differing_parts(one: str, other: str) -> list[str]:
    """Name the parts in which two definitions give texts other ids.

    A special token that only one of them has is no such part: it gives no text its id.
    """
    first = deciding_parts(one)
    second = deciding_parts(other)
    names = [
        name for name in ("normalizer", "pre_tokenizer", "model") if first[name] != second[name]
    ]
    # Added tokens: those that both have, and the plain ones of either.
    special = {
        token["content"]
        for parts in (first, second)
        for token in parts["added_tokens"]
        if token["special"]
    }
    both = {token["content"] for token in first["added_tokens"]} & {
        token["content"] for token in second["added_tokens"]
    }
    tokens = [
        [
            {key: value for key, value in token.items() if key != "special"}
            for token in parts["added_tokens"]
            if token["content"] not in special or token["content"] in both
        ]
        for parts in (first, second)
    ]
    return names + ["added_tokens"] * (tokens[0] != tokens[1])


def byte_letters() -> list[str]:
    """List the letters that byte-level BPE writes the 256 bytes with."""
    # Visible bytes are written as themselves, the others as the letters from 256 on.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in visible] + [
        chr(256 + number) for number in range(256 - len(visible))
    ]


def _writes_all_bytes(model: dict[str, Any], pre_tokenizer: list[dict[str, Any]]) -> bool:
    """Tell whether every text has ids, as each byte has a token of its own."""
    if model.get("type") != "BPE":
        return False
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    return (
        any(step["type"] == "ByteLevel" for step in pre_tokenizer)
        and set(byte_letters()) <= model["vocab"].keys()
    )
