"""launch/train.sh: what each outcome of a run leads to, with a stand-in for launch.node that takes
no time.

`ITHACA_PYTHON` names a shell script that plays launch.node: it notes the start, then does the next
thing of its plan.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN_SH = ROOT / "launch" / "train.sh"
ALLOCATOR_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

# Each launch takes the next line of the file `plan` (the last line is kept). `hang` waits for a
# signal, says which one, and ends like a trainer that saved; it leaves an orphan in a session of
# its own, as a killed launcher does.
FAKE_PYTHON = r"""#!/usr/bin/env bash
[[ $1 == -m ]] || exec {python} "$@"
here={here}
if [[ $2 == pretrain.train ]]; then echo "direct $RANK $WORLD_SIZE ${{*:3}}"; exit 0; fi
echo "$PWD|$OMP_NUM_THREADS|$PYTHONPATH|$*" >> "$here/starts"
env | grep _ALLOC_CONF= > "$here/allocator"
action=$(head -n 1 "$here/plan")
[[ $(wc -l < "$here/plan") -le 1 ]] || sed -i 1d "$here/plan"
case $action in
  nothing) exit 1 ;;
  same | other)
    echo -n "$action error" > "$ITHACA_OUTCOME_FILE.error"
    echo "Traceback ..." > "$ITHACA_ERRORS/rank0.txt"
    exit 1 ;;
  silent) exit 0 ;;
  publish)
    mkdir -p "$here/save"
    date +%s%N > "$here/save/latest_checkpointed_iteration.txt"
    exit 1 ;;
  refused | unmet) echo -n "$action" > "$ITHACA_OUTCOME_FILE"; exit 1 ;;
  "slow failure")  # a launcher that has not seen the signal yet when its workers fail
    trap "exit 1" TERM
    touch "$ITHACA_OUTCOME_FILE.hears"
    echo $$ > "$here/ready"
    while true; do sleep 0.05; done ;;
  hang | deaf)
    if [[ $action == hang ]]; then
      for name in TERM INT HUP USR1; do
        trap "echo $name >> '$here/signals'; echo -n stopped > '$ITHACA_OUTCOME_FILE'; exit 1" $name
      done
    fi
    touch "$ITHACA_OUTCOME_FILE.hears"
    setsid sleep 300 &
    echo $! > "$here/orphan"
    echo $$ > "$here/ready"
    while true; do sleep 0.05; done ;;
  *) echo -n "$action" > "$ITHACA_OUTCOME_FILE"; exit 0 ;;
