"""Two processes pose as two nodes that differ in one thing: both refuse it, and name it with values
and ranks."""

import os
import shutil
from contextlib import ExitStack
from unittest import mock

import pytest

from parallel.layout import World
from pretrain.checkpointing import start
from pretrain.checkpointing.damage import Restart
from pretrain.processes import agreement, code_version, shared_facts
from pretrain.processes.agreement import Refused, Shared, require_agreement
from pretrain.processes.shared_facts import shared_by_all
from pretrain.config.flags import spell
from pretrain.config.load import load_config
from pretrain.plan import make_plan
from pretrain.train import Trainer
from tests.dist.training import base_arguments, train, write_corpus


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders with another `corpus` and the same `other` in each."""
    found = []
    for node in range(2):
        folder = tmp_path_factory.mktemp(f"node{node}")
        write_corpus(folder / "corpus", documents=60, seed=3 + node)
        write_corpus(folder / "other", documents=20, seed=8)
        found.append(str(folder))
    return found


def _module_of(name: str):
    return shared_facts if hasattr(shared_facts, name) else agreement


def compare(
    world: World, folders: list[str], argvs: list[list[str]], patches: dict | None = None
) -> str:
    """What this rank says of the plans of all, made in its own folder.

    Args:
        patches: function of shared_facts.py or agreement.py -> what it returns on rank 1.
    """
    before = os.getcwd()
    os.chdir(folders[world.rank])
    try:
        plan = make_plan(load_config(spell(argvs[world.rank])), world.size)
        with ExitStack() as stack:
            for name, value in (patches or {}).items() if world.rank else ():
                stack.enter_context(mock.patch.object(_module_of(name), name, return_value=value))
            require_agreement(shared_by_all(plan), world.axis)
        return "agreed"
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.chdir(before)


SETTINGS = {
    "seed": (1234, 99),
    "adam_beta2": (0.95, 0.9),
    "clip_grad": (1.0, 0.5),
    "weight_decay": (0.1, 0.0),
    "save_interval": (2, 3),
    "eval_interval": (2, 3),
    "lr": (0.01, 0.02),
    "exit_signal_handler": (True, False),
    "data_parallel_sharding_strategy": ("optim", "optim_grads"),
    "context_parallel_size": (1, 2),
    "data_path": ("other", "./other"),
    "valid_data_path": ("other", "./other"),
}


def arguments_of(name: str) -> list[list[str]]:
    """The flags of two nodes that differ in one setting."""
    common = {"train_iters": 2, "exit_interval": 1}
    if name == "valid_data_path":
        common |= {"split": "1"}
    return [base_arguments("corpus", **common | {name: value}) for value in SETTINGS[name]]


def compare_each(world: World, folders: list[str], cases: list[list[list[str]]]) -> list[str]:
    return [compare(world, folders, argvs) for argvs in cases]


@pytest.fixture(scope="module")
def said_of_settings(pool, folders) -> dict[str, list[str]]:
    """Setting -> what each of the two nodes says; all in one world, which takes longest to form."""
    cases = [arguments_of(name) for name in SETTINGS]
    ranks = pool.run(compare_each, 2, [folders[0]] * 2, cases)
    return {name: [said[i] for said in ranks] for i, name in enumerate(SETTINGS)}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_differs_is_refused_on_both_nodes(said_of_settings, name):
    values = [str(value) for value in SETTINGS[name]]
    expected = (
        f"Refused: {name}: must be the same on all ranks "
        f"(rank 0: {values[0]}, rank 1: {values[1]}). "
        "Fix: the same command and code on every node."
    )
    assert [text.splitlines() for text in said_of_settings[name]] == [[expected]] * 2


@pytest.mark.parametrize(
    "overrides, name",
    [
        ({}, "data of corpus"),
        (dict(data_path="other", valid_data_path="corpus", split="1"), "validation set valid"),
    ],
)
def test_another_corpus_under_the_same_path_is_refused(pool, folders, overrides, name):
    said = pool.run(compare, 2, folders, [base_arguments("corpus", **overrides)] * 2)
    assert said[0] == said[1]
    assert said[0].startswith(f"Refused: {name}: must be the same on all ranks (rank 0: "), said[0]


@pytest.mark.parametrize(
    "patches, name, value",
    [
        (dict(source_digest="0123abcd"), "code", "0123abcd (commit "),
        (dict(_version="9.9"), "version of megatron-core", "9.9"),
        (dict(device_here=("NVIDIA H100", 1)), "device", "cuda"),
        (dict(environment_of_numbers={"NVIDIA_TF32_OVERRIDE": "1"}), "NVIDIA_TF32_OVERRIDE", "1"),
        (dict(describe_pointwise="pointwise parts: fused"), "kernels", "pointwise parts: fused"),
    ],
)
def test_other_code_packages_and_devices_are_refused(pool, folders, patches, name, value):
    said = pool.run(compare, 2, [folders[0]] * 2, [base_arguments("corpus")] * 2, patches)
    assert said[0] == said[1]
    (line,) = [
        line
        for line in said[0].splitlines()
        if line.removeprefix("Refused: ").startswith(f"{name}: ")
    ]
    assert f", rank 1: {value}" in line


def test_what_may_differ_by_node_is_not_compared(pool, folders, tmp_path):
    argvs = [
        base_arguments(
            "corpus",
            data_cache_path=str(tmp_path / f"cache{node}"),
            tensorboard_dir=str(tmp_path / f"board{node}"),
        )
        for node in range(2)
    ]
    assert pool.run(compare, 2, [folders[0]] * 2, argvs) == ["agreed"] * 2


def test_every_setting_that_may_differ_exists():
    from pretrain.config.flat import field_table

    assert shared_facts.MAY_DIFFER.keys() <= field_table().keys()


def require(world: World, shared: list[Shared]) -> str:
    try:
        require_agreement(shared[world.rank], world.axis)
        return "agreed"
    except (Refused, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def test_a_layout_that_only_one_node_chose_is_refused(pool):
    """As where machines differ in memory: the settings are the same, and what follows from them is
    not."""
    shared = [
        Shared({"layout": "auto"}, {}, {}, {"phase 0: layout.context_parallel_size": size})
        for size in "12"
    ]
    assert (
        pool.run(require, 2, shared)
        == [
            "Refused: phase 0: layout.context_parallel_size: must be the same on all ranks "
            "(rank 0: 1, rank 1: 2). Fix: "
            "where machines differ in memory, --device-memory-gib, to choose alike on every node."
        ]
        * 2
    )


def test_a_setting_comes_before_what_follows_from_it(pool):
    shared = [
        Shared({"seed": size}, {"data of x": size}, {"start": size}, {"phase 0: lr": size})
        for size in "12"
    ]
    for text in pool.run(require, 2, shared):
        assert text.startswith("Refused: seed: must be the same"), text
        assert len(text.splitlines()) == 1, text


def start_alone(world: World, argv: list[str], hidden: str) -> str:
    """Rank 1 does not see the checkpoint, as behind a file system that is late."""
    found = (
        mock.patch.object(start, "find_restart", lambda root: Restart(None))
        if world.rank
        else mock.MagicMock()
    )
    with found:
        plan = make_plan(load_config(spell(argv)), world.size)
    try:
        require_agreement(shared_by_all(plan), world.axis)
        return "agreed"
    except RuntimeError as error:
        return str(error)


def test_ranks_that_see_another_checkpoint_start_again(pool, folders, tmp_path):
    argv = base_arguments(
        f"{folders[0]}/corpus", save=str(tmp_path / "save"), train_iters=1, eval_iters=0
    )
    assert pool.run(train, 2, argv) == ["done"] * 2
    said = pool.run(start_alone, 2, argv, "")
    assert said[0] == said[1]
    assert said[0].startswith("start: must be the same on all ranks (rank 0: continuing "), said[0]
    assert "rank 1: fresh weights, token 0" in said[0]


def run_trainer(world: World, argvs: list[list[str]]) -> tuple[str, bool]:
    trainer = Trainer(make_plan(load_config(spell(argvs[world.rank])), world.size), world)
    try:
        return trainer.run(), True
    except Refused as error:
        return str(error), hasattr(trainer, "layout")


def test_nothing_is_built_before_all_agree(pool, folders):
    """Another pipeline size would let the groups wait for each other until the time-out."""
    argvs = [
        base_arguments(f"{folders[0]}/corpus", pipeline_model_parallel_size=size) for size in (1, 2)
    ]
    for text, has_layout in pool.run(run_trainer, 2, argvs):
        assert text.startswith(
            "pipeline_model_parallel_size: must be the same on all ranks (rank 0: 1, rank 1: 2)"
        )
        assert not has_layout


def save_in_folder(world: World, folders: list[str], argv: list[str]) -> str:
    """What this rank says of a run with a relative --save that starts in the rank's own folder."""
    before = os.getcwd()
    os.chdir(folders[world.rank])
    try:
        return Trainer(make_plan(load_config(spell(argv)), world.size), world).run()
    except Refused as error:
        return str(error)
    finally:
        os.chdir(before)


