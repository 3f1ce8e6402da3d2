"""launch/train.sh in a pod: what it takes from the names that operators of Kubernetes set."""

import pytest

from tests.faults.test_train_sh import Fixture


@pytest.fixture
def fake(tmp_path):
    return Fixture(tmp_path)


OPERATOR = {
    "PET_NNODES": "4",
    "PET_NODE_RANK": "2",
    "PET_NPROC_PER_NODE": "8",
    "PET_MASTER_ADDR": "ithaca-master-0",
    "PET_MASTER_PORT": "23456",
}


def test_what_an_operator_calls_pet_counts_where_ours_is_not_set(fake):
    fake.plan("done")
    del fake.environment["NPROC_PER_NODE"]
    code, _, err = fake.run(**OPERATOR, NODE_RANK="3")
    assert code == 0, err
    (start,) = fake.starts()
    assert "--nnodes 4 --node-rank 3 --nproc-per-node 8 " in start
    assert "--master-addr ithaca-master-0 --master-port 23456 " in start
    taken = "PET_NNODES = 4 PET_NPROC_PER_NODE = 8 PET_MASTER_ADDR = ithaca-master-0"
    assert f"train.sh: from the environment: {taken} PET_MASTER_PORT = 23456\n" in err


def test_an_operator_may_leave_the_number_of_processes_to_us(fake):
    fake.plan("done")
    code, _, err = fake.run(**OPERATOR | {"PET_NPROC_PER_NODE": "auto"})
    assert code == 0, err
    assert "--node-rank 2 --nproc-per-node 1 " in fake.starts()[0]


def test_an_operator_that_counts_pods_in_world_size_is_understood(fake):
    fake.plan("done")
    pods = {"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "ithaca-master-0"}
    code, _, err = fake.run(**pods)
    assert code == 0, err
    assert "--nnodes 4 --node-rank 1 " in fake.starts()[0]
    assert "from the environment: WORLD_SIZE = 4 nodes RANK = 1" in err


def test_a_process_of_torchrun_is_no_pod(fake):
    fake.plan("done")
    names = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
    code, _, err = fake.run(**names)
    assert code == 0, err
    assert "--nnodes 1 --node-rank 0 " in fake.starts()[0]


def test_a_range_of_nodes_is_refused(fake):
    code, _, err = fake.run(**OPERATOR | {"PET_NNODES": "2:4"})
    assert code == 2
    assert "error: NNODES = 2:4: must be a whole number, at least 1" in err
