"""Tasks of lm-evaluation-harness, from task files on this machine, without the network.

The harness is optional: nothing of it is imported before it is asked for.
"""

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

VERSION = "0.4.13"
"""The release that this is tested with; requirements.txt names it."""
OWN_TASKS = Path(__file__).parent / "harness_tasks"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables that keep the harness's libraries from the network."""
BOOTSTRAP_DRAWS = 1000

HarnessModelName = Literal["ithaca", "hf"]


def check_installed(names: Sequence[str], model: HarnessModelName) -> None:
    """Raise ValueError where the harness, or what its own model needs, is not installed."""
    needed = ["lm_eval", *(["accelerate"] if model == "hf" else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        wanted = " ".join([f"lm_eval=={VERSION}", *needed[1:]])
        raise ValueError(
            f"lm_eval_tasks = {' '.join(names)}: {' and '.join(missing)} is not installed. "
            f"Fix: pip install {wanted}, into this environment."
        )


def open_tasks(names: Sequence[str], folder: str | None) -> Any:
    """Index the task files -> the harness's TaskManager.

    Args:
        folder: with task files of the user's own, beside those of this repository.

    Raises:
        ValueError: a name that no task, group or tag has.
    """
    for variable in OFFLINE:
        os.environ.setdefault(variable, "1")
    # No processes beside those of the layout.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    paths = [str(OWN_TASKS), *([folder] if folder else [])]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    # The harness's own task files take seconds to index.
    local = manager.all_tasks
    manager = TaskManager(include_path=paths)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"lm_eval_tasks = {' '.join(unknown)}: no such task. Fix: one of {', '.join(local)}, "
            "one of the harness's own (lm-eval ls tasks), or --lm-eval-include-path."
        )
    return manager


def run_tasks(
    model: Any,
    names: Sequence[str],
    manager: Any,
    seed: int,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> list[dict[str, Any]]:
    """Run tasks on a model of the harness's interface -> a record for each task.

    Args:
        limit: questions of each task; None = all.
        num_fewshot: solved questions before each one; None = as the task says.

    Raises:
        ValueError: the data of a task cannot be read.
    """
    from lm_eval import simple_evaluate

    try:
        found = simple_evaluate(
            model=model,
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except OSError as error:
        raise ValueError(
            f"lm_eval_tasks = {' '.join(names)}: a task's data cannot be read without the network "
            f"({error}). Fix: a task file whose data lies on this machine."
        ) from None
    # The harness gives results to the first process of a node only.
    if found is None:
        return []
    counts = found["n-samples"]
    return [
        {"task": name, "metrics": _numbers(values), "questions": counts[name]["effective"]}
        for name, values in found["results"].items()
        if name in counts
    ]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Keep what is a number; the harness's names are `metric,filter`."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "," in name
    }


def transformers_model(folder: str, dtype: str | torch.dtype, device: str) -> Any:
    """Make the harness's own model `hf` of an exported folder."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=folder, dtype=dtype, device=device, trust_remote_code=False)
