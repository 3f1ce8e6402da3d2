"""launch/slurm.sh with stand-ins for sbatch, srun and scontrol that start each node's task here.

They do what Slurm does: a copy of the script runs as the job, srun starts one task for each node,
all tasks get the signal, and a job that is requeued runs again.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist.training import base_arguments, write_corpus
from tests.faults.conftest import can_make_networks
from tools.faults.launched_run import free_port

ROOT = Path(__file__).resolve().parents[2]
SLURM_SH = ROOT / "launch" / "slurm.sh"
SECONDS = 600

SBATCH = r"""#!/usr/bin/env bash
while [[ $1 == -* ]]; do
  [[ $1 != --nodes ]] || nodes=$2
  shift 2
done
cp "$1" "$SPOOL/script"
shift
export SLURM_JOB_ID=4711 SLURM_JOB_NUM_NODES=${nodes:-1} SLURM_JOB_NODELIST=node[0-1]
export SLURM_SUBMIT_DIR=$PWD SLURM_RESTART_COUNT=0
while true; do
  bash "$SPOOL/script" "$@"
  code=$?
  echo "$code" >> "$SPOOL/codes"
  [[ -e $SPOOL/requeued ]] || exit "$code"
  rm "$SPOOL/requeued"
  SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
done
"""

SCONTROL = r"""#!/usr/bin/env bash
case $1 in
  show) printf '%s\n' $HOSTS ;;
  requeue) echo "$2" > "$SPOOL/requeued" ;;
esac
"""

SRUN = r"""#!/usr/bin/env bash
echo "$*" >> "$SPOOL/srun"
nodes=1
while [[ $1 == -* ]]; do
  case $1 in
    --nodes) nodes=$2; shift 2 ;;
    --*=*) shift ;;
    *) shift 2 ;;
  esac
done
read -ra networks <<< "$NETWORKS"
tasks=()
for ((node = 0; node < nodes; node++)); do
  enter=()
  [[ -z ${networks[node]:-} ]] || enter=(ip netns exec "${networks[node]}")
  SLURM_NODEID=$node "${enter[@]}" "$@" &
  tasks+=($!)
done
echo "${tasks[@]}" > "$SPOOL/tasks"
worst=0
for task in "${tasks[@]}"; do
  wait "$task"
  code=$?
  [[ $code -le $worst ]] || worst=$code
done
exit "$worst"
"""

STAND_IN = r"""#!/usr/bin/env bash
[[ $2 == launch.node ]] || exec {python} "$@"
echo "$MASTER_ADDR $MASTER_PORT $*" >> "$SPOOL/starts.$SLURM_NODEID"
if [[ $SLURM_RESTART_COUNT -gt 0 ]]; then
  echo -n done > "$ITHACA_OUTCOME_FILE"
  exit 0
