"""The codec's settings, and the two ends that it makes."""

import dataclasses
import functools
from collections.abc import Sequence

from torch import Tensor

from commrt.errors import ConfigError
from commrt.federated.layout import Layout
from commrt.federated.mbtc.client import MbtcClient
from commrt.federated.mbtc.encoding import encode_all
from commrt.federated.mbtc.rate import MOST_BITS
from commrt.federated.mbtc.server import MbtcServer
from commrt.federated.peers import ALONE, Peers
from commrt.federated.uplink import Client, Uplink
from commrt.ops.dither import LATTICES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mbtc(Uplink):
    """Modified Berger-Tung coding: separate encoding, joint decoding.

    Each update is predicted from what both ends know, quantised with a subtractive dither, and its
    codes are sent at the rate that their tables, or what other clients sent, leave to say.

    Attributes:
        nmse: Distortion to have: energy of the mean's error over ``sum_k w_k^2 |update_k|^2``, w
            the shares of the mean. Where shares and updates are alike, each update has this one,
            and, since the error is unbiased, the mean of K clients 1 / K of it.
        bits: Or the uplink bits a weight and client to spend, everything counted, on average over
            the clients. One of the two.
        memory: Whether a client, and the server for it, keeps its last update, 2 bytes a weight.
            A client that is not restarted has the one before as well, in case it encodes again.
        lattice: Of the quantizer: ``"z"``, the integers, or ``"e8"``, which takes 0.1 bits less at
            a bit and more, not with joint decoding.
        joint: ``"auto"``, joint decoding of a group where it is worth ``least_gain``: of bit planes
            in polar codes; ``"modulo"``, the same of codes modulo a power of two, which is cheaper
            to decode and saves less; ``"off"``, none. Cohorts of up to 64 clients.
        combine: ``"mean"``, unbiased; ``"lmmse"``, the linear estimate of least error, which is
            biased towards what was predicted: the report has ``alignment``, its expected share.
            Cohorts of up to 64 clients.
        block: Weights that are decoded together, a power of two from 256 to 65536.
        anchors: Clients that are decoded without the others; None for one in eight, two at least.
        least_gain: Bits a weight that joint decoding must save.

    Raises:
        ConfigError: A value that is not allowed.

    Cost: besides what the tables say, a payload has about 10 bytes, and 2 a group of tensors.

    Source: the framework, separate encoding and joint decoding of a cohort's updates, is that of
    DSC-FL and MBTC, IEEE Trans. Commun. 71(8), 2023 (arXiv 2204.10985); dithered lattices, polar
    codes and tables stand for its random codes.
    """

    nmse: float | None = None
    bits: float | None = None
    memory: bool = True
    lattice: str = "z"
    joint: str = "auto"
    combine: str = "mean"
    block: int = 16384
    anchors: int | None = None
    least_gain: float = 0.15

    def __post_init__(self) -> None:
        if (self.nmse is None) == (self.bits is None):
            raise ConfigError(f"nmse={self.nmse}, bits={self.bits}: one of them must be given")
        for name, most in (("nmse", 1e4), ("bits", MOST_BITS)):
            value = getattr(self, name)
            if value is None:
                continue
            if not 0 < value <= most:
                raise ConfigError(f"{name}={value!r}: must be in (0, {most:g}]")
            object.__setattr__(self, name, float(value))  # equal codecs have equal specs
        if self.lattice not in LATTICES:
            raise ConfigError(f"lattice={self.lattice!r}: must be one of {LATTICES}")
        if self.lattice == "e8" and self.joint != "off":
            raise ConfigError(f"lattice='e8' with joint={self.joint!r}: must be with joint=off")
        for name, allowed in (("joint", ("auto", "modulo", "off")), ("combine", ("mean", "lmmse"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be one of {allowed}")
        if self.block not in (1 << power for power in range(8, 17)):
            raise ConfigError(f"block={self.block}: must be a power of two from 256 to 65536")
        if self.anchors is not None and self.anchors < 1:
            raise ConfigError(f"anchors={self.anchors}: must be at least 1")
        if not self.least_gain >= 0:
            raise ConfigError(f"least_gain={self.least_gain!r}: must be at least 0")

    @functools.cached_property
    def spec(self) -> str:
        """``mbtc:key=value,...`` with what is not the default."""
        told = (
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )
        return "mbtc:" + ",".join(told)

    def client(self, layout: Layout, client: int, *, seed: int = 0) -> "MbtcClient":
        """See :meth:`Uplink.client`."""
        return MbtcClient(self, layout, client, seed)

    def encode(
        self,
        clients: Sequence[Client],
        round_index: int,
        updates: Tensor,
        parameters: Sequence[bytes],
        previous: Tensor | None = None,
    ) -> list[bytes]:
        """See :meth:`Uplink.encode`.

        Raises:
            ConfigError: As there; or a client is of another uplink or layout.
        """
        own = [client for client in clients if isinstance(client, MbtcClient)]
        kinds = {(client.codec, client.layout.digest) for client in own}
        if len(own) != len(clients) or len(kinds) > 1 or any(codec != self for codec, _ in kinds):
            raise ConfigError(f"clients of {len(kinds)} uplinks or layouts: must be of {self.spec}")
        if not own:
            return []
        return encode_all(self, own[0].layout, own, round_index, updates, parameters, previous)

    def server(self, layout: Layout, *, seed: int = 0, peers: Peers = ALONE) -> "MbtcServer":
        """See :meth:`Uplink.server`; it is shared by clients, and what is joint by blocks."""
        return MbtcServer(self, layout, seed, peers)
