"""Old checkpoints go, and never one that is needed or that the run did not write."""

import json
import math
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as config
from hypothesis import strategies as st

from parallel.layout import single_process_layout
from pretrain.checkpointing import checkpoint, retention
from pretrain.checkpointing.folders import LATEST, find_published, iteration_folder
from pretrain.checkpointing.manifest import verify_files
from pretrain.checkpointing.progress import Progress, ValidationScore
from pretrain.checkpointing.retention import Retention, choose_run_id, delete_checkpoint
from pretrain.checkpointing.retention_rules import CheckpointFacts, what_to_delete
from pretrain.config.checkpoint_config import CheckpointConfig

RUN = "a" * 32
OTHER = "b" * 32

# ---------------------------------------------------------------- the rules


def facts(step, **more) -> CheckpointFacts:
    return CheckpointFacts(**{"step": step, "clock": 100 * step, "run_id": RUN} | more)


def choose(found, published=None, verified=None, started_from=None, in_use=(), **settings):
    newest = max((each.step for each in found), default=0) if published is None else published
    return what_to_delete(
        found,
        CheckpointConfig(**settings),
        run_id=RUN,
        published=newest,
        verified={newest} if verified is None else verified,
        started_from=started_from,
        in_use=in_use,
    )


def test_by_default_the_last_three_and_the_ends_of_phases_stay():
    found = [facts(step) for step in (1, 2, 4, 5, 6)] + [facts(3, phase_end="base")]
    choice = choose(found)
    assert choice.delete == [1, 2]
    assert choice.kept == {3: "end of phase base", 4: "last 3", 5: "last 3", 6: "last 3"}
    assert choose(found, keep_phase_ends=False).delete == [1, 2, 3]
    assert choose(found, keep_last=1).delete == [1, 2, 4, 5]


def test_the_first_one_after_each_multiple_of_tokens_stays():
    clocks = {1: 400, 2: 999, 3: 1000, 4: 1300, 5: 2100, 6: 2900, 7: 4100, 8: 4200, 9: 4300}
    found = [facts(step, clock=clock) for step, clock in clocks.items()]
    choice = choose(found, keep_every=1000, keep_last=1)
    assert choice.kept == {3: "every 1K", 5: "every 1K", 7: "every 1K", 9: "last 1"}
    assert choice.delete == [1, 2, 4, 6, 8]


def test_steps_of_the_retain_interval_stay():
    choice = choose([facts(step) for step in range(2, 22, 2)], save_retain_interval=6, keep_last=1)
    assert sorted(choice.kept) == [6, 12, 18, 20]
    assert choice.kept[6] == "every 6 steps"


def test_the_best_of_each_length_stays_and_of_equal_ones_the_earlier():
    losses = {1: (64, 2.0), 2: (64, 1.5), 3: (64, 1.5), 4: (128, 3.0), 5: (128, 2.5), 7: (128, 2.6)}
    found = [
        facts(step, score=ValidationScore("valid", length, loss))
        for step, (length, loss) in losses.items()
    ]
    choice = choose([*found, facts(6), facts(8)], keep_best=1, keep_last=1)
    assert choice.kept == {
        2: "best loss 1.5000 of valid at 64 tokens",
        5: "best loss 2.5000 of valid at 128 tokens",
        8: "last 1",
    }


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_never_the_best(spoilt):
    losses = {1: 2.0, 2: spoilt, 3: 1.5, 4: spoilt, 5: 1.8}
    found = [facts(step, score=ValidationScore("valid", 64, loss)) for step, loss in losses.items()]
    choice = choose([*found, facts(8)], keep_best=2, keep_last=1)
    assert sorted(choice.kept) == [3, 5, 8]


def test_nothing_goes_before_the_newest_is_verified_nor_with_keep_all():
    found = [facts(step) for step in range(1, 9)]
    assert choose(found, verified=set()).delete == []
    assert choose(found, verified={1, 2, 7}).delete == []
    assert choose(found, keep_all=True).delete == []
    assert choose(found).delete == [1, 2, 3, 4, 5]


