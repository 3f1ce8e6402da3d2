"""Continue texts with a run's checkpoint or a Hugging Face folder: `bash launch/ithaca.sh generate
--load DIR --prompt TEXT`.

One prompt is continued in the terminal as its tokens come. Several (--prompt A B, --prompts FILE)
are continued in batches, and printed as JSON lines in their order. Without a tokenizer, prompts and
results are token ids. --tensor-model-parallel-size and --context-parallel-size share the model and
the prompts among processes that the command starts, so that a model is tried at the length that it
was trained for.
"""

import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from data.units import show_bytes
from parallel.layout import Layout
from tools.inference.decoding import Continuation, batches, check_memory, continue_batch
from tools.inference.generation_settings import GenerationSettings
from tools.inference.open_model import ModelArguments, OpenModel, open_model
from tools.inference.processes import run_door_on_processes, tell_all
from tools.inference.prompts import (
    STDIN,
    Prompt,
    encode_prompt,
    prompts_of_arguments,
    read_prompts,
    tokenizer_of,
)
from tools.inference.sampling import Sampling
from tools.inference.text_stream import TextStream
from tools.shared.message_text import count_of

LEAST_TEMPERATURE = 1e-4
"""Smallest temperature above 0; logits divided by a smaller one overflow."""
USUAL_TEMPERATURE = 0.8
"""Taken where neither the user nor the model's source says one."""


@dataclass(kw_only=True)
class Arguments(ModelArguments):
    load: str
    """The --save folder of a run, or a Hugging Face folder."""
    ckpt_step: int | None = None
    """Iteration of the run, instead of the latest."""
    prompt: list[str] = field(default_factory=list)
    """Texts to continue, one or several; token ids where there is no tokenizer. By default an empty
    one."""
    prompts: str | None = None
    """File of prompts, a line each; - is standard input. In .jsonl files, and in lines of standard
    input that begin with {": {"prompt": "text"} or {"ids": [5, 17]}."""
    max_new_tokens: int = 80
    """Tokens to add at most."""
    temperature: float | None = None
    """0 = always the likeliest token. By default what the model's source says, else 0.8."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens; 0 = from all. By default what the source
    says."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens whose probabilities reach this. By default what the
    source says."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that came before less likely. By default what the source says."""
    seed: int = 1234
    """Seed of the draws; a prompt's depend on it and on the prompt's number."""
    ignore_eos: bool = False
    """Go on after an end of text."""
    batch_size: int = 8
    """Prompts that are continued at once."""
    json: bool = False
    """Print JSON lines for a single prompt, too."""


def check_arguments(arguments: Arguments) -> None:
    """Raise ValueError for settings that no model can follow."""
    if arguments.prompt and arguments.prompts is not None:
        raise ValueError(
            f"prompts = {arguments.prompts}: cannot be combined with --prompt. Fix: remove one."
        )
    prompts_of_arguments(arguments.prompt)
    file = arguments.prompts
    # A bad file is found before the model is read; a pipe can be read only once.
    if file is not None and file != STDIN and not Path(file).is_fifo():
        read_prompts(file)
    # What must hold of a value that is given.
    temperature = arguments.temperature
    rules = {
        "max_new_tokens": (arguments.max_new_tokens >= 0, "at least 0", "80"),
        "batch_size": (arguments.batch_size >= 1, "at least 1", "8"),
        "seed": (0 <= arguments.seed < 2**63, "in [0, 2**63)", "1234"),
        "temperature": (
            temperature in (None, 0) or LEAST_TEMPERATURE <= temperature < math.inf,
            f"0 (always the likeliest token) or a finite number of at least {LEAST_TEMPERATURE}",
            "0.8",
        ),
        "top_k": (arguments.top_k is None or arguments.top_k >= 0, "at least 0", "50"),
        "top_p": (
            arguments.top_p is None or 0 < arguments.top_p <= 1,
            "above 0 and at most 1",
            "0.9",
        ),
        "repetition_penalty": (
            arguments.repetition_penalty is None or 0 < arguments.repetition_penalty < math.inf,
            "a finite number above 0",
            "1.1",
        ),
    }
    problems = [
        f"{name} = {getattr(arguments, name)}: must be {rule}. Fix: for example {example}."
        for name, (holds, rule, example) in rules.items()
        if not holds
    ]
    if problems:
        raise ValueError("\n".join(problems))


