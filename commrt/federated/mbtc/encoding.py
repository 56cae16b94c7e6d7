"""How clients of MBTC code their updates: several at once, each without knowing any other."""

import math
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from commrt.codecs.code_tables import NUM_PHASES
from commrt.codecs.entropy import count_codes, encode_vectors, fit_rows
from commrt.errors import ConfigError
from commrt.federated.layout import Layout, magnitude
from commrt.federated.mbtc import coding, planes, side
from commrt.federated.mbtc.coding import Coding, Codings
from commrt.federated.mbtc.parameters import LEAST_STEP, MOST_STEP, NUM_CLASSES, Parameters
from commrt.federated.mbtc.side import History, Sources
from commrt.federated.wire import Kind, check_of, seal
from commrt.ops.dither import SECOND_MOMENT

if TYPE_CHECKING:
    from commrt.federated.mbtc.client import MbtcClient
    from commrt.federated.mbtc.spec import Mbtc

MOST_MAGNITUDE = 2.0**60
# Ten bits a weight.
MOST_TOO_FINE = 1024
# Of codes that a step does not make too large; 2**15 could not be sent.
MOST_USEFUL = 32000


class Draft(NamedTuple):
    """An update that is about to be encoded.

    Attributes:
        client: Whose.
        told: What it was told.
        sources: To predict from.
        digests: By which the server finds out that it has the same.
        seed: Of the dither.
    """

    client: "MbtcClient"
    told: Parameters
    sources: Sources
    digests: tuple[int, int]
    seed: int


class Sent(NamedTuple):
    """What may be asked for once more.

    Attributes:
        round_index: In which it was sent.
        parameters: That the client was told.
        codes: int16 (N,).
        rows: Of the tables of each.
        check: Of the payload, by which a request names it.
    """

    round_index: int
    parameters: Parameters
    codes: Tensor
    rows: Tensor
    check: int


def encode_all(
    codec: "Mbtc",
    layout: Layout,
    clients: Sequence["MbtcClient"],
    round_index: int,
    updates: Tensor,
    parameters: Sequence[bytes],
    previous: Tensor | None,
) -> list[bytes]:
    """The payload of each client, as of :meth:`commrt.federated.uplink.Uplink.encode`.

    Raises:
        ConfigError: As there; or an element is larger than 2**60.
    """
    updates = layout.check(updates, "update", count=len(clients))
    worst = magnitude(updates)
    if worst > MOST_MAGNITUDE:
        raise ConfigError(f"update has an element of {worst:g}: must be within {MOST_MAGNITUDE:g}")
    if previous is not None:
        previous = layout.check(previous, "previous")
    digest = side.digest(previous)
    drafts = [
        client.draft(round_index, frame, previous, digest)
        for client, frame in zip(clients, parameters, strict=True)
    ]
    payloads = list[bytes]()
    for some in coding.batches(drafts, layout.numel, lambda draft: draft.sources.previous is None):
        part = updates[len(payloads) : len(payloads) + len(some)]
        payloads += _Encoding(codec, layout, round_index, some, part).payloads()
    return payloads