def test_where_another_run_wrote_the_newest_nothing_goes():
    found = [facts(step) for step in range(1, 9)]
    assert choose([*found, facts(9, run_id=OTHER)]).delete == []


def test_later_ones_than_the_published_stay_and_are_not_counted():
    """The run was set back by hand to step 5, and has come to 6 again."""
    choice = choose([facts(step) for step in range(1, 9)], published=6, keep_last=2)
    assert choice.delete == [1, 2, 3, 4]
    assert choice.kept[8] == "later than the published one"


def test_what_the_process_started_from_stays():
    choice = choose([facts(step) for step in range(1, 9)], started_from=2)
    assert choice.delete == [1, 3, 4, 5]
    assert choice.kept[2] == "this run started from it"


def test_what_is_being_exported_stays_until_that_is_done():
    found = [facts(step) for step in range(1, 9)]
    choice = choose(found, in_use={3, 8})
    assert choice.delete == [1, 2, 4, 5]
    assert choice.kept[3] == "its export is not done"
    assert choose(found).delete == [1, 2, 3, 4, 5]


def test_checkpoints_of_another_or_of_no_run_stay_and_are_named():
    found = [facts(1, run_id=None), facts(2, run_id=OTHER), *(facts(step) for step in range(3, 9))]
    choice = choose(found)
    assert choice.delete == [3, 4, 5]
    assert choice.foreign == [1, 2]


CHECKPOINTS = st.lists(
    st.builds(
        CheckpointFacts,
        step=st.integers(1, 60),
        clock=st.integers(1, 5000),
        run_id=st.sampled_from([RUN, RUN, RUN, OTHER, None]),
        phase_end=st.sampled_from([None, None, "base", "long"]),
        score=st.none()
        | st.builds(
            ValidationScore,
            set=st.just("valid"),
            seq_length=st.sampled_from([64, 128]),
            loss=st.sampled_from([1.0, 1.5, 2.0, float("inf")]),
        ),
    ),
    unique_by=lambda each: each.step,
    max_size=20,
)
SETTINGS = st.builds(
    CheckpointConfig,
    keep_last=st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 3000),
    save_retain_interval=st.none() | st.integers(1, 12),
    keep_best=st.integers(0, 3),
    keep_phase_ends=st.booleans(),
    keep_all=st.booleans(),
)


