"""Continue a text with an exported model: `python -m tools.generate --load HF_DIR --prompt TEXT`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro


@dataclass(kw_only=True)
class Arguments:
    load: str
    """A Hugging Face folder (tools.export_hf writes one)."""
    prompt: str = ""
    """Text to continue."""
    max_new_tokens: int = 80
    """Tokens to add."""
    temperature: float = 0.8
    """0 = always the likeliest token."""
    seed: int = 1234
    """Of the sampling."""


def main() -> int:
    arguments = tyro.cli(Arguments, prog="tools.generate", description=__doc__)
    if not (Path(arguments.load) / "config.json").is_file():
        print(f"error: load = {arguments.load}: no Hugging Face folder (no config.json). Fix: export one with "
              "tools.export_hf.", file=sys.stderr)
        return 2
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.load)
    model = AutoModelForCausalLM.from_pretrained(arguments.load).eval()
    ids = tokenizer.encode(arguments.prompt, add_special_tokens=False) or [model.config.eos_token_id]
    torch.manual_seed(arguments.seed)
    sampling = {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature > 0 \
        else {"do_sample": False}
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                             max_new_tokens=arguments.max_new_tokens, pad_token_id=model.config.eos_token_id,
                             **sampling)
    print(tokenizer.decode(out[0].tolist()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
