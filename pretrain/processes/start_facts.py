"""Write down what this node is about to train, for the launcher to compare with the other nodes'.

It does so before any process trains, and names nodes where they differ; launch/surroundings.py
reads the same names. What needs the plan or the whole data is compared later: agreement.py.
"""

import json
from pathlib import Path
from typing import Any

from data.files import write_atomically
from data.sizes import describe_pair, prefixes
from parallel.layout import environment_of_numbers
from pretrain.config.config import Config
from pretrain.config.load import facts_path, load_config
from pretrain.plan_settings import with_data_args
from pretrain.processes.code_version import ROOT, describe_commit, source_digest
from pretrain.processes.shared_facts import setting_texts, version_texts


def tell_launcher(argv: list[str]) -> None:
    """Write the facts of this node where the launcher looks for them, if it does.

    Args:
        argv: the command line, as `spell` returns it.
    """
    path = facts_path()
    if path is not None:
        write_atomically(Path(path), json.dumps(start_facts(argv)))


def start_facts(argv: list[str]) -> dict[str, Any]:
    """Write down settings, code and data, or why they cannot be read."""
    commit = describe_commit(ROOT)
    code = source_digest(ROOT)
    same_code: dict[str, Any] = {
        "texts": version_texts() | {"code": code},
        "remedy": "the same code and packages",
    }
    found: dict[str, Any] = {
        "groups": [same_code],
        "notes": {"code": commit},
        "problems": [],
        "shown": {"code": f"{code}, {commit}"},
    }
    try:
        config = with_data_args(load_config(argv))
        files = data_texts(config)
    except (ValueError, OSError) as error:
        found["problems"] = str(error).splitlines()
        return found
    settings = setting_texts(config) | environment_of_numbers()
    found["groups"] += [
        {"texts": settings, "remedy": "the same command"},
        {"texts": files, "remedy": "the same files"},
    ]
    count = f"{len(files)} corpora" if len(files) != 1 else "1 corpus"
    found["shown"]["data"] = "made up (mock_data)" if config.data.mock_data else count
    return found


def data_texts(config: Config) -> dict[str, str]:
    """Describe the files of each corpus, by its prefix."""
    blends = [entry.data_path for entry in config.schedule.entries if entry.data_path]
    return {f"files of {prefix}": describe_pair(prefix) for prefix in prefixes(config.data, blends)}