@config(deadline=None)
@given(data=st.data(), found=CHECKPOINTS, settings=SETTINGS)
def test_whatever_the_checkpoints_are_what_is_needed_stays(data, found, settings):
    steps = [each.step for each in found]
    published = data.draw(st.sampled_from(steps) if steps else st.just(1))
    verified = set(data.draw(st.lists(st.sampled_from(steps)) if steps else st.just([])))
    started_from = data.draw(st.none() | st.sampled_from(steps) if steps else st.none())

    def choose_of(some):
        return what_to_delete(
            some,
            settings,
            run_id=RUN,
            published=published,
            verified=verified,
            started_from=started_from,
        )

    choice = choose_of(found)
    gone = set(choice.delete)
    own = {each.step for each in found if each.run_id == RUN}
    assert gone <= own, "only the run's own"
    assert published not in gone and started_from not in gone
    assert all(step < published for step in gone)
    if gone:
        assert published in verified, "a verified one is left"
    if settings.keep_phase_ends:
        assert not gone & {each.step for each in found if each.phase_end is not None}
    past = sorted(step for step in own if step <= published)
    assert not gone & set(past[-settings.keep_last :])
    assert set(choice.kept) == own - gone
    assert choice.foreign == sorted(set(steps) - own)

    # In another order it is the same, and after the deletion nothing more goes.
    assert choose_of(data.draw(st.permutations(found))) == choice
    left = [each for each in found if each.step not in gone]
    assert choose_of(left).delete == []
    assert choose_of(left).kept == choice.kept

    # A kill after some of the deletions: the next time deletes exactly the rest.
    half = set(list(choice.delete)[: len(gone) // 2])
    assert choose_of([each for each in found if each.step not in half]).delete == sorted(
        gone - half
    )


def test_the_run_id_lives_as_long_as_the_run():
    stored = Progress(
        step=1, clock=1, phase={}, longest_seq_length=0, data=None, tokenizer=None, run_id=RUN
    )
    assert choose_run_id(is_restart=True, stored=stored) == RUN
    fresh = [
        choose_run_id(is_restart=False, stored=stored),
        choose_run_id(is_restart=False, stored=None),
        choose_run_id(is_restart=True, stored=None),
    ]
    assert len({RUN, *fresh}) == 4


# ---------------------------------------------------------------- the folders


def save(root, step, run_id=RUN, **more) -> Path:
    world = single_process_layout(torch.device("cpu")).world
    progress = Progress(
        **{
            "step": step,
            "clock": 100 * step,
            "phase": {"name": "base"},
            "longest_seq_length": 0,
            "data": None,
            "tokenizer": None,
            "run_id": run_id,
        }
        | more
    )
    return checkpoint.save(
        root, step, {"model.weight": torch.full((3,), float(step))}, progress, "", {}, world
    )


def iterations(root) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in root.glob("iter_*"))


def retain(root, folder=None, run_id=RUN, started_from=None, **settings) -> list[tuple]:
    """Delete what is due after the publication of `folder`, the newest by default -> events."""
    events = []
    keeper = Retention(
        root,
        CheckpointConfig(**settings),
        run_id,
        started_from,
        lambda *event: events.append(event),
    )
    keeper.after_publish(folder or find_published(root))
    keeper.close(finish=True)
    return events


def test_folders_go_once_the_newest_is_published(tmp_path):
    for step in range(1, 6):
        folder = save(tmp_path, step, ends_phase=step == 1)
    ((kind, step, clock, text),) = retain(tmp_path, folder)
    assert (kind, step, clock) == ("deleted", 5, 500)
    assert text.startswith("deleted iter_0000002, 0.0 MiB; kept iter_0000001 (end of phase base), ")
    assert iterations(tmp_path) == [1, 3, 4, 5]
    assert {path.name for path in tmp_path.iterdir()} == {
        LATEST,
        *(f"iter_000000{step}" for step in (1, 3, 4, 5)),
    }
    assert retain(tmp_path, folder) == []


def test_a_damaged_newest_one_deletes_nothing_and_is_named(tmp_path):
    for step in range(1, 6):
        folder = save(tmp_path, step)
    file = next(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    ((kind, _, _, text),) = retain(tmp_path, folder)
    assert kind == "damaged" and file.name in text, text
    assert iterations(tmp_path) == [1, 2, 3, 4, 5]


def test_what_this_run_did_not_write_stays_and_is_said_once(tmp_path):
    save(tmp_path, 1, run_id=OTHER)
    save(tmp_path, 2, run_id=None)
    save(tmp_path, 3)
    (tmp_path / "iter_0000003" / "notes.txt").write_text("mine")
    os.symlink(tmp_path / "iter_0000001", tmp_path / "iter_0000004")
    shutil.copytree(tmp_path / "iter_0000003", tmp_path / "iter_0000005")  # another's name
    (tmp_path / "iter_0000006").mkdir()
    for step in range(7, 10):
        save(tmp_path, step)
    events = retain(tmp_path, keep_last=1)
    assert iterations(tmp_path) == [1, 2, 3, 4, 5, 6, 9]
    assert [kind for kind, *_ in events] == ["retention", "retention", "deleted"], events
    foreign, notes, _ = [text for *_, text in events]
    assert foreign == "iter_0000001, iter_0000002: not written by this run, and so never deleted"
    assert notes.endswith("iter_0000003 holds what no save wrote: it is kept")


def test_what_the_process_started_from_stays_on_the_disk(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    start = iteration_folder(tmp_path, 2)
    retain(tmp_path, started_from=start, keep_last=1)
    assert iterations(tmp_path) == [2, 5]


def test_a_start_in_another_folder_protects_no_step_of_this_one(tmp_path):
    root = tmp_path / "save"
    for step in (2, 3):
        save(root, step)
    retain(root, started_from=save(tmp_path / "load", 2), keep_last=1)
    assert iterations(root) == [3]


def test_nothing_goes_where_the_text_file_names_another_one(tmp_path):
    for step in range(1, 6):
        folder = save(tmp_path, step)
    (tmp_path / LATEST).write_text("2")
    assert retain(tmp_path, folder) == []
    assert iterations(tmp_path) == [1, 2, 3, 4, 5]


def test_a_failing_disk_is_said_and_ends_nothing(tmp_path, monkeypatch):
    for step in range(1, 6):
        save(tmp_path, step)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(retention.os, "rename", fail)
    ((kind, _, _, text),) = retain(tmp_path)
    assert kind == "retention" and "Input/output error" in text
    assert iterations(tmp_path) == [1, 2, 3, 4, 5]


def test_what_nobody_expects_of_a_checkpoint_is_said(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, ends_phase=step == 1, phase={})
    ((kind, _, _, text),) = retain(tmp_path)
    assert kind == "retention" and text == "no older checkpoint is deleted: KeyError('name')"
    assert iterations(tmp_path) == [1, 2, 3, 4, 5]


def die_at(call: int, root: Path) -> bool:
    """Delete what is due in a process that dies at its n-th change of the disk -> did it die?"""
    child = os.fork()
    if child == 0:
        calls = 0

        def dying(change):
            def wrapped(*arguments, **more):
                nonlocal calls
                calls += 1
                if calls == call:
                    os._exit(9)
                return change(*arguments, **more)

            return wrapped

        for name in ("rename", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            retain(root, keep_last=1)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 9


def test_a_kill_in_the_middle_leaves_each_checkpoint_whole_or_gone(tmp_path):
    original = tmp_path / "original"
    for step in range(1, 4):
        save(original, step)
    for call in range(1, 100):
        root = tmp_path / str(call)
        shutil.copytree(original, root)
        died = die_at(call, root)
        # What has its name is whole, and the newest is there.
        for step in iterations(root):
            assert verify_files(iteration_folder(root, step)) == [], (call, step)
        assert find_published(root) == iteration_folder(root, 3)
        if not died:
            assert iterations(root) == [3]
            assert call > 10, "each of two folders is renamed and has several files"
            return
        # The next time does the rest, and clears up.
        retain(root, keep_last=1)
        assert iterations(root) == [3], call
        assert {path.name for path in root.iterdir()} == {"iter_0000003", LATEST}, call
    raise AssertionError("never came to its end")


def test_deleting_never_touches_what_no_save_wrote(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "notes").write_text("mine")
    assert delete_checkpoint(folder) is None
    assert (folder / "notes").read_text() == "mine"


def test_an_end_in_a_hurry_waits_for_no_reading(tmp_path, monkeypatch):
    for step in range(1, 6):
        folder = save(tmp_path, step)
    reading = threading.Event()
    closing = threading.Event()

    def verify(*_):
        reading.set()
        assert closing.wait(60)
        return []

    monkeypatch.setattr(retention.manifest, "verify_files", verify)
    keeper = Retention(tmp_path, CheckpointConfig(), RUN, None, lambda *_: None)
    keeper.after_publish(folder)
    assert reading.wait(60)
    keeper._leaving.set()
    closing.set()
    keeper.close(finish=False)
    assert iterations(tmp_path) == [1, 2, 3, 4, 5], "left to the next save"
    monkeypatch.undo()
    retain(tmp_path)
    assert iterations(tmp_path) == [3, 4, 5]


def test_what_is_read_again_comes_from_the_disk(tmp_path, monkeypatch):
    forgotten = []
    monkeypatch.setattr(retention, "_forget_cached", forgotten.append)
    for step in range(1, 5):
        folder = save(tmp_path, step)
    retain(tmp_path, folder)
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert {path.relative_to(folder).as_posix() for path in forgotten} == {*listed, "manifest.json"}
