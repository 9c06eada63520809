import pytest

from lmtrain.errors import EngineError
from lmtrain.place import find, first_host
from lmtrain.protocol import Place

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}


def test_one_process_without_variables():
    assert find({}) == Place()


def test_torchrun_and_deepspeed():
    assert find(TORCHRUN) == Place(rank=3, world=4, local_rank=1, address="10.0.0.1", port=1234)
    assert find(TORCHRUN, local_rank=0).local_rank == 0
    assert find(TORCHRUN, local_rank=-1).local_rank == 1


def test_srun_step():
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "777",
        "SLURM_JOB_NODELIST": "gpu[003-006]",
    }
    place = find(slurm)
    assert (place.rank, place.world, place.local_rank, place.address) == (5, 8, 1, "gpu003")
    assert place.port == find({**slurm, "SLURM_PROCID": "6"}).port
    assert place.port != find({**slurm, "SLURM_JOB_ID": "778"}).port


def test_a_slurm_shell_without_a_step_is_one_process():
    assert find({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}) == Place()


def test_torchrun_inside_a_slurm_step_wins():
    assert find({**TORCHRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}).rank == 3


def test_mpirun():
    environment = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert find({**environment, "MASTER_ADDR": "h"}).rank == 1
    with pytest.raises(EngineError, match="MASTER_ADDR is not set"):
        find(environment)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "four"}, "RANK = 'four' is no whole number"),
        ({"RANK": "4"}, "RANK = 4 and WORLD_SIZE = 4"),
        ({"RANK": "-1"}, "RANK = -1"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT = 99999 is no port"),
    ],
)
def test_bad_variables(change, message):
    with pytest.raises(EngineError, match=message):
        find({**TORCHRUN, **change})


def test_half_set_variables():
    with pytest.raises(EngineError, match="RANK is set but not WORLD_SIZE"):
        find({"RANK": "0"})


@pytest.mark.parametrize(("nodes", "host"), [("a1", "a1"), ("a1,b2", "a1"), ("n[01-04],m", "n01"), ("n[7,9]", "n7")])
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_a_pod_of_an_indexed_job():
    pod = {"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "lmtrain-0.lmtrain", "MASTER_PORT": "29500"}
    assert find(pod) == Place(rank=1, world=2, local_rank=0, address="lmtrain-0.lmtrain", port=29500)
    assert find({**pod, **TORCHRUN}).rank == 3
    assert find({"JOB_COMPLETION_INDEX": "1"}) == Place()
    with pytest.raises(EngineError, match="JOB_COMPLETION_INDEX = 2 and WORLD_SIZE = 2"):
        find({**pod, "JOB_COMPLETION_INDEX": "2"})
