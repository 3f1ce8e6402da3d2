"""The commands of the pages: found in their code blocks, split, and made ready to run in small."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
BATCH = 16384
"""Tokens of a step: a short sample for each rank of 1,024."""
STEPS = 2
"""Steps of a phase."""
NOT_RUN = {
    "bash tests/run.sh": "the tests themselves",
    "source launch/setup.sh": "installs packages",
    "python -m pip": "installs packages",
    "bash tools/bench/lease.sh": "needs a GPU",
    "'$PYTHON' -m pip": "installs packages",
    "bash launch/ithaca.sh train-tokenizer": "run by test_readme.py, on text for so many ids",
    "bash launch/ithaca.sh preprocess --input '$name": "run by test_readme.py, in its loop",
    "bash launch/ithaca.sh train --config longer.yaml --save out/longest": "needs a run file with "
    "the imported model's tokenizer; launch/extend.sh trains one",
    "bash launch/ithaca.sh bench": "takes minutes; each has a test of its own in small",
    "bash launch/ithaca.sh evaluate": "its lengths are those of a trained model; "
    "tests/dist/test_evaluate.py runs it in small",
    "bash launch/quickstart.sh": "takes minutes; its commands are those of the README in order",
}
"""Start of a command that a page names and no test of pages runs -> why."""


@dataclass(frozen=True)
class PageCommand:
    """One command of a page."""

    page: str
    variables: tuple[tuple[str, str], ...]
    """The environment that is written before it."""
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    @property
    def name(self) -> str:
        """What the front door is asked for; slurm.sh trains, too; empty for any other program."""
        if self.words[0] == "sbatch":
            return "train"
        return self.words[2] if self.words[1:2] == ("launch/ithaca.sh",) else ""

    @property
    def arguments(self) -> list[str]:
        """What stands behind the command's name."""
        if self.words[0] == "sbatch":
            return list(self.words[self.words.index("launch/slurm.sh") + 1 :])
        return list(self.words[3:])

    @property
    def world_size(self) -> int:
        """Processes that it starts on all nodes."""
        given = dict(self.variables)
        if self.words[0] == "sbatch":
            return 8 * int(self.words[self.words.index("--nodes") + 1])
        return int(given.get("NNODES", "1")) * int(given.get("NPROC_PER_NODE", "8"))


def blocks(page: str, language: str) -> list[str]:
    """List the code blocks of a page in one language."""
    found = FENCED.findall((ROOT / page).read_text(encoding="utf-8"))
    return [text for name, text in found if name == language]


def commands_of(page: str) -> list[PageCommand]:
    """List the commands of a page in order."""
    lines = [
        line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()
    ]
    return [command for line in lines for command in _commands_in(page, line)]


def _commands_in(page: str, line: str) -> list[PageCommand]:
    """List the commands of one line, without what only repeats or joins them."""
    found = []
    words = shlex.split(line, comments=True)
    if not words or words[0] in ("for", "done"):
        return []
    # `a && b` are two commands.
    parts = " ".join("\0" if word == "&&" else shlex.quote(word) for word in words).split("\0")
    for part in parts:
        words = shlex.split(part)
        variables = []
        while words and ASSIGNMENT.fullmatch(words[0]):
            name, _, value = words.pop(0).partition("=")
            variables.append((name, value))
        found.append(PageCommand(page, tuple(variables), tuple(words)))
    return found


def reason_not_to_run(command: PageCommand) -> str | None:
    """Return why no test of pages runs a command; None where one must."""
    return next((why for start, why in NOT_RUN.items() if command.text.startswith(start)), None)


def shorten(run_file: str, *, one_process: bool) -> str:
    """Return a run file with a tiny model and little to train, on its layouts or on one process."""
    run = yaml.safe_load(run_file)
    run |= {"model": "tiny", "save_interval": 2, "lr_wsd_decay_tokens": 1024, "eval_iters": 1}
    for place, phase in enumerate(run["phases"]):
        phase |= {"seq_length": 32 << place, "global_batch_tokens": BATCH}
        phase["train_tokens"] = STEPS * BATCH
        if one_process:
            for axis in ("tensor_model", "pipeline_model", "context"):
                phase.pop(f"{axis}_parallel_size", None)
        # The lengths of the shortened documents.
        phase["data_path"] = _short_sources(phase.get("data_path", run["data_path"]))
    return yaml.safe_dump(run, sort_keys=False)


def _short_sources(sources: list) -> list:
    return [
        re.sub(r"\[.*\]", "", source) if isinstance(source, str) else source for source in sources
    ]
