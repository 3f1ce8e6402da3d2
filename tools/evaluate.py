"""Measure a model at long contexts: `bash launch/ithaca.sh evaluate --load DIR --lengths 4Ki 16Ki`.

DIR is the --save folder of a run or a Hugging Face folder. Tasks are the trainer's probes on
documents (loss, context_gain, passkey) and RULER's needle and variable-tracking tasks, which are
made from a seed. --lm-eval-tasks runs task files of lm-evaluation-harness. Results are a table, and
with --output a JSON file; tools/EVALUATING.md says how to read them.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.files import write_atomically
from parallel.layout import Layout, choose_device
from pretrain.config.token_count import Tokens
from tools.evaluation.check_arguments import check_model, check_numbers, check_sources
from tools.evaluation.harness import (
    HarnessModelName,
    check_installed,
    open_tasks,
    run_tasks,
    transformers_model,
)
from tools.evaluation.harness_model import make_harness_model
from tools.evaluation.opened import OpenedModel
from tools.evaluation.probe_data import encode_blend, open_blend, read_text
from tools.evaluation.probes import Probes, ProbeSettings
from tools.evaluation.ruler_run import RulerRun
from tools.evaluation.tables import describe_record, harness_table, results_table
from tools.evaluation.task_names import TaskNames, choose_tasks
from tools.inference.open_model import DTYPES, ModelArguments, OpenModel, open_model
from tools.inference.processes import run_door_on_processes
from tools.outputs.files import Input, check_file
from tools.shared.door import warn

MAKER = "tools.evaluate"
"""Written into the JSON file: only such a file is written over."""
Record = dict[str, Any]


@dataclass(kw_only=True)
class Arguments(ModelArguments):
    load: str
    """The --save folder of a run, or a Hugging Face folder."""
    ckpt_step: int | None = None
    """Step of the checkpoint; the latest by default."""
    tasks: list[str] = field(default_factory=list)
    """loss, context_gain, passkey, names of RULER's tasks (niah_single_1, ..., vt), or probes and
    ruler for all of these. By default ruler, with documents also probes; none with
    --lm-eval-tasks."""
    lengths: list[Tokens] = field(default_factory=list)
    """Lengths in tokens, as 4096 or 64Ki; by default the model's context."""
    beyond_context: bool = False
    """Allow lengths beyond the model's context."""
    data_path: list[str] = field(default_factory=list)
    """Documents for the probes: token files of `preprocess`, `[weight] PREFIX ...`."""
    text_file: list[str] = field(default_factory=list)
    """Texts in place of --data-path, a document each; the first is also the haystack of RULER's
    tasks that have one of text, which are made with repeated sentences otherwise."""
    loss_tokens: Tokens | None = None
    """Tokens whose loss is measured, the same ones at each length; by default 8 samples of the
    longest."""
    context_gain_cut: Tokens = 1024
    """Context of the cut pass of the context gain; documents must have twice as many tokens."""
    context_gain_documents: int = 16
    """Documents of the context gain at each length, those that fill most of it."""
    eval_passkey_depths: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    """Where the passkey is hidden: 0 = at the beginning, 1 = at the end."""
    eval_passkey_trials: int = 2
    """Passkeys hidden at each depth of each length."""
    samples: int = 20
    """Samples of each of RULER's tasks at each length."""
    seed: int = 1234
    """Seed of all that is drawn."""
    lm_eval_tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness: local_addition, local_text, local_repeat (from this
    repository), or others whose data lies on this machine."""
    lm_eval_include_path: str | None = None
    """Folder with task files of your own for the harness."""
    lm_eval_model: HarnessModelName = "ithaca"
    """hf = the harness's own model of transformers, in one process, to compare with."""
    lm_eval_limit: int | None = None
    """Questions of each of the harness's tasks; all by default."""
    lm_eval_num_fewshot: int | None = None
    """Solved questions before each one; by default as the task says."""
    output: str | None = None
    """JSON file for all results, with every answer."""
    batch_tokens: Tokens = 32768
    """Tokens of prompts and texts that are read together, but for a single longer one."""


