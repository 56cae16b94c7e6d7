"""Program of test_onebyte: prints the digest of the weights of every rank."""

from mpi4py import MPI

from commrt.simulation.onebyte import OneByte
from tests.dist.test_onebyte import CONFIG, digest, loss, network

if __name__ == "__main__":
    rank, model = MPI.COMM_WORLD.Get_rank(), network()
    tuner = OneByte(model, CONFIG, group=MPI.COMM_WORLD)
    for step in range(20):
        is_away = rank == 1 and step % 3 == 1
        tuner.step(None if is_away else lambda at=step: loss(model, rank, at))
    digests = MPI.COMM_WORLD.gather(digest(model))
    if rank == 0:
        print(*digests)
