"""An exported folder gives the same text in an engine that is neither transformers' nor ours.

CTranslate2 (`pip install ctranslate2==4.8.5`, a wheel for CPUs; not among the requirements) reads
folders by its own tables of names and settings. What it does not know is left out of the models
here: soft caps on scores, yarn, windows of Qwen and Gemma 2, a prompt longer than a window, OLMo,
Granite and SmolLM3. Its llama3 scaling gives other text than transformers does.
"""

from pathlib import Path

import pytest
import torch

from tests.huggingface.imports import run
from tests.huggingface.model_folders import LINEAR, transformers_model, write_folder
from tools.export_hf import Arguments, export
from tools.huggingface.compare_logits import our_logits
from tools.huggingface.questions import ComparedSequence
from tools.huggingface.stored_model import open_stored_model
from tools.huggingface.verify_export import model_of_checkpoint

VOCABULARY = 101
NAMED_TOKENS = 95
"""Tokens that have a name in the tokenizer; some architectures' classes add a few of their own."""
PROMPTS = 3
PROMPT_TOKENS = 24
NEW_TOKENS = 32
PLAIN = dict(rope_type="default", rope_theta=1e4)
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    head_dim=8,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
MODELS = {
    "llama": dict(rope_parameters=LINEAR),
    "mistral": dict(sliding_window=40),
    "qwen2": dict(rope_parameters=PLAIN),
    "qwen3": dict(rope_parameters=PLAIN),
    "gemma2": dict(
        attn_logit_softcapping=None,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=8,
        sliding_window=64,
    ),
    "gemma3_text": dict(query_pre_attn_scalar=8, sliding_window=40),
}
"""model_type -> settings; windows are longer than the prompts and shorter than the text."""


@pytest.mark.long
@pytest.mark.parametrize("kind", MODELS)
def test_an_exported_model_gives_the_same_text_elsewhere(tmp_path, kind):
    ctranslate2 = pytest.importorskip("ctranslate2")
    folder = write_folder(tmp_path / "hf", kind, **(SHAPE | MODELS[kind]))
    code, save = run(folder)
    assert code == 0
    exported = tmp_path / "exported"
    export(Arguments(load=str(save), output=str(exported)))

    write_tokenizer(exported)
    converted = str(tmp_path / "converted")
    ctranslate2.converters.TransformersConverter(str(exported)).convert(converted)
    engine = ctranslate2.Generator(converted, device="cpu", intra_threads=1)
    theirs = transformers_model(exported)
    ours = model_of_checkpoint(open_stored_model(str(save), None), exported)

    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(NAMED_TOKENS, (PROMPTS, PROMPT_TOKENS), generator=generator)
    texts = []
    for prompt in prompts:
        expected = continued_by_transformers(theirs, prompt)
        assert continued_by_us(ours, prompt) == expected
        found = engine.generate_batch(
            [[name_of(token) for token in prompt.tolist()]],
            max_length=NEW_TOKENS,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        assert found[0].sequences_ids[0] == expected
        texts += expected
    assert len(set(texts)) >= 5, "the same token over and over proves little"


def name_of(token: int) -> str:
    """Name of a token in the tokenizer."""
    return f"t{token}"


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words, which the engine asks for the names of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {name_of(token): token for token in range(NAMED_TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=name_of(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=name_of(0),
        bos_token=name_of(1),
        eos_token=name_of(2),
    ).save_pretrained(folder)


def continued_by_transformers(model, prompt: torch.Tensor) -> list[int]:
    """Tokens that follow a prompt, the largest logit each."""
    text = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return text[0][len(prompt) :].tolist()


def continued_by_us(model, prompt: torch.Tensor) -> list[int]:
    """The same with our model, the whole text again for each token."""
    text = prompt
    for _ in range(NEW_TOKENS):
        sequence = ComparedSequence("", text, torch.arange(len(text)))
        logits = our_logits(model, VOCABULARY, sequence)
        text = torch.cat([text, logits[-1:].argmax(-1)])
    return text[len(prompt) :].tolist()
