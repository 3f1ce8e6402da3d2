"""Hugging Face folders of chat models: with a tokenizer, chat templates and generation settings.

model_folders.py has models of three architectures without them, for comparisons of logits.
"""

import json
from pathlib import Path

FOX = "the quick brown fox jumps over the lazy dog"
TEXT = [FOX, "def f(x):\n    return x + 1", "12 34 56"] * 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
TOOL_CHAT = "{% for m in messages %}tool {{ m['content'] }}{% endfor %}"


def write_model(folder: Path, *, seed: int = 0, kind: str = "Llama", **settings) -> Path:
    """A model of 2 layers and width 16 with random weights."""
    import torch
    import transformers

    sizes = dict(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**sizes | settings)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, **settings) -> Path:
    """A byte-level BPE of at most 320 ids with chat templates and a model_max_length."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    roles = dict(
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|pad|>",
        model_max_length=64,
        chat_template={"default": CHAT, "tool": TOOL_CHAT},
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles | settings)
    tokenizer.save_pretrained(folder)
    return folder


def write_generation(folder: Path, **settings) -> Path:
    """A generation_config.json with two ids to stop at."""
    content = {
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "pad_token_id": 3,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
        "transformers_version": "4.40.0",
    }
    (folder / "generation_config.json").write_text(json.dumps(content | settings))
    return folder


def edit_json(path: Path, **changes) -> dict:
    """Change keys of a JSON file; None removes one -> the new content."""
    content = json.loads(path.read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps(content))
    return content
