"""What a run of preprocess_data did, in numbers and in words."""

from dataclasses import dataclass

from data.idx_format import describe_one_token_documents
from tools.preprocessing.encoders import TextCounts
from tools.shared.message_text import count_of


@dataclass(frozen=True)
class Summary:
    """Counts what was read and written."""

    files: int
    bytes: int
    """Size of all input files."""
    documents: int
    tokens: int
    new_tokens: int
    """Tokens of this run, without those that an earlier one left."""
    new_bytes: int
    """Input of this run, without what an earlier one read."""
    empty: int
    bad: int
    single: int
    """Documents of one token."""
    seconds: float
    prepare_seconds: float
    """Time before the first text was tokenized: finding files, opening and comparing tokenizers."""
    cpu_seconds: float
    """CPU time of this process and its threads after preparing."""
    outputs: list[str]
    text: TextCounts
    encoder: str
    """Sentence about what encoded which documents."""
    special_tokens: str
    """Sentence about special tokens in documents; empty where there were none."""
    inputs: list[str]
    """Table of what was read and left out."""

    def lines(self) -> list[str]:
        """Write the summary for people."""
        work = self.seconds - self.prepare_seconds
        lines = [
            f"{count_of(self.documents, 'document')}, {count_of(self.tokens, 'token')} from "
            f"{self.bytes:,} bytes in {count_of(self.files, 'file')}; "
            f"prepared in {self.prepare_seconds:.1f} s, tokenized in {work:.1f} s: "
            f"{self.new_bytes / work / 1e6:.1f} MB/s, {self.new_tokens / work:,.0f} tokens/s",
            *self.inputs,
        ]
        if self.single:
            lines.append(describe_one_token_documents(self.single, self.documents))
        lines.append(f"encoder: {self.encoder}")
        if self.special_tokens:
            lines.append(self.special_tokens)
        return [*lines, f"wrote {', '.join(self.outputs)}"]
