"""What is refused before or after the model is opened, as `name = value: rule. Fix: ...`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pretrain.evaluation.passkey_texts import check_passkey_lengths
from tools.evaluation.harness import HarnessModelName
from tools.evaluation.task_names import TaskNames
from tools.inference.open_model import OpenModel


class Asked(Protocol):
    """The arguments that are looked at here."""

    load: str
    tasks: list[str]
    lengths: list[int]
    beyond_context: bool
    data_path: list[str]
    text_file: list[str]
    loss_tokens: int | None
    context_gain_cut: int
    context_gain_documents: int
    eval_passkey_depths: list[float]
    eval_passkey_trials: int
    samples: int
    batch_tokens: int
    seed: int
    lm_eval_tasks: list[str]
    lm_eval_model: HarnessModelName
    lm_eval_limit: int | None
    lm_eval_num_fewshot: int | None
    lm_eval_include_path: str | None
    tensor_model_parallel_size: int
    context_parallel_size: int


# ---------------------------------------------------------------- before the model is read


def check_numbers(asked: Asked) -> list[str]:
    """Name the numbers that mean nothing."""
    counts = {
        "loss_tokens": asked.loss_tokens,
        "context_gain_cut": asked.context_gain_cut,
        "context_gain_documents": asked.context_gain_documents,
        "eval_passkey_trials": asked.eval_passkey_trials,
        "samples": asked.samples,
        "batch_tokens": asked.batch_tokens,
        "lm_eval_limit": asked.lm_eval_limit,
    }
    problems = [
        f"{name} = {value}: must be at least 1. Fix: give a positive number."
        for name, value in counts.items()
        if value is not None and value < 1
    ]
    problems += [
        f"lengths = {length}: must be at least 1. Fix: for example 4096."
        for length in asked.lengths
        if length < 1
    ]
    shots = asked.lm_eval_num_fewshot
    if shots is not None and shots < 0:
        problems.append(f"lm_eval_num_fewshot = {shots}: must be at least 0. Fix: for example 5.")
    depths = asked.eval_passkey_depths
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        problems.append(
            f"eval_passkey_depths = {' '.join(map(str, depths))}: must be numbers from 0 to 1. "
            "Fix: for example 0.1 0.5 0.9."
        )
    if not 0 <= asked.seed < 2**32:
        problems.append(f"seed = {asked.seed}: must be in [0, 2**32). Fix: for example 1234.")
    return problems


def check_sources(asked: Asked, names: TaskNames) -> list[str]:
    """Name what the tasks need and was not given, and files that are not there."""
    problems = []
    if names.probes and not asked.data_path and not asked.text_file:
        problems.append(
            f"tasks = {' '.join(names.probes)}: need documents. Fix: give --data-path or "
            "--text-file."
        )
    if asked.data_path and asked.text_file:
        problems.append(
            f"text_file = {' '.join(asked.text_file)}: cannot be combined with data_path. "
            "Fix: one of them."
        )
    problems += [
        f"text_file = {path}: no such file. Fix: give a text file."
        for path in asked.text_file
        if not Path(path).is_file()
    ]
    folder = asked.lm_eval_include_path
    if folder is not None and not Path(folder).is_dir():
        problems.append(
            f"lm_eval_include_path = {folder}: no such folder. Fix: give one with task files."
        )
    return problems + _harness_problems(asked, names)


def _harness_problems(asked: Asked, names: TaskNames) -> list[str]:
    """Name what the harness's own model cannot do, and settings of tasks that are not run."""
    if not asked.lm_eval_tasks:
        given = {
            "lm_eval_include_path": asked.lm_eval_include_path,
            "lm_eval_limit": asked.lm_eval_limit,
            "lm_eval_num_fewshot": asked.lm_eval_num_fewshot,
            "lm_eval_model": "hf" if asked.lm_eval_model == "hf" else None,
        }
        return [
            f"{name} = {value}: is for --lm-eval-tasks. Fix: give these, or leave it out."
            for name, value in given.items()
            if value is not None
        ]
    if asked.lm_eval_model != "hf":
        return []
    problems = []
    if names.probes or names.ruler:
        problems.append(
            f"tasks = {' '.join(asked.tasks)}: lm_eval_model = hf answers --lm-eval-tasks alone. "
            "Fix: leave --tasks out."
        )
    if asked.tensor_model_parallel_size * asked.context_parallel_size > 1:
        problems.append(
            "lm_eval_model = hf: runs in one process. Fix: leave the parallel sizes out, or "
            "--lm-eval-model ithaca."
        )
    if not (Path(asked.load) / "config.json").is_file():
        problems.append(
            f"load = {asked.load}: lm_eval_model = hf reads a Hugging Face folder. Fix: export "
            "the checkpoint (bash launch/ithaca.sh export)."
        )
    return problems


# ---------------------------------------------------------------- with the model


def check_model(
    asked: Asked, names: TaskNames, model: OpenModel, lengths: Sequence[int]
) -> list[str]:
    """Name the tasks and lengths that this model cannot have."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        # The loss and the context gain of token files need none.
        needing = [*(name for name in names.probes if name == "passkey"), *names.ruler]
        values = {
            "tasks": needing,
            "text_file": asked.text_file,
            "lm_eval_tasks": asked.lm_eval_tasks,
        }
        return [
            f"{name} = {' '.join(value)}: needs a tokenizer, and {asked.load} has none. "
            "Fix: put its files there, or leave this out."
            for name, value in values.items()
            if value
        ]
    problems = []
    if asked.lm_eval_tasks and tokenizer.eod is None and tokenizer.bos is None:
        problems.append(
            f"lm_eval_tasks = {' '.join(asked.lm_eval_tasks)}: need an id that begins a text, and "
            "the tokenizer has neither eos nor bos. Fix: name one in tokenizer_config.json."
        )
    if names.probes or names.ruler:
        problems += _length_problems(asked, names, model, lengths)
    return problems


def _length_problems(
    asked: Asked, names: TaskNames, model: OpenModel, lengths: Sequence[int]
) -> list[str]:
    """Name the lengths that the model, its layout or a probe cannot have."""
    problems = []
    context = model.context_length
    multiple = model.layout.token_multiple
    for length in lengths:
        if length > context and not asked.beyond_context:
            problems.append(
                f"lengths = {length}: the model's context is {context:,} tokens. Fix: at most "
                "that, or --beyond-context."
            )
        if "loss" in names.probes and length % multiple:
            problems.append(
                f"lengths = {length}: must be a multiple of {multiple}, so that every process gets "
                f"as many tokens. Fix: for example {-(-length // multiple) * multiple}."
            )
    if "passkey" in names.probes:
        assert model.tokenizer is not None
        found = check_passkey_lengths(model.tokenizer, list(lengths))
        problems += [problem.replace("eval_passkey_lengths", "lengths", 1) for problem in found]
    return problems