def test_a_save_folder_that_only_one_node_sees_is_refused(pool, folders, tmp_path):
    """Else the checkpoint is published without the shards of the other node."""
    own = [tmp_path / f"node{node}" for node in range(2)]
    for folder in own:
        folder.mkdir()
    argv = base_arguments(f"{folders[0]}/corpus", save="save", train_iters=1, eval_iters=0)
    for text in pool.run(save_in_folder, 2, [str(folder) for folder in own], argv):
        assert text.startswith("save = save: must be one folder for all ranks (rank 1, "), text
    left = [path.name for path in own[0].rglob("*") if path.name != ".lock"]
    assert left == ["save"], left
    assert pool.run(save_in_folder, 2, [str(own[0])] * 2, argv) == ["done"] * 2
    assert not list(own[0].rglob(".seen*"))


def test_what_keeps_one_node_from_training_is_told_to_all(pool):
    well = Shared({"seed": "1"})
    ill = Shared(problem="a: no such file")
    assert (
        pool.run(require, 4, [well, well, ill, ill])
        == ["Refused: on ranks 2-3: a: no such file"] * 4
    )
    assert pool.run(require, 2, [ill, ill]) == ["Refused: on ranks 0-1: a: no such file"] * 2


def test_ranks_are_named_as_runs():
    assert agreement.describe_ranks([3]) == "rank 3"
    assert agreement.describe_ranks([0, 1, 2, 3, 8, 10, 11]) == "ranks 0-3, 8, 10-11"
    assert agreement.describe_ranks(range(0, 1024, 2)) == "ranks 0, 2, 4, 6, 8, 10, ..."