esac
"""


def _hear_signals() -> None:
    """What the test runner ignores (SIGHUP under nohup, SIGINT in the background), a shell that it
    starts could not even trap."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class Fixture:
    """A folder with the stand-in in it, and train.sh run from there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / "python"
        self.python.write_text(FAKE_PYTHON.format(python=sys.executable, here=folder))
        self.python.chmod(0o755)
        self.environment = {
            key: value
            for key, value in os.environ.items()
            if key
            not in (
                "NNODES",
                "NODE_RANK",
                "MASTER_ADDR",
                "MASTER_PORT",
                "OMP_NUM_THREADS",
                "PYTHONPATH",
                *ALLOCATOR_NAMES,
            )
        }
        self.environment |= {
            "ITHACA_PYTHON": str(self.python),
            "RETRY_WAIT": "0",
            "GRACE": "5",
            "NPROC_PER_NODE": "1",
            "TMPDIR": str(folder),
        }

    def plan(self, *actions: str) -> None:
        (self.folder / "plan").write_text("".join(f"{action}\n" for action in actions))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(TRAIN_SH), *(arguments or ("--config", "run.yaml"))],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_hear_signals,
        )

    def run(self, *arguments: str, check: bool = True, **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=30)
        if check:
            self.assert_clean()
        return process.returncode, out, err

    def starts(self) -> list[str]:
        path = self.folder / "starts"
        return path.read_text().splitlines() if path.exists() else []

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 20
        while not (self.folder / "ready").exists():
            assert time.monotonic() < deadline, "the stand-in did not start"
            time.sleep(0.02)

    def assert_clean(self) -> None:
        """No scratch folder, and no process that carries its name."""
        assert not list(self.folder.glob("ithaca.*"))
        for name in ("ready", "orphan"):
            path = self.folder / name
            if path.exists():
                assert not _is_alive(int(path.read_text())), f"{name} is still running"


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@pytest.fixture
def fake(tmp_path):
    return Fixture(tmp_path)


def test_done_is_success(fake):
    fake.plan("done")
    code, _, err = fake.run("--config", "run.yaml", "--lr", "1")
    assert code == 0, err
    (start,) = fake.starts()
    folder, threads, path, command = start.split("|")
    assert Path(folder) == fake.folder  # relative paths stay the caller's
    assert int(threads) >= 1
    assert path == str(ROOT)
    assert command.endswith(" pretrain.train --config run.yaml --lr 1")
    assert "--grace 5 " in command
    assert (
        "--nnodes 1 --node-rank 0 --nproc-per-node 1 --master-addr 127.0.0.1 --master-port 0"
        in command
    )


def test_gpu_memory_comes_in_expandable_segments(fake):
    fake.plan("done")
    assert fake.run()[0] == 0
    found = (fake.folder / "allocator").read_text()
    assert found == "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True\n"


@pytest.mark.parametrize("value", ["max_split_size_mb:64", ""])
@pytest.mark.parametrize("name", ALLOCATOR_NAMES)
def test_the_callers_allocator_settings_stay_alone(fake, name, value):
    fake.plan("done")
    assert fake.run(**{name: value})[0] == 0
    found = (fake.folder / "allocator").read_text()
    assert found == f"{name}={value}\n"


def test_again_starts_again(fake):
    fake.plan("again", "done")
    assert fake.run()[0] == 0
    assert len(fake.starts()) == 2


@pytest.mark.parametrize("outcome", ["stopped", "unstarted"])
def test_stopped_asks_to_be_called_again(fake, outcome):
    fake.plan(outcome)
    assert fake.run()[0] == 75
    assert len(fake.starts()) == 1


def test_a_stop_says_whether_the_same_command_goes_on(fake):
    fake.plan("stopped")
    saved = fake.run("--config", "run.yaml", "--save", "save")[2]
    assert "stopped; the same command goes on from the last checkpoint" in saved
    unsaved = fake.run("--config", "run.yaml")[2]
    assert "stopped; nothing is saved without --save: the same command begins again" in unsaved
    assert "goes on" not in unsaved


def test_refused_is_not_tried_again(fake):
    fake.plan("refused")
    assert fake.run()[0] == 2
    assert len(fake.starts()) == 1


def test_a_node_that_does_not_come_is_not_a_crash(fake):
    fake.plan("unmet")
    code, _, err = fake.run()
    assert code == 1
    assert len(fake.starts()) == 1
    assert err == "", "launch.node has said why"


def test_on_one_node_a_port_has_no_effect_and_is_named(fake):
    fake.plan("done")
    code, _, err = fake.run(MASTER_ADDR="pod-0", MASTER_PORT="29500")
    assert code == 0, err
    assert "MASTER_ADDR and MASTER_PORT have no effect with NNODES = 1" in err
    assert "--master-port 0 " in fake.starts()[0], "the kernel chooses a port that nobody can take"


@pytest.mark.parametrize("action", ["nothing", "silent", "nonsense"])
def test_no_known_outcome_is_a_failure_with_bounded_restarts(fake, action):
    fake.plan(action)
    code, _, err = fake.run(MAX_RESTARTS="2")
    assert code == 1
    assert len(fake.starts()) == 3
    assert "giving up" in err


def test_failures_then_done(fake):
    fake.plan("nothing", "nothing", "done")
    assert fake.run(MAX_RESTARTS="2")[0] == 0
    assert len(fake.starts()) == 3


@pytest.mark.parametrize(
    "arguments", [("--config", "run.yaml", "--save", "save"), ("--config=run.yaml",)]
)
def test_a_new_checkpoint_resets_the_count(fake, arguments):
    (fake.folder / "run.yaml").write_text("lr: 1\nsave: 'save'  # where\n")
    fake.plan("nothing", "publish", "publish", "nothing", "done")
    assert fake.run(*arguments, MAX_RESTARTS="2")[0] == 0
    assert len(fake.starts()) == 5
    fake.plan("nothing")  # the same checkpoint as before is no progress
    assert fake.run(*arguments, MAX_RESTARTS="2")[0] == 1


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1"])
def test_a_signal_is_forwarded_and_the_outcome_counts(fake, name):
    fake.plan("hang")
    process = fake.start()
    fake.wait_until_ready()
    process.send_signal(getattr(signal, f"SIG{name}"))
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75, err
    assert (fake.folder / "signals").read_text().split() == [name]
    assert len(fake.starts()) == 1
    fake.assert_clean()


def test_a_signal_without_an_orderly_end_is_not_a_success(fake):
    fake.plan("deaf")
    process = fake.start()
    fake.wait_until_ready()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert len(fake.starts()) == 1
    fake.assert_clean()


def test_the_first_restart_comes_at_once_and_the_launcher_waits_before_the_others(fake):
    """While it waits the nodes meet and the processes import."""
    fake.plan("nothing")
    assert fake.run(RETRY_WAIT="3", MAX_RESTARTS="3")[0] == 1
    pauses = [start.split("--pause ")[1].split()[0] for start in fake.starts()]
    assert pauses == ["0", "0", "3", "6"]


def test_the_same_error_twice_at_one_step_is_not_tried_a_third_time(fake):
    fake.plan("other", "same", "same", "done")
    code, _, err = fake.run(MAX_RESTARTS="9", check=False)
    assert code == 1, err
    assert len(fake.starts()) == 3
    assert "the same error twice at the same step, without a new checkpoint in between" in err
    assert "error: same error" in err
    # Without --save the ranks' own words stay where they are.
    (kept,) = fake.folder.glob("ithaca.*/errors.3/rank0.txt")
    assert kept.read_text() == "Traceback ...\n"


def test_an_error_after_a_new_checkpoint_is_another_one(fake):
    fake.plan("same", "publish", "same", "done")
    assert fake.run("--config", "run.yaml", "--save", "save", MAX_RESTARTS="9")[0] == 0
    assert len(fake.starts()) == 4


def test_lines_that_nobody_reads_end_nothing(fake):
    """As in `train ... 2>&1 | head`: a shell that writes there dies of SIGPIPE by default."""
    fake.plan("again", "nothing", "done")
    process = fake.start()
    process.stderr.close()
    assert process.wait(timeout=30) == 0
    assert len(fake.starts()) == 3
    process.stdout.close()
    fake.assert_clean()


def test_a_signal_after_a_failure_asks_to_be_called_again(fake):
    """Nothing trains then, and the last checkpoint counts."""
    fake.plan("slow failure")
    process = fake.start("--save", "save")
    fake.wait_until_ready()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75, err
    assert "stopped after a failure; the same command goes on from the last checkpoint" in err
    fake.assert_clean()


def test_a_signal_between_two_launches_is_told_to_the_other_nodes(fake):
    """They may be waiting for this one in the next launch."""
    fake.plan("slow failure", "hang")
    settings = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
    process = fake.start(**settings)
    fake.wait_until_ready()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75, err
    assert len(fake.starts()) == 2
    assert (fake.folder / "signals").read_text().split() == ["TERM"], "the second launch hears it"


def test_several_nodes(fake):
    fake.plan("done")
    settings = {"NNODES": "2", "NODE_RANK": "1", "MASTER_PORT": "1234", "NPROC_PER_NODE": "8"}
    assert fake.run(MASTER_ADDR="node0", **settings)[0] == 0
    assert (
        "--nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr node0 --master-port 1234"
        in fake.starts()[0]
    )
    code, _, err = fake.run(**settings)
    assert code == 2 and "MASTER_ADDR" in err


@pytest.mark.parametrize(
    "name, value",
    [("NPROC_PER_NODE", "0"), ("MAX_RESTARTS", "many"), ("NODE_RANK", "1"), ("JOIN_WAIT", "0")],
)
def test_bad_settings_are_named(fake, name, value):
    fake.plan("done")
    code, _, err = fake.run(**{name: value})
    assert code == 2 and name in err
    assert not fake.starts()


@pytest.mark.parametrize("port", ["http", "0", "65536"])
def test_a_port_that_is_none_is_named(fake, port):
    fake.plan("done")
    code, _, err = fake.run(NNODES="2", MASTER_ADDR="node0", MASTER_PORT=port)
    assert code == 2
    assert f"MASTER_PORT = {port}: must be a whole number" in err
    assert not fake.starts()


def test_questions_need_no_launcher(fake):
    code, out, _ = fake.run("--config", "run.yaml", "--print-config", NPROC_PER_NODE="4")
    assert code == 0 and not fake.starts()
    assert out == "direct 0 4 --config run.yaml --print-config\n"
    code, out, _ = fake.run("--help")
    assert code == 0 and out == "direct 0 1 --help\n"


def test_no_arguments_print_the_usage(fake):
    process = subprocess.run(
        ["bash", str(TRAIN_SH)],
        cwd=fake.folder,
        env=fake.environment,
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert process.returncode == 2
    assert "MASTER_ADDR" in process.stdout
