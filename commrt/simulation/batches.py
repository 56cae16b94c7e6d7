"""Which examples a client trains on in which step, drawn from seed, round and client alone."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from commrt.codecs import derive_seed

Indices = NDArray[np.int64]

_LAST = np.uint64(2**64 - 1)  # sorts behind all words


class Picked(NamedTuple):
    """Examples for neighbouring clients in a step.

    Attributes:
        rows: Which of the clients, by their place.
        examples: int64 (n, B), indices.
        shares: fp32 (n, B), what each weighs in its client's loss: they add up to 1, and those that
            fill up a smaller batch have 0.
    """

    rows: slice
    examples: Tensor
    shares: Tensor


class Batches:
    """Batches of local training: a client's examples in a new order each epoch, in pieces.

    The size that a batch is filled up to follows from the client's own number of examples. So what
    is computed of a client never depends on the others it is trained with.

    Args:
        shares: Each client's examples.
        batch_size: The last batch of an epoch may have fewer.
        epochs: A client's passes over its examples; None if ``steps`` is given.
        steps: A client's steps, over as many epochs as it takes.
        granule: Batches are filled up to a multiple of it.

    Attributes:
        sizes: A client's examples.
        num_steps: A client's steps in one training.
        num_examples: On how many examples it trains then, each epoch counted.
    """

    def __init__(
        self,
        shares: Sequence[Indices],
        *,
        batch_size: int,
        epochs: int | None,
        steps: int | None,
        granule: int,
    ) -> None:
        self._shares = [np.ascontiguousarray(share, np.int64) for share in shares]
        self.sizes = np.array([len(share) for share in self._shares], np.int64)
        self.batch_size, self._granule = batch_size, granule
        self._per_epoch = -(-self.sizes // batch_size)
        wanted = self._per_epoch * (epochs or 0) if steps is None else np.int64(steps)
        self._words = _Words()
        self.num_steps = np.where(self.sizes > 0, wanted, 0)
        whole, rest = np.divmod(self.num_steps, np.maximum(self._per_epoch, 1))
        self.num_examples = whole * self.sizes + rest * batch_size

    def order(self, clients: Indices) -> Indices:
        """Places of ``clients``, such that neighbours do as many steps, the last ones alike."""
        last = self._filled((self.sizes[clients] - 1) % self.batch_size + 1)
        return np.lexsort((-last, -self._per_epoch[clients], -self.num_steps[clients]))

    def draw(self, clients: Indices, *, seed: int, round_index: int) -> Iterator[list[Picked]]:
        """The batches of some clients, step by step.

        Args:
            clients: Best in the order of :meth:`order`.
            seed: Of the run.
            round_index: Of the training.
        """
        totals, sizes = self.num_steps[clients], self.sizes[clients]
        per_epoch = np.maximum(self._per_epoch[clients], 1)
        table = np.zeros((len(clients), int(sizes.max(initial=0))), np.int64)
        for row, client in enumerate(clients.tolist()):
            table[row, : sizes[row]] = self._shares[client]
        examples = np.empty_like(table)
        self._words.begin(seed, round_index)
        for step in range(int(totals.max(initial=0))):
            within = step % per_epoch
            rows = np.flatnonzero((within == 0) & (step < totals))
            if len(rows):
                epochs = step // per_epoch[rows]
                order = self._words.permutations(clients[rows], epochs, sizes[rows], table.shape[1])
                examples[rows] = np.take_along_axis(table[rows], order, axis=1)
            begins = within * self.batch_size
            counts = np.minimum(self.batch_size, sizes - begins) * (step < totals)
            yield [
                _pick(examples, rows, begins, counts, filled)
                for rows, filled in _runs(self._filled(counts))
            ]

    def _filled(self, counts: Indices) -> Indices:
        return -(-counts // self._granule) * self._granule


class _Words:
    """Random words by seed, round, client and epoch: the key and the counter of a Philox."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._state = self._philox.state  # setting it costs a third of making another generator

    def begin(self, seed: int, round_index: int) -> None:
        """What follows is of this seed and round."""
        self._state["state"]["key"][:] = (derive_seed("simulation.batches", seed), round_index)

    def permutations(
        self, clients: Indices, epochs: Indices, sizes: Indices, width: int
    ) -> Indices:
        """A row each, (n, width): a permutation of as many places as its size, then the others."""
        words = np.full((len(clients), width), _LAST, np.uint64)
        rows = zip(clients.tolist(), epochs.tolist(), sizes.tolist(), strict=True)
        for row, (client, epoch, size) in enumerate(rows):
            self._state["state"]["counter"][:] = (0, epoch, client, 0)
            self._philox.state = self._state
            words[row, :size] = self._philox.random_raw(size)
        return words.argsort(axis=1, kind="stable")


def _runs(filled: Indices) -> Iterator[tuple[slice, int]]:
    """Neighbours whose batches are filled up to the same size; without those that have none."""
    cuts = np.flatnonzero(np.diff(filled)) + 1
    bounds = [0, *cuts.tolist(), len(filled)]
    for begin, end in itertools.pairwise(bounds):
        if filled[begin]:
            yield slice(begin, end), int(filled[begin])


def _pick(examples: Indices, rows: slice, begins: Indices, counts: Indices, filled: int) -> Picked:
    place = np.arange(filled)
    own = place < counts[rows, None]
    columns = np.where(own, begins[rows, None] + place, begins[rows, None])
    picked = np.take_along_axis(examples[rows], columns, axis=1)
    shares = own / counts[rows, None].astype(np.float32)
    return Picked(rows, torch.from_numpy(picked), torch.from_numpy(shares.astype(np.float32)))
