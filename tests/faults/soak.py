"""Kill small runs of every shape again and again: `bash tests/faults/soak.sh --kills 500`.

Three runs share the kills: one process, two processes over phases of several layouts, two nodes.
tools/bench/disturbed.py kills and compares each of them with the same run left alone.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.dist.training import base_arguments, write_corpus
from tools.bench import disturbed
from tools.faults.traces import KINDS, Kind

SAVE_INTERVAL = 2
STEPS_PER_KILL = 4
"""Steps that a run gets on with between two kills, at most: it must last for all of them."""
TOKENS_PER_STEP = 128
FEW_KILLS = 20
"""Fewer kills than these all go to the run that starts fastest."""
ON_ONE_LAYOUT: list[Kind] = [kind for kind in KINDS if kind != "crossing"]
LAYOUTS = (
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"context_parallel_size": 2},
    {"data_parallel_sharding_strategy": "optim_grads_params"},
)
"""The layouts of the phases of two processes, in turn."""
KILLS_PER_PHASE = 8


@dataclass(frozen=True)
class Course:
    """A run and its share of the kills."""

    name: str
    share: float
    processes: int
    nodes: int
    kinds: list[Kind]
    changes_layout: bool = False


COURSES = (
    Course("one process", 0.5, 1, 1, ON_ONE_LAYOUT),
    Course("two processes, several layouts", 0.35, 2, 1, list(KINDS), changes_layout=True),
    Course("two nodes", 0.15, 1, 2, ON_ONE_LAYOUT),
)


def phases_of(course: Course, kills: int) -> list[dict]:
    """Write the phases of a run that is long enough for its kills."""
    steps = STEPS_PER_KILL * kills + 8
    count = -(-kills // KILLS_PER_PHASE) + 1 if course.changes_layout else 1
    tokens = -(-steps // count) * TOKENS_PER_STEP
    return [
        {"name": f"p{number}", "train_tokens": tokens}
        | (LAYOUTS[number % len(LAYOUTS)] if course.changes_layout else {})
        for number in range(count)
    ]


def flags_of(corpus: str) -> list[str]:
    """Write the flags of a run that starts and trains as fast as one can."""
    argv = base_arguments(
        corpus,
        num_layers=2,
        seq_length=32,
        global_batch_size=4,
        eval_iters=0,
        save_interval=SAVE_INTERVAL,
        lr=3e-3,
        packing="best_fit",
    )
    at = argv.index("--train-iters")
    del argv[at : at + 2]
    return argv


def soak(folder: Path, kills: int, seed: int, courses: tuple[Course, ...]) -> bool:
    """Run the courses; True if each ended as if nothing had happened."""
    corpus = write_corpus(folder / "corpus", documents=2000)
    is_well = True
    for course in courses:
        share = max(1, round(kills * course.share / sum(each.share for each in courses)))
        name = course.name.replace(" ", "_").replace(",", "")
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump({"phases": phases_of(course, share)}))
        print(f"-- {course.name}: {share} kills", flush=True)
        code = disturbed.run(
            disturbed.Arguments(
                config=str(config),
                output=str(folder / name),
                flags=" ".join(flags_of(corpus)),
                kills=share,
                kinds=course.kinds,
                processes=course.processes,
                nodes=course.nodes,
                seed=seed,
            )
        )
        is_well = is_well and code == 0
    return is_well


def main(argv: list[str] | None = None) -> int:
    """Read the arguments and run; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500, help="kills of all runs together")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    parser.add_argument("--folder", help="keep everything in this new folder")
    parser.add_argument("--course", choices=[course.name for course in COURSES], help="only this")
    arguments = parser.parse_args(argv)
    courses = tuple(each for each in COURSES if arguments.course in (None, each.name))
    if arguments.course is None and arguments.kills < FEW_KILLS:
        courses = COURSES[:1]
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="ithaca-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    is_well = soak(folder, arguments.kills, arguments.seed, courses)
    print(f"{time.monotonic() - began:.0f} s")
    return finish("soak", is_well, folder, keep=arguments.folder is not None)


def finish(name: str, is_well: bool, folder: Path, *, keep: bool) -> int:
    """Say how all runs ended, and delete them where nobody needs them -> exit code."""
    print(f"{name}: {'well' if is_well else 'NOT well'}")
    if is_well and not keep:
        shutil.rmtree(folder)
    else:
        print(f"the runs are in {folder}")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
