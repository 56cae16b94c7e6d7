"""A byte a machine and step over MPI: the weights of torch.distributed's ranks."""

import subprocess
import sys
from pathlib import Path

import pytest

from commrt.testing import run_ranks
from tests.dist.test_onebyte import train

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(120)]


def test_ranks_of_mpi_have_the_weights_of_other_ranks() -> None:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    command = [mpiexec, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]
    command += ["--mca", "mpi_yield_when_idle", "1", sys.executable, "-m", "tests.mpi.tuning"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert list(map(int, found.stdout.split())) == run_ranks(train, 20, 1, world_size=2)
