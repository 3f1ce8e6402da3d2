"""SentencePiece's own models: text to ids by its library, and what its definition says."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.tokenizers.identity import compare_with_huggingface, hash_files

if TYPE_CHECKING:
    from data.tokenizers.rules import FastRules


class SentencePiece:
    """Encodes by a SentencePiece .model file. eod is its `</s>`. U+2581 decodes as a space."""

    def __init__(self, model: str):
        import sentencepiece

        if not Path(model).is_file():
            raise ValueError(
                f"tokenizer_model = {model}: no such file. Fix: give SentencePiece's .model file, "
                "or train one with bash launch/ithaca.sh train-tokenizer."
            )
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=model)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"tokenizer_model = {model}: not a SentencePiece model ({error}). Fix: give its "
                ".model file, or --tokenizer-type HuggingFaceTokenizer for a Hugging Face folder."
            ) from None
        # -1 = the model has no such piece.
        self.files = [model]
        self.vocab_size = self._processor.get_piece_size()
        eos = self._processor.eos_id()
        bos = self._processor.bos_id()
        self.eod = eos if eos >= 0 else None
        self.bos = bos if bos >= 0 else None

    def id_of(self, piece: str) -> int | None:
        """Find the id of a piece; None where the model has no such one."""
        # The library gives the id of <unk> for what it does not know.
        number = self._processor.piece_to_id(piece)
        return number if self._processor.id_to_piece(number) == piece else None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def describe(self) -> dict:
        return {
            "type": "SentencePieceTokenizer",
            "vocab_size": self.vocab_size,
            "fingerprint": hash_files(self.files),
        }

    def fast_rules(self) -> FastRules:
        from data.tokenizers.convert import convert_sentencepiece
        from data.tokenizers.rules import rules_of_sentencepiece

        return rules_of_sentencepiece(
            self.files[0], convert_sentencepiece(self.files[0])[0].to_str()
        )

    def special_texts(self) -> list[str]:
        pieces = self._processor
        return [
            pieces.id_to_piece(i)
            for i in range(self.vocab_size)
            if pieces.is_control(i) or pieces.is_unknown(i)
        ]

    def special_tokens_left(self) -> list[str]:
        return []

    def save_huggingface(self, folder: str) -> None:
        """Write tokenizer.json, its settings and tokenizer.model, and compare the ids.

        Raises:
            ValueError: no tokenizer.json gives the same ids for every text, or transformers gives
            other ids.
        """
        from transformers import PreTrainedTokenizerFast

        from data.tokenizers.convert import convert_sentencepiece, refuse_inexact_conversion

        backend, special = convert_sentencepiece(self.files[0])
        refuse_inexact_conversion(self.files[0])
        # split_special_tokens: "</s>" written in a text is text, as in SentencePiece, not the end
        # of a document.
        fast = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=False,
            split_special_tokens=True,
            **special,
        )
        fast.save_pretrained(folder)
        shutil.copy(self.files[0], Path(folder) / "tokenizer.model")
        compare_with_huggingface(self.encode, folder, backend.to_str())