fi
trap 'echo -n stopped > "$ITHACA_OUTCOME_FILE"; exit 0' USR1
touch "$ITHACA_OUTCOME_FILE.hears" "$SPOOL/ready.$SLURM_NODEID"
while true; do sleep 0.05; done
"""


class Cluster:
    """A folder with the stand-ins, and jobs that are submitted there."""

    def __init__(self, folder: Path, networks: list[str]):
        self.spool = folder / "spool"
        self.spool.mkdir()
        programs = folder / "bin"
        programs.mkdir()
        stand_in = STAND_IN.format(python=sys.executable)
        texts = {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": SRUN, "python": stand_in}
        for name, text in texts.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("GLOO_", "NCCL_", "MASTER_", "NNODES", "NODE_RANK"))
        }
        self.environment |= {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SPOOL": str(self.spool),
            "NETWORKS": " ".join(networks),
            "HOSTS": "10.77.0.1 10.77.0.2" if networks else "127.0.0.1 127.0.0.2",
            "MASTER_PORT": str(free_port()),
            "NPROC_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
            "GRACE": "120",
        }
        self.programs = programs

    def submit(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Run a job of two nodes, in the background."""
        return subprocess.Popen(
            ["sbatch", "--nodes", "2", str(SLURM_SH), *arguments],
            cwd=ROOT,
            env=self.environment | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def tasks(self) -> list[int]:
        """List the process ids of the tasks of the step that runs."""
        return [int(word) for word in (self.spool / "tasks").read_text().split()]

    def codes(self) -> list[int]:
        """List how each run of the job ended."""
        return [int(word) for word in (self.spool / "codes").read_text().split()]


def wait_until(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + SECONDS
    while not condition():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.05)


def end(job: subprocess.Popen[str], cluster: Cluster) -> None:
    """Leave nothing behind where a test has failed."""
    if job.poll() is None:
        job.kill()
        for task in cluster.tasks():
            os.kill(task, signal.SIGTERM)


def test_a_job_that_is_signalled_saves_and_goes_on_when_it_is_requeued(tmp_path):
    cluster = Cluster(tmp_path, [])
    job = cluster.submit(
        "--config", "run.yaml", ITHACA_PYTHON=str(cluster.programs / "python"), GRACE="5"
    )
    try:
        ready = [cluster.spool / f"ready.{node}" for node in range(2)]
        wait_until(lambda: all(path.exists() for path in ready), job)
        for task in cluster.tasks():
            os.kill(task, signal.SIGUSR1)
        said, _ = job.communicate(timeout=60)
    finally:
        end(job, cluster)
    assert cluster.codes() == [75, 0], said
    assert said.count("slurm.sh: stopped with its state saved; requeueing") == 1
    for node in range(2):
        starts = (cluster.spool / f"starts.{node}").read_text().splitlines()
        assert len(starts) == 2, starts
        for line in starts:
            assert line.startswith(f"127.0.0.1 {cluster.environment['MASTER_PORT']} -m launch.node")
            assert f"--nnodes 2 --node-rank {node} " in line
            assert line.endswith("pretrain.train --config run.yaml")


def test_the_time_before_the_limit_is_enough_for_the_grace_period():
    text = SLURM_SH.read_text()
    (before,) = re.findall(r"^#SBATCH --signal=USR1@(\d+)$", text, re.MULTILINE)
    (grace,) = re.findall(r"^GRACE=\$\{GRACE:-(\d+)\}$", text, re.MULTILINE)
    assert int(before) >= int(grace) + 30
    assert "#SBATCH --requeue" in text
    assert "#SBATCH --open-mode=append" in text, "a requeued job keeps the output before"


def test_a_container_has_the_code_and_the_folder_of_the_job_and_a_port(tmp_path):
    cluster = Cluster(tmp_path, [])
    (tmp_path / "bin" / "srun").write_text(
        '#!/usr/bin/env bash\necho "$MASTER_PORT $*" > "$SPOOL/srun"\n'
    )
    settings = {"CONTAINER_IMAGE": "ithaca.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    job = cluster.submit("--config", "run.yaml", **settings, MASTER_PORT="")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 0, said
    mounts = f"--container-mounts {ROOT}:{ROOT},{ROOT}:{ROOT},/data:/data"
    asked = f"--container-image ithaca.sqsh {mounts} --container-workdir {ROOT} bash -c"
    given = (cluster.spool / "srun").read_text()
    assert asked in given
    # A port of the job's own, by its number.
    assert given.startswith(f"{20_000 + 4711} ")


@pytest.mark.long
def test_a_run_on_two_nodes_is_stopped_requeued_and_ends(request, tmp_path):
    networks = request.getfixturevalue("networks") if can_make_networks() else []
    cluster = Cluster(tmp_path, networks)
    corpus = write_corpus(tmp_path / "corpus", documents=60)
    save = tmp_path / "save"
    arguments = base_arguments(
        corpus, train_iters=200, eval_iters=0, save_interval=1000, save=str(save)
    )
    job = cluster.submit(*arguments, ITHACA_PYTHON=sys.executable)
    metrics = save / "metrics.jsonl"
    try:
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 5, job)
        for task in cluster.tasks():
            os.kill(task, signal.SIGUSR1)
        said, _ = job.communicate(timeout=SECONDS)
    finally:
        end(job, cluster)
    assert cluster.codes() == [75, 0], said
    events = [
        json.loads(line)["event"] for line in (save / "events.jsonl").read_text().splitlines()
    ]
    assert [event for event in events if event in ("start", "restart")] == ["start", "restart"]
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 201)), "each step once"
    assert said.count("train.sh: node 1 of 2: done") == 1, said
