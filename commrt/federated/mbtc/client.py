"""A client of MBTC: codes an update without knowing any other."""

import math
import struct
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from commrt.codecs.code_tables import NUM_PHASES
from commrt.codecs.entropy import count_codes, encode_codes, fit_rows
from commrt.errors import ConfigError
from commrt.federated.layout import Layout
from commrt.federated.mbtc import coding, planes, side
from commrt.federated.mbtc.coding import Coding
from commrt.federated.mbtc.parameters import (
    LEAST_STEP,
    MOST_STEP,
    NUM_CLASSES,
    Parameters,
)
from commrt.federated.mbtc.requests import read_request
from commrt.federated.mbtc.side import History, Sources
from commrt.federated.uplink import Client
from commrt.federated.wire import Kind, seal, unseal
from commrt.ops.dither import SECOND_MOMENT

if TYPE_CHECKING:
    from commrt.federated.mbtc.spec import Mbtc

MOST_MAGNITUDE = 2.0**60
# Ten bits a weight.
MOST_TOO_FINE = 1024


class _Sent(NamedTuple):
    """What may be asked for once more."""

    round_index: int
    parameters: Parameters
    codes: Tensor
    rows: Tensor


class MbtcClient(Client):
    """See :class:`commrt.federated.mbtc.spec.Mbtc`."""

    def __init__(self, codec: "Mbtc", layout: Layout, client: int, seed: int) -> None:
        self._codec, self._layout, self._client, self._seed = codec, layout, client, seed
        self._history: History | None = None
        self._sent: _Sent | None = None

    def encode(
        self, round_index: int, update: Tensor, parameters: bytes, previous: Tensor | None = None
    ) -> bytes:
        """See :meth:`Client.encode`.

        Where no step was told, or one that is useless, since an element is too far from its
        prediction or all are much larger than they were before, the client chooses one.

        Raises:
            ConfigError: As there; or an element is larger than 2**60.
        """
        update = self._layout.check(update, "update")
        worst = _magnitude(update)
        if worst > MOST_MAGNITUDE:
            raise ConfigError(
                f"update has an element of {worst:g}: must be within {MOST_MAGNITUDE:g}"
            )
        told = self._told(round_index, parameters)
        sources, digests = self._sources(told, previous)
        coefficients, energy = side.fit(self._layout, update, sources)
        predicted = side.prediction(self._layout, sources, coefficients)
        step, own = told.step, self._own_step(energy)
        least = self._least_step(update, predicted)
        is_useless = step < max(least, own / MOST_TOO_FINE)
        chosen = told.tables is None or sources.is_empty or is_useless
        if is_useless:
            step = max(own, least)
        tables = torch.zeros(len(coefficients), NUM_CLASSES, dtype=torch.int16)
        if not chosen:
            assert told.tables is not None
            tables = told.tables
        dither = coding.dither_seed(self._seed, round_index, self._client)
        how = coding.coding(self._codec, self._layout, sources, predicted, tables, step, dither)
        codes = how.quantise(update)
        if chosen:
            tables = self._own_tables(how, codes)
            how = coding.coding(self._codec, self._layout, sources, predicted, tables, step, dither)
        self._sent = _Sent(round_index, told, codes, how.rows)
        if self._codec.memory:
            self._history = how.remember(how.dequantise(codes))
        body = b"".join(
            (
                self._head(sources, step, tables if chosen else None),
                side.pack(coefficients, sources),
                self._cosets(told, codes),
                self._alone(told, codes, how),
            )
        )
        return seal(Kind.UPDATE, round_index, body, self._context(round_index, *digests))

    @property
    def may_be_asked(self) -> bool:
        """Whether anything was left for the other clients' updates to tell."""
        return self._sent is not None and any(self._sent.parameters.planes)

    def answer(self, request: bytes) -> bytes:
        """See :meth:`Client.answer`."""
        if self._sent is None:
            raise ConfigError("a request before the first update: nothing was sent")
        sent, index = self._sent, self._sent.round_index
        body = unseal(Kind.REQUEST, index, request, self._context(index))
        answers = []
        for wanted in read_request(body, self._layout, sent.parameters.planes, self._codec.block):
            begin = self._layout.groups[wanted.group].begin + wanted.block * self._codec.block
            part = slice(begin, begin + self._codec.block)
            if wanted.is_whole:
                answers.append(encode_codes(sent.codes[part], sent.rows[part]))
                answers[-1] = struct.pack("<I", len(answers[-1])) + answers[-1]
                continue
            plane = sent.parameters.planes[wanted.group][wanted.plane]
            more = planes.encode_more(
                sent.codes[part], wanted.plane, plane, wanted.first, wanted.num_bits
            )
            answers.append(more)
        context = self._context(index, zlib.crc32(body))
        return seal(Kind.ANSWER, index, b"".join(answers), context)

    def state_dict(self) -> dict[str, Any]:
        """The last update, if the client keeps it."""
        return {} if self._history is None else self._history.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Client.load_state_dict`."""
        self._history = History.of(state, self._layout) if state else None

    def _told(self, round_index: int, frame: bytes) -> Parameters:
        body = unseal(Kind.PARAMETERS, round_index, frame, self._context(round_index))
        return Parameters.unpack(body, len(self._layout.groups), self._codec.block)

    def _sources(self, told: Parameters, previous: Tensor | None) -> tuple[Sources, list[int]]:
        """What to predict from, and by which digests the server finds out that it has the same."""
        if previous is not None:
            previous = self._layout.check(previous, "previous") if told.has_previous else None
        own = self._history
        if own is None or told.history != own.tag:
            return Sources(previous, None), [side.digest(previous), 0]
        return Sources(previous, own.decoded), [side.digest(previous), own.digest]

    def _least_step(self, update: Tensor, predicted: Tensor) -> float:
        """With which no code is too large."""
        largest = _magnitude(update - predicted)
        return max(LEAST_STEP, largest / coding.MOST_STEPS[self._codec.lattice])

    def _own_step(self, energy: float) -> float:
        nmse, bits = self._codec.nmse, self._codec.bits
        if nmse is None:
            assert bits is not None
            nmse = 2 * 4.0**-bits
        return min(MOST_STEP, math.sqrt(energy * nmse / SECOND_MOMENT[self._codec.lattice]))

    def _own_tables(self, how: Coding, codes: Tensor) -> Tensor:
        """One table for each group, whatever the class."""
        whole, contexts = how.scalar(codes)
        counts = [
            count_codes(group.of(whole), group.of(contexts) % NUM_PHASES, 1)
            for group in self._layout.groups
        ]
        return fit_rows(torch.cat(counts))[:, None].expand(-1, NUM_CLASSES).contiguous()

    def _head(self, sources: Sources, step: float, chosen: Tensor | None) -> bytes:
        flags = (
            coding.USES_PREVIOUS * (sources.previous is not None)
            | coding.USES_OWN * (sources.own is not None)
            | coding.CHOSEN * (chosen is not None)
        )
        if chosen is None:
            return bytes((flags,))
        firsts = (chosen[:, 0] // NUM_PHASES).tolist()
        return struct.pack(f"<Bf{len(firsts)}H", flags, step, *firsts)

    def _cosets(self, told: Parameters, codes: Tensor) -> bytes:
        return b"".join(
            planes.encode_blocks(group.of(codes), each, self._codec.block)
            for group, each in zip(self._layout.groups, told.planes, strict=True)
            if each
        )

    def _alone(self, told: Parameters, codes: Tensor, how: Coding) -> bytes:
        parts = coding.coded_alone(self._layout, told.planes, self._codec.block)
        return how.encode(codes, parts)

    def _context(self, round_index: int, *known: int) -> bytes:
        return coding.context(
            self._codec, self._layout, self._seed, round_index, self._client, *known
        )


def _magnitude(flat: Tensor) -> float:
    """Of the largest element."""
    return max(abs(float(value)) for value in flat.aminmax())