def _names(arguments: Arguments) -> TaskNames:
    """Choose the tasks; ValueError for one that does not exist."""
    return choose_tasks(
        arguments.tasks,
        has_documents=bool(arguments.data_path or arguments.text_file),
        has_others=bool(arguments.lm_eval_tasks),
    )


# ---------------------------------------------------------------- before the model is read


def check_arguments(arguments: Arguments) -> None:
    """Raise ValueError for what is wrong whatever the model is, a line each."""
    names = _names(arguments)
    problems = check_numbers(arguments) + check_sources(arguments, names)
    if problems:
        raise ValueError("\n".join(problems))
    if arguments.lm_eval_tasks:
        check_installed(arguments.lm_eval_tasks, arguments.lm_eval_model)
        open_tasks(arguments.lm_eval_tasks, arguments.lm_eval_include_path)
    if arguments.output is not None:
        check_file("output", Path(arguments.output), MAKER, is_own_result, _inputs(arguments))


def _inputs(arguments: Arguments) -> list[Input]:
    """List what is read, which no result may be written over."""
    texts = [Input("--text-file", Path(path)) for path in arguments.text_file]
    return [Input("--load", Path(arguments.load)), *texts]


def is_own_result(path: Path) -> bool:
    """Tell whether a file holds results of this command."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("made_by") == MAKER


def without_effect(arguments: Arguments, names: TaskNames) -> list[str]:
    """Name the settings that were given and that nothing of what is run reads."""
    has_lengths = ("a task of --tasks", bool(names.probes or names.ruler))
    ruler = ("a task of RULER", bool(names.ruler))
    loss = ("loss", "loss" in names.probes)
    gain = ("context_gain", "context_gain" in names.probes)
    passkey = ("passkey", "passkey" in names.probes)
    ours = ("lm_eval_model = ithaca", arguments.lm_eval_model == "ithaca")
    has_prompts = bool(names.ruler) or (bool(arguments.lm_eval_tasks) and ours[1])
    prompts = ("a task of RULER or of --lm-eval-model ithaca", has_prompts)
    text = ("a probe or a task with a text", bool(names.probes or names.with_text))
    # Setting -> what reads it, and whether that is run.
    readers = {
        "lengths": has_lengths,
        "beyond_context": has_lengths,
        "data_path": ("a probe", bool(names.probes)),
        "text_file": text,
        "loss_tokens": loss,
        "context_gain_cut": gain,
        "context_gain_documents": gain,
        "eval_passkey_depths": passkey,
        "eval_passkey_trials": passkey,
        "samples": ruler,
        "ckpt_step": ours,
        "attention_backend": ours,
        "tokenizer_ids_from": ours,
        "prepend_bos": ours,
        "batch_tokens": prompts,
    }
    usual = Arguments(load=arguments.load)
    lines = []
    for name, (reader, is_run) in readers.items():
        value = getattr(arguments, name)
        if not is_run and value != getattr(usual, name):
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{name} = {shown}: is without effect: it needs {reader}")
    return lines


# ---------------------------------------------------------------- with the model


def evaluate(arguments: Arguments, layout: Layout) -> None:
    """Open the model, measure, print the results and write them; every process does the same.

    Raises:
        ValueError: tasks or lengths that do not fit the model or the documents.
    """
    began = time.monotonic()
    names = _names(arguments)
    for line in without_effect(arguments, names):
        warn(line)
    lengths: list[int] = []
    facts: Record = {}
    if arguments.lm_eval_model == "hf":
        records = _run_harness(arguments, None)
    else:
        model = open_model(
            arguments.load,
            layout,
            step=arguments.ckpt_step,
            precision=arguments.dtype,
            attention_backend=arguments.attention_backend,
            ids_from=arguments.tokenizer_ids_from,
            prepend_bos=arguments.prepend_bos,
        )
        for note in model.notes:
            print(note, flush=True)
        lengths = sorted({*arguments.lengths} or {model.context_length})
        facts = _facts(model, layout)
        records = _measure(arguments, names, model, lengths)
    for line in _tables(records, lengths):
        print(line)
    if arguments.output is not None and layout.world.is_first:
        content = {
            "made_by": MAKER,
            "settings": asdict(arguments),
            **facts,
            "seconds": time.monotonic() - began,
            "results": records,
        }
        write_atomically(Path(arguments.output), json.dumps(content, indent=1) + "\n")
        print(f"wrote {arguments.output}")


def _facts(model: OpenModel, layout: Layout) -> Record:
    """Say what was measured, for the JSON file."""
    return {
        "source": str(model.source),
        "layout": layout.describe(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "context_length": model.context_length,
    }


def _measure(
    arguments: Arguments, names: TaskNames, model: OpenModel, lengths: list[int]
) -> list[Record]:
    """Run everything that is asked for -> its records."""
    problems = check_model(arguments, names, model, lengths)
    if problems:
        raise ValueError("\n".join(problems))
    records = []
    opened = OpenedModel(model, arguments.batch_tokens)
    ruler = _ruler_run(arguments, names, opened, lengths)
    if names.probes:
        records += _run_probes(arguments, names, model, lengths)
    if ruler is not None:
        for length in lengths:
            for name in names.ruler:
                record = ruler.run(name, length)
                records.append(record)
                print(describe_record(record), flush=True)
    if arguments.lm_eval_tasks:
        records += _run_harness(arguments, opened)
    return records


def _ruler_run(
    arguments: Arguments, names: TaskNames, opened: OpenedModel, lengths: list[int]
) -> RulerRun | None:
    """Prepare RULER's tasks; None where none is asked for."""
    if not names.ruler:
        return None
    text = read_text(Path(arguments.text_file[0])) if arguments.text_file else None
    run = RulerRun(opened, arguments.seed, arguments.samples, text)
    problems = run.check(names.ruler, lengths)
    if problems:
        raise ValueError("\n".join(problems))
    if text is None and names.with_text:
        print(f"note: no --text-file: repeated sentences in {', '.join(names.with_text)}")
    return run