def generate(arguments: Arguments, layout: Layout) -> None:
    """Open the model, continue all prompts and print them; every process of the layout calls it.

    Raises:
        ValueError: nothing that can be opened, or prompts that the model cannot continue.
    """
    model = open_model(
        arguments.load,
        layout,
        step=arguments.ckpt_step,
        precision=arguments.dtype,
        attention_backend=arguments.attention_backend,
        ids_from=arguments.tokenizer_ids_from,
        prepend_bos=arguments.prepend_bos,
    )
    for line in model.notes:
        note(line)
    if model.tokenizer is None:
        note(f"{model.source} has no tokenizer: the prompts and what follows are ids")
    prompts = _all_prompts(arguments, layout)
    continuations = [
        Continuation(number, ids, _tokens_to_add(arguments.max_new_tokens, ids, prompt, model))
        for number, prompt in enumerate(prompts)
        for ids in [encode_prompt(prompt, model)]
    ]
    sampling = choose_sampling(arguments, model.generation)
    note(f"tokens: {sampling.describe()}")
    size = min(arguments.batch_size, len(continuations))
    needed = check_memory(model, continuations, size)
    note(f"keys and values of {count_of(size, 'prompt')} at once: {show_bytes(needed)} per process")
    stop_ids = () if arguments.ignore_eos else model.stop_ids
    if len(continuations) == 1 and not arguments.json:
        _stream(model, continuations[0], sampling, stop_ids)
        return
    for batch in batches(continuations, size):
        continue_batch(model, batch, sampling, stop_ids=stop_ids)
        for each in batch:
            print(json.dumps(_record(model, each), ensure_ascii=False), flush=True)


def note(text: str) -> None:
    """Print a note on standard error."""
    print(f"note: {text}", file=sys.stderr)


def choose_sampling(arguments: Arguments, source: GenerationSettings) -> Sampling:
    """Combine what the user asks for with what the model's source says; notes say what is not used.

    A source that says `do_sample: false` means the likeliest tokens.
    """
    if source.unfollowed:
        note(f"generation_config.json: not followed: {', '.join(source.unfollowed)}")
    temperature = arguments.temperature
    if temperature is None:
        of_source = 0.0 if source.do_sample is False else source.temperature
        temperature = USUAL_TEMPERATURE if of_source is None else of_source
    # A smaller one would overflow.
    if 0 < temperature < LEAST_TEMPERATURE:
        temperature = 0.0

    def first_given(*values, default):
        return next((value for value in values if value is not None), default)

    return Sampling(
        temperature=float(temperature),
        top_k=first_given(arguments.top_k, source.top_k, default=0),
        top_p=first_given(arguments.top_p, source.top_p, default=1.0),
        repetition_penalty=first_given(
            arguments.repetition_penalty, source.repetition_penalty, default=1.0
        ),
        seed=arguments.seed,
    )


def _all_prompts(arguments: Arguments, layout: Layout) -> list[Prompt]:
    """Collect the prompts; standard input is read by one process, which tells the others."""
    if arguments.prompts is None:
        return prompts_of_arguments(arguments.prompt or [""])
    if arguments.prompts != STDIN:
        return read_prompts(arguments.prompts)
    return tell_all(lambda: read_prompts(STDIN), layout)


def _tokens_to_add(asked: int, ids: list[int], prompt: Prompt, model: OpenModel) -> int:
    """Return how many tokens fit after a prompt; say so where they are fewer than asked.

    Raises:
        ValueError: the prompt alone fills the model's context.
    """
    context = model.context_length
    if asked and len(ids) >= context:
        raise ValueError(
            f"{prompt.name}: {len(ids):,} tokens, and the model's context is {context:,}. "
            "Fix: a shorter prompt."
        )
    room = min(asked, max(0, context - len(ids)))
    if room < asked:
        note(
            f"max_new_tokens = {asked}: {room} fit into the model's context of {context:,} "
            f"after {prompt.name}"
        )
    return room


# ---------------------------------------------------------------- what is printed


def _stream(
    model: OpenModel, continuation: Continuation, sampling: Sampling, stop_ids: tuple[int, ...]
) -> None:
    """Print the prompt and what follows it, token by token."""
    text = TextStream(tokenizer_of(model))

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    def on_token(each: Continuation) -> None:
        # A stop id says that the text ends, and is none of it.
        new = [] if each.is_stopped else each.added[-1:]
        write(text.add(new, is_last=each.is_finished))

    write(text.add(_words_of(model, continuation.prompt), is_last=continuation.is_finished))
    continue_batch(model, [continuation], sampling, stop_ids=stop_ids, on_token=on_token)
    write("\n")


def _words_of(model: OpenModel, prompt: list[int]) -> list[int]:
    """Return a prompt's ids without those that every text begins with."""
    begin = len(model.first_ids)
    return prompt[begin:] if tuple(prompt[:begin]) == model.first_ids else prompt


def _record(model: OpenModel, each: Continuation) -> dict:
    """Describe a finished prompt, for a JSON line."""
    tokenizer = tokenizer_of(model)
    words = _words_of(model, each.prompt)
    whole = tokenizer.decode(words + each.text_ids)
    prompt = tokenizer.decode(words)
    # Ids may end within a character, which the next one completes.
    begin = len(os.path.commonprefix([prompt, whole]))
    return {
        "prompt": prompt,
        "continuation": whole[begin:],
        "ids": each.added,
        "ended": "stop id" if each.is_stopped else "length",
    }


def main(argv: list[str] | None = None) -> int:
    return run_door_on_processes(
        Arguments,
        generate,
        check=check_arguments,
        name="tools.generate",
        description=__doc__,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