class _Encoding:
    """Updates (K, N) that have the same ``previous``, coded as told where that serves."""

    def __init__(
        self,
        codec: "Mbtc",
        layout: Layout,
        round_index: int,
        drafts: Sequence[Draft],
        updates: Tensor,
    ) -> None:
        self._codec, self._layout, self._round_index = codec, layout, round_index
        self._drafts, self._updates = drafts, updates
        own = [draft.sources.own for draft in drafts]
        self._fit = side.fit(layout, updates, drafts[0].sources.previous, own)
        self._payloads = [b""] * len(drafts)

    def payloads(self) -> list[bytes]:
        told = [place for place in range(len(self._drafts)) if self._is_told(place)]
        useless = self._as_told(told) if told else []
        choosing = sorted({*range(len(self._drafts))} - {*told} | {*useless})
        if choosing:
            self._as_chosen(choosing)
        return self._payloads

    def _is_told(self, place: int) -> bool:
        """Whether a client was told what it can be coded with, as far as its energy says."""
        told, sources = self._drafts[place].told, self._drafts[place].sources
        is_whole = told.tables is not None and not sources.is_empty
        return is_whole and told.step >= max(LEAST_STEP, self._own_step(place) / MOST_TOO_FINE)

    def _as_told(self, which: list[int]) -> list[int]:
        """Code these; those of them whose codes are too large."""
        tables = [self._drafts[place].told.tables for place in which]
        steps = [self._drafts[place].told.step for place in which]
        how = self._codings(which, steps, [table for table in tables if table is not None])
        codes, histories = how.quantise(self._some(which), keep=self._codec.memory)
        least, most = (int(each) for each in codes.aminmax())
        useless = set[int]()
        if max(-least, most) >= MOST_USEFUL:
            useless = {
                k for k, row in enumerate(codes) if int(row.int().abs().max()) >= MOST_USEFUL
            }
        self._finish(which, how, codes, histories, but=useless)
        return [which[k] for k in useless]

    def _as_chosen(self, which: list[int]) -> None:
        """Code these with tables of their own, and steps where those that were told are useless."""
        updates = self._some(which)
        blank = torch.zeros(len(self._layout.groups), NUM_CLASSES, dtype=torch.int16)
        predicted = self._codings(which, [1.0] * len(which), [blank] * len(which)).predicted
        largest = (updates - predicted).abs().amax(dim=1).tolist()
        steps = [self._step(place, far) for place, far in zip(which, largest, strict=True)]
        how = self._codings(which, steps, [blank] * len(which))
        codes, _ = how.quantise(updates, keep=False)
        tables = [self._own_tables(how[k], codes[k]) for k in range(len(which))]
        how = self._codings(which, steps, tables)
        codes, histories = how.quantise(updates, keep=self._codec.memory)
        self._finish(which, how, codes, histories, tables=tables)

    def _finish(
        self,
        which: list[int],
        how: Codings,
        codes: Tensor,
        histories: Sequence[History],
        *,
        tables: Sequence[Tensor] = (),
        but: Iterable[int] = (),
    ) -> None:
        """Write payloads, with the tables if they were chosen, and let the clients remember."""
        alone = self._alone(which, how, codes)
        for k, place in enumerate(which):
            if k in but:
                continue
            draft, sources = self._drafts[place], self._drafts[place].sources
            body = b"".join(
                (
                    _head(sources, how.steps[k], tables[k] if tables else None),
                    side.pack(self._fit.coefficients[place], sources),
                    self._cosets(draft.told, codes[k]),
                    alone[k],
                )
            )
            context = draft.client.context(self._round_index, *draft.digests)
            payload = seal(Kind.UPDATE, self._round_index, body, context)
            self._payloads[place] = payload
            sent = Sent(self._round_index, draft.told, codes[k], how.rows[k], check_of(payload))
            draft.client.remember(sent, histories[k] if histories else None)

    def _some(self, which: list[int]) -> Tensor:
        return self._updates if len(which) == len(self._updates) else self._updates[which]

    def _codings(self, which: list[int], steps: list[float], tables: list[Tensor]) -> Codings:
        drafts = [self._drafts[place] for place in which]
        return Codings(
            self._codec.lattice,
            self._layout,
            drafts[0].sources.previous,
            [draft.sources.own for draft in drafts],
            coefficients=self._fit.coefficients[which],
            tables=tables,
            steps=steps,
            seeds=[draft.seed for draft in drafts],
        )

    def _step(self, place: int, largest: float) -> float:
        """As told, unless that is useless for residuals of up to ``largest``."""
        told, own = self._drafts[place].told.step, self._own_step(place)
        least = max(LEAST_STEP, largest / coding.MOST_STEPS[self._codec.lattice])
        return max(own, least) if told < max(least, own / MOST_TOO_FINE) else told

    def _own_step(self, place: int) -> float:
        nmse, bits = self._codec.nmse, self._codec.bits
        if nmse is None:
            assert bits is not None
            nmse = 2 * 4.0**-bits
        energy = self._fit.energies[place]
        return min(MOST_STEP, math.sqrt(energy * nmse / SECOND_MOMENT[self._codec.lattice]))

    def _own_tables(self, how: Coding, codes: Tensor) -> Tensor:
        """One table for each group, whatever the class."""
        whole, contexts = how.scalar(codes)
        counts = [
            count_codes(group.of(whole), group.of(contexts) % NUM_PHASES, 1)
            for group in self._layout.groups
        ]
        return fit_rows(torch.cat(counts))[:, None].expand(-1, NUM_CLASSES).contiguous()

    def _cosets(self, told: Parameters, codes: Tensor) -> bytes:
        return b"".join(
            planes.encode_blocks(group.of(codes), each, self._codec.block)
            for group, each in zip(self._layout.groups, told.planes, strict=True)
            if each
        )

    def _alone(self, which: list[int], how: Codings, codes: Tensor) -> list[bytes]:
        """The codes of each that are not sent as cosets."""
        told = [self._drafts[place].told for place in which]
        if how.lattice == "z" and not any(any(each.planes) for each in told):
            return encode_vectors(codes, how.rows)
        return [
            how[k].encode(
                codes[k], coding.coded_alone(self._layout, each.planes, self._codec.block)
            )
            for k, each in enumerate(told)
        ]


def _head(sources: Sources, step: float, chosen: Tensor | None) -> bytes:
    flags = (
        coding.USES_PREVIOUS * (sources.previous is not None)
        | coding.USES_OWN * (sources.own is not None)
        | coding.CHOSEN * (chosen is not None)
    )
    if chosen is None:
        return bytes((flags,))
    firsts = (chosen[:, 0] // NUM_PHASES).tolist()
    return struct.pack(f"<Bf{len(firsts)}H", flags, step, *firsts)
