"""Run the quick start's steps on one device, with a stop and a resume between.

That script makes its environment with pip and has no stop in its middle; here the tools run in this
Python.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from time import perf_counter

import yaml

from parallel.layout import has_bf16_units
from tools.bench.fresh import ROOT
from tools.bench.gpu.lines import Report
from tools.bench.gpu.parts import Card, Scale

CONFIG = ROOT / "launch" / "configs" / "quickstart-1gpu.yaml"
CORPUS_BYTES = 3_000_000
TOY_BYTES = 400_000
TOY_TOKENS = "16Ki"
"""Length of each phase at toy size."""
STOP_AFTER = {True: 5, False: 30}
"""Steps before the stop, at toy size or not."""


def quickstart(card: Card, scale: Scale, report: Report) -> None:
    """Report the seconds of each step up to the verified export, and the losses."""
    with tempfile.TemporaryDirectory(prefix="ithaca-lease-") as name:
        QuickStart(Path(name), card, scale, report).all_steps()


class QuickStart:
    """Run the quick start in a folder."""

    def __init__(self, folder: Path, card: Card, scale: Scale, report: Report):
        self.folder = folder
        self.card = card
        self.scale = scale
        self.report = report
        self.tokenizer = folder / "spm.model"
        self.save = folder / "checkpoints"

    def all_steps(self) -> None:
        """Run all steps one after another; one that fails raises."""
        corpus = self.folder / "corpus.jsonl"
        write_corpus(corpus, TOY_BYTES if self.scale.toy else CORPUS_BYTES)
        # A toy corpus has no 8K pieces.
        vocabulary = "2048" if self.scale.toy else "8192"
        self.step(
            "tokenizer",
            "tools.train_tokenizer",
            "--input",
            corpus,
            "--vocab-size",
            vocabulary,
            "--output-prefix",
            self.folder / "spm",
        )
        self.step(
            "tokens",
            "tools.preprocess_data",
            "--input",
            corpus,
            "--output-prefix",
            self.folder / "data",
            "--tokenizer-type",
            "SentencePieceTokenizer",
            "--tokenizer-model",
            self.tokenizer,
            "--append-eod",
            "--workers",
            "2",
        )
        self.train("training until the stop", "--exit-interval", str(STOP_AFTER[self.scale.toy]))
        # The stop, then the same command again.
        stopped_at = self.last_step()
        self.train("training after the resume")
        self.check_steps(stopped_at)
        self.step(
            "export --verify",
            "tools.export_hf",
            "--load",
            self.save,
            "--output",
            self.folder / "huggingface",
            "--verify",
        )
        self.report.add("export", "transformers' logits are ours")

    def train(self, name: str, *options: str) -> None:
        """Run the trainer to its end or its stop."""
        # As quickstart.sh chooses it.
        precision = "--bf16" if has_bf16_units(self.card.device) else "--no-bf16"
        self.step(
            name,
            "pretrain.train",
            "--config",
            self.config(),
            precision,
            "--data-path",
            self.folder / "data",
            "--tokenizer-model",
            self.tokenizer,
            "--save",
            self.save,
            *options,
        )

    def config(self) -> Path:
        """Return the quick start's own file; at toy size one with short phases."""
        if not self.scale.toy:
            return CONFIG
        settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        # Two phases: a change of the length, but not the whole ladder.
        settings["phases"] = [
            phase | {"train_tokens": TOY_TOKENS} for phase in settings["phases"][:2]
        ]
        settings["lr_wsd_decay_tokens"] = TOY_TOKENS
        path = self.folder / "toy.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    def step(self, name: str, module: str, *arguments: object) -> None:
        """Run a module of this repository and report its seconds.

        Raises:
            RuntimeError: it failed; its own message is in the log.
        """
        start = perf_counter()
        command = [sys.executable, "-m", module, *map(str, arguments)]
        # What it prints goes to the log.
        code = subprocess.run(command, cwd=ROOT, env=dict(os.environ), stdout=sys.stderr).returncode
        if code:
            raise RuntimeError(f"{name}: {module} ended with code {code}; log.txt says why")
        self.report.add("seconds", perf_counter() - start, "s", case=name)

    def metrics(self) -> list[dict]:
        """Read what the trainer wrote of each step."""
        text = (self.save / "metrics.jsonl").read_text(encoding="utf-8")
        return [line for line in map(json.loads, text.splitlines()) if "loss" in line]

    def last_step(self) -> int:
        """Return the number of the last step so far."""
        return self.metrics()[-1]["step"]

    def check_steps(self, stopped_at: int) -> None:
        """Report the losses at the stop and at the end.

        Raises:
            RuntimeError: a step is there twice, or not at all, or the run did not go on.
        """
        metrics = self.metrics()
        # Each step once, and some after the resume.
        steps = [line["step"] for line in metrics]
        if steps != list(range(1, len(steps) + 1)) or len(steps) <= stopped_at:
            raise RuntimeError(
                f"resume: steps {steps[:3]} ... {steps[-3:]} after a stop at step {stopped_at}"
            )
        for number in (1, stopped_at, steps[-1]):
            self.report.add("loss", metrics[number - 1]["loss"], "nats", case=f"step {number}")


def write_corpus(path: Path, size: int) -> None:
    """Write Python's own modules as JSON lines of text, about `size` bytes."""
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text = source.read_text(encoding="utf-8", errors="ignore")
            if text.strip() and written < size:
                written += file.write(json.dumps({"text": text}) + "\n")