def _run_probes(
    arguments: Arguments, names: TaskNames, model: OpenModel, lengths: list[int]
) -> list[Record]:
    """Run the trainer's probes, and print each result as it comes."""
    tokenizer = model.tokenizer
    if arguments.text_file:
        assert tokenizer is not None, "texts are refused without a tokenizer"
        paths = [Path(path) for path in arguments.text_file]
        blend = encode_blend(paths, arguments.seed, tokenizer)
    else:
        blend = open_blend(arguments.data_path, arguments.seed, model.vocab_size, tokenizer)
    settings = ProbeSettings(
        loss_tokens=arguments.loss_tokens or 8 * max(lengths),
        context_gain_cut=arguments.context_gain_cut,
        context_gain_documents=arguments.context_gain_documents,
        eval_passkey_depths=arguments.eval_passkey_depths,
        eval_passkey_trials=arguments.eval_passkey_trials,
        seed=arguments.seed,
    )
    records = []
    for record in Probes(model, blend, settings).run(names.probes, lengths, warn):
        records.append(record)
        print(describe_record(record), flush=True)
    return records


def _run_harness(arguments: Arguments, opened: OpenedModel | None) -> list[Record]:
    """Run the harness's tasks on our model, or on its own of the folder."""
    manager = open_tasks(arguments.lm_eval_tasks, arguments.lm_eval_include_path)
    model: Any
    if opened is None:
        dtype = "auto" if arguments.dtype == "auto" else DTYPES[arguments.dtype]
        model = transformers_model(arguments.load, dtype, str(choose_device()))
    else:
        model = make_harness_model(opened)
    records = run_tasks(
        model,
        arguments.lm_eval_tasks,
        manager,
        arguments.seed,
        arguments.lm_eval_limit,
        arguments.lm_eval_num_fewshot,
    )
    if opened is not None:
        model.warn_of_truncation()
    return records


def _tables(records: list[Record], lengths: list[int]) -> list[str]:
    """Write the results as tables, an empty line before each."""
    by_length = [record for record in records if "length" in record]
    others = [record for record in records if "length" not in record]
    lines = []
    if by_length:
        lines += ["", *results_table(by_length, lengths)]
    if others:
        lines += ["", *harness_table(others)]
    return lines


def main(argv: list[str] | None = None) -> int:
    return run_door_on_processes(
        Arguments,
        evaluate,
        check=check_arguments,
        name="tools.evaluate",
        description=__doc__,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
