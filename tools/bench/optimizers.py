"""Compare Muon with AdamW: the time of a step, and the tokens to the same loss.

The step is our trainer's, in one process, on one document; the two run in turns. With
`--quickstart` both train the quick start's model on its corpus, from the same weights on the same
tokens, and the question is after how many tokens Muon's loss is where AdamW's ends.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.stream import usable_cores
from data.units import parse_tokens
from pretrain.config.config import OptimizerConfig
from pretrain.optimizer import build_optimizer
from tools.bench.contenders import (
    VOCABULARY,
    Dtype,
    Ours,
    default_dtype,
    make_sample,
    one_process,
    preset,
)
from tools.bench.fresh import KEEP_MEMORY, ROOT, run_fresh
from tools.bench.option_checks import find_too_small
from tools.bench.report import bar, describe_machine, markdown_table, publish
from tools.bench.step_work import CPU, in_turns, seconds_of

OPTIMIZERS: tuple[Literal["adam", "muon"], ...] = ("adam", "muon")
TIME_LIMIT = 1.15
"""Bar: time of a step with Muon over that with AdamW."""
SMOOTHED_SHARE = 0.05
"""Share of a run's steps over which losses are averaged."""


@dataclass(kw_only=True)
class Arguments:
    """Hold the options of the command line."""

    tokens: int = 8192
    """Tokens of the step's document; 0 leaves the step out."""
    repeats: int = 5
    """Timed steps of each; the median counts."""
    dtype: Dtype | None = None
    """Precision; by default bfloat16 where the device multiplies it in hardware."""
    quickstart: str | None = None
    """Folder of a quick start, whose corpus and tokenizer are trained on; without it only the step
    is timed."""
    train_tokens: str = "320Ki"
    """Tokens of each run, as many as the quick start's."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of weights and order of documents, a pair of runs each."""
    output: str | None = None
    """File to append the result to, as Markdown."""


def run(arguments: Arguments) -> int:
    """Measure and publish.

    Returns:
        the exit code: 0, 2 where it cannot run.
    """
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    dtype = arguments.dtype or default_dtype(CPU)
    lines = ["## Muon beside AdamW", describe_machine([])]
    if arguments.tokens:
        seconds = run_fresh(
            time_optimizers,
            usable_cores(),
            environment=KEEP_MEMORY,
            tokens=arguments.tokens,
            dtype=dtype,
            repeats=arguments.repeats,
        )
        lines += describe_steps(seconds, arguments.tokens, dtype)
    if arguments.quickstart:
        pairs = {
            seed: [train_once(arguments, optimizer, seed, dtype) for optimizer in OPTIMIZERS]
            for seed in arguments.seeds
        }
        lines += describe_losses(pairs)
    publish("\n\n".join(lines), arguments.output)
    return 0


def find_problem(arguments: Arguments) -> str | None:
    """Say why the benchmark cannot run, with a fix; None = it can."""
    too_small = find_too_small(arguments, repeats=1)
    if too_small:
        return too_small
    if arguments.tokens == 1 or arguments.tokens < 0:
        return f"--tokens {arguments.tokens}: a document needs 2 tokens. Fix: 2 or more, or 0."
    if not arguments.tokens and not arguments.quickstart:
        return "--tokens 0: nothing is measured without --quickstart. Fix: give one of them."
    if arguments.quickstart:
        if not arguments.seeds:
            return "--seeds: has no value, and each is a pair of runs. Fix: give at least one."
        try:
            if parse_tokens(arguments.train_tokens) < 1:
                return (
                    f"--train-tokens {arguments.train_tokens}: a run trains on at least one token. "
                    "Fix: for example 320Ki."
                )
        except ValueError as error:
            return f"--train-tokens: {error}. Fix: for example 320Ki."
        folder = Path(arguments.quickstart)
        for part in ("data/corpus.idx", "tokenizer/spm.model"):
            if not (folder / part).is_file():
                return (
                    f"--quickstart {folder}: has no {part}. Fix: the folder of a finished "
                    "`bash launch/quickstart.sh` (runs/quickstart, or QUICKSTART_DIR)."
                )
    return None


# ---------------------------------------------------------------- the step


def time_optimizers(tokens: int, dtype: Dtype, repeats: int) -> dict:
    """Time a step with each optimizer in turns; the first round warms up."""
    with one_process() as layout:
        config = preset("tiny")
        sample = make_sample([tokens], VOCABULARY, 1)
        trainers: dict[str, Ours] = {}
        for name in OPTIMIZERS:
            ours = Ours(config, VOCABULARY, dtype, layout, seed=1, optimizer=False)
            ours.optimizer = build_optimizer(ours.stages, config, OptimizerConfig(optimizer=name))
            trainers[name] = ours
        seconds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}

        def time_one(name: str) -> None:
            seconds[name].append(seconds_of(lambda: trainers[name].step(sample)))

        in_turns([lambda name=name: time_one(name) for name in OPTIMIZERS], repeats + 1)
    return {name: times[1:] for name, times in seconds.items()}