def test_of_very_many_differences_the_first_are_shown():
    texts = [{f"s{i}": str(rank) for i in range(40)} for rank in range(2)]
    lines = agreement.describe_differences(texts, "the same")
    assert len(lines) == agreement.SHOWN_DIFFERENCES + 1
    assert lines[-1].startswith("and 32 more differ: s8, s9, ")


def test_long_values_of_one_beginning_are_told_apart():
    start = "corpora/web " * 20
    (line,) = agreement.describe_differences(
        [{"data_path": start + "a"}, {"data_path": start + "b"}], "the same"
    )
    shown = line.split("(rank 0: ")[1].split(", rank 1: ")
    assert shown[0] != shown[1].split("). Fix")[0]


def test_each_source_file_and_its_name_count(tmp_path):
    for folder in code_version.CODE_FOLDERS:
        shutil.copytree(
            code_version.ROOT / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    first = code_version.source_digest(tmp_path)
    assert first == code_version.source_digest(code_version.ROOT)
    file = tmp_path / "model" / "mlp.py"
    text = file.read_text()
    file.write_text(text + "#")
    assert code_version.source_digest(tmp_path) != first
    file.write_text(text)
    assert code_version.source_digest(tmp_path) == first
    file.rename(tmp_path / "model" / "mlp2.py")
    assert code_version.source_digest(tmp_path) != first


def test_without_git_the_commit_is_unknown(tmp_path, monkeypatch):
    assert code_version.commit_of(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert code_version.commit_of(code_version.ROOT) is None
    assert (
        code_version.describe_commit(code_version.ROOT)
        == "commit unknown (warning: git does not tell it)"
    )


def test_a_single_process_agrees_with_itself(pool):
    assert pool.run(require, 1, [Shared({"seed": "1"})]) == ["agreed"]


def test_the_order_in_which_things_are_named_is_no_difference(pool):
    one = Shared({"seed": "1", "lr": "2"})
    other = Shared({"lr": "2", "seed": "1"})
    assert pool.run(require, 2, [one, other]) == ["agreed"] * 2
