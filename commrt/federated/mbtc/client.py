"""A client of MBTC: codes an update without knowing any other."""

import struct
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from commrt.codecs.entropy import encode_codes
from commrt.errors import ConfigError
from commrt.federated.layout import Layout
from commrt.federated.mbtc import coding, planes
from commrt.federated.mbtc.encoding import Draft, Sent, encode_all
from commrt.federated.mbtc.parameters import Parameters
from commrt.federated.mbtc.requests import read_request
from commrt.federated.mbtc.side import History, Sources
from commrt.federated.uplink import Client
from commrt.federated.wire import Kind, seal, unseal

if TYPE_CHECKING:
    from commrt.federated.mbtc.spec import Mbtc


class MbtcClient(Client):
    """See :class:`commrt.federated.mbtc.spec.Mbtc`."""

    def __init__(self, codec: "Mbtc", layout: Layout, client: int, seed: int) -> None:
        self.codec, self.layout, self._client, self._seed = codec, layout, client, seed
        self._history: History | None = None
        # As it was before the round encoded last, in case that is encoded again.
        self._before: History | None = None
        self._sent: Sent | None = None

    def encode(
        self, round_index: int, update: Tensor, parameters: bytes, previous: Tensor | None = None
    ) -> bytes:
        """See :meth:`Client.encode`.

        Where no step was told, or one that is useless, since an element is too far from its
        prediction or all are much larger than they were before, the client chooses one.

        Raises:
            ConfigError: As there; or an element is larger than 2**60.
        """
        [payload] = encode_all(
            self.codec, self.layout, [self], round_index, update[None], [parameters], previous
        )
        return payload

    def draft(self, round_index: int, frame: bytes, previous: Tensor | None, digest: int) -> Draft:
        """What it has of a round before it encodes its update.

        Args:
            round_index: The round.
            frame: What the server's ``begin`` returned for this client.
            previous: The global update of the round before, if known.
            digest: Of that.
        """
        body = unseal(Kind.PARAMETERS, round_index, frame, self.context(round_index))
        told = Parameters.unpack(body, len(self.layout.groups), self.codec.block)
        if not told.has_previous:
            previous, digest = None, 0
        own = self._before if self._has_sent(round_index) else self._history
        if own is not None and told.history != own.tag:
            own = None
        return Draft(
            self,
            told,
            Sources(previous, None if own is None else own.decoded),
            (digest, 0 if own is None else own.digest),
            coding.dither_seed(self._seed, round_index, self._client),
        )

    def remember(self, sent: Sent, history: History | None) -> None:
        """What was encoded, and what is kept of it if anything is."""
        if not self._has_sent(sent.round_index):
            self._before = self._history
        self._sent = sent
        if history is not None:
            self._history = history

    def _has_sent(self, round_index: int) -> bool:
        return self._sent is not None and self._sent.round_index == round_index

    def context(self, round_index: int, *known: int) -> bytes:
        """Of its frames."""
        return coding.context(
            self.codec, self.layout, self._seed, round_index, self._client, *known
        )

    @property
    def may_be_asked(self) -> bool:
        """Whether anything was left for the other clients' updates to tell."""
        return self._sent is not None and any(self._sent.parameters.planes)

    def answer(self, request: bytes) -> bytes:
        """See :meth:`Client.answer`."""
        if self._sent is None:
            raise ConfigError("a request before the first update: nothing was sent")
        sent, index = self._sent, self._sent.round_index
        body = unseal(Kind.REQUEST, index, request, self.context(index, sent.check))
        answers = []
        for wanted in read_request(body, self.layout, sent.parameters.planes, self.codec.block):
            begin = self.layout.groups[wanted.group].begin + wanted.block * self.codec.block
            part = slice(begin, begin + self.codec.block)
            if wanted.is_whole:
                answers.append(encode_codes(sent.codes[part], sent.rows[part]))
                answers[-1] = struct.pack("<I", len(answers[-1])) + answers[-1]
                continue
            plane = sent.parameters.planes[wanted.group][wanted.plane]
            more = planes.encode_more(
                sent.codes[part], wanted.plane, plane, wanted.first, wanted.num_bits
            )
            answers.append(more)
        context = self.context(index, zlib.crc32(body))
        return seal(Kind.ANSWER, index, b"".join(answers), context)

    def state_dict(self) -> dict[str, Any]:
        """The last update, if the client keeps it."""
        return {} if self._history is None else self._history.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Client.load_state_dict`."""
        self._history = History.of(state, self.layout) if state else None
        self._before = self._sent = None