def describe_steps(seconds: dict[str, list[float]], tokens: int, dtype: Dtype) -> list[str]:
    """Write the medians, and the ratio beside its bar."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        [name, f"{medians[name]:.3f}", f"{min(times):.3f}", f"{max(times):.3f}"]
        for name, times in seconds.items()
    ]
    ratio = medians["muon"] / medians["adam"]
    return [
        f"Seconds of a step of {tokens:,} tokens, 10M model, one process, {dtype}.",
        markdown_table(["optimizer", "median", "least", "most"], rows),
        bar("a step with Muon over one with AdamW", ratio, TIME_LIMIT),
    ]


# ---------------------------------------------------------------- the loss


@dataclass(frozen=True)
class Curve:
    """Holds a run's losses, step by step."""

    tokens: list[int]
    """Consumed after each step."""
    losses: list[float]

    def smoothed(self) -> list[float]:
        """Average the losses over the last steps, at each step from the first full window on."""
        size = max(1, round(SMOOTHED_SHARE * len(self.losses)))
        windows = range(size, len(self.losses) + 1)
        return [statistics.fmean(self.losses[end - size : end]) for end in windows]

    def tokens_to(self, loss: float) -> int | None:
        """Count the tokens after which the averaged loss is that low; None = it never is."""
        smoothed = self.smoothed()
        for tokens, value in zip(self.tokens[-len(smoothed) :], smoothed, strict=True):
            if value <= loss:
                return tokens
        return None


def train_once(
    arguments: Arguments, optimizer: Literal["adam", "muon"], seed: int, dtype: Dtype
) -> Curve:
    """Train in a process of its own, with the quick start's rates and batch."""
    assert arguments.quickstart is not None
    folder = Path(arguments.quickstart).resolve()
    with tempfile.TemporaryDirectory(prefix="ithaca-bench-") as save:
        flags = {
            "model": "tiny",
            "data-path": folder / "data" / "corpus",
            "tokenizer-type": "SentencePieceTokenizer",
            "tokenizer-model": folder / "tokenizer" / "spm.model",
            "seq-length": 1024,
            "global-batch-size": 4,
            "train-tokens": arguments.train_tokens,
            "lr": 1e-3,
            "min-lr": 1e-4,
            "lr-decay-style": "WSD",
            "lr-wsd-decay-style": "linear",
            "lr-warmup-tokens": "16Ki",
            "lr-wsd-decay-tokens": "96Ki",
            "optimizer": optimizer,
            "seed": seed,
            "eval-iters": 0,
            "save": save,
        }
        command = [sys.executable, "-m", "pretrain.train"]
        command += [f"--{name}={value}" for name, value in flags.items()]
        if dtype == "bfloat16":
            command.append("--bf16")
        print(f"{optimizer}, seed {seed} ...", file=sys.stderr, flush=True)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        text = (Path(save) / "metrics.jsonl").read_text()
    steps = [json.loads(line) for line in text.splitlines()]
    return Curve([step["tokens"] for step in steps], [step["loss"] for step in steps])


def describe_losses(pairs: Mapping[int, Sequence[Curve]]) -> list[str]:
    """Write of each seed where the losses end, and when Muon's is where AdamW's ends."""
    rows = []
    shares = []
    for seed, (adam, muon) in pairs.items():
        target = adam.smoothed()[-1]
        tokens = muon.tokens_to(target)
        share = tokens / adam.tokens[-1] if tokens else None
        if share is not None:
            shares.append(share)
        rows.append(
            [
                str(seed),
                f"{target:.4f}",
                f"{muon.smoothed()[-1]:.4f}",
                f"{tokens:,}" if tokens else "never",
                f"{share:.2f}" if share else "",
            ]
        )
    header = ["seed", "AdamW's last loss", "Muon's last loss", "Muon's tokens to AdamW's", "share"]
    summary = "Muon reached AdamW's last loss in no run."
    if shares:
        summary = (
            f"Muon reached AdamW's last loss in {len(shares)} of {len(rows)} runs, after "
            f"{statistics.fmean(shares):.2f} of its tokens on average."
        )
    some = next(iter(pairs.values()))[0]
    return [
        f"Training losses, averaged over {SMOOTHED_SHARE:.0%} of a run of {some.tokens[-1]:,} "
        "tokens of the quick start's corpus.",
        markdown_table(header, rows),
        summary,
    ]
