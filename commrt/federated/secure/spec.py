"""The codec's settings, its step, and the two ends that it makes."""

import dataclasses
import math

from commrt.codecs import derive_seed
from commrt.errors import ConfigError
from commrt.federated.independent import MOST_CLIENTS
from commrt.federated.layout import Layout
from commrt.federated.peers import ALONE, Peers
from commrt.federated.secure.client import SecureClient
from commrt.federated.secure.ends import Ends, Pairs
from commrt.federated.secure.server import SecureServer
from commrt.federated.uplink import Uplink

MOST_BITS = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecureUplink(Uplink):
    """Secure aggregation: the server learns the cohort's sum.

    Updates are rotated at random, so that their elements are nearly normal, and the step is the
    smallest at which an element of the sum leaves the range of M steps, and so comes out wrong by
    all of it, with a probability of at most ``failure``: with n the norm, N elements, K clients,

        step * M / 2 = z sqrt(K n^2 (1 + (K - 1) correlation) / N + K step^2 / 12),
        2 exp(-z^2 / 2) = failure.

    Nobody can see whether an element did. The report's ``load`` is the root mean square of the sum
    over the one designed for: above 1, updates were larger or more alike than was said, and
    ``failure`` does not hold.

    Weights of the mean are equal: who has more to say would have to say so.

    Attributes:
        bits: An element, ``log2 M``; from 1 to 24.
        norm: L2 norm of a client's update, less what is predicted: the root of the mean square
            over the cohort that is designed for. Nothing is clipped to it.
        correlation: The most of any two clients, from 0 to 1, where it always holds.
        failure: See above; above 0 and below 1.
        predict: How much of the global update of the round before is subtracted before coding, and
            added by the server.
        least: Updates without which clients reveal nothing, and the round cannot be decoded; at
            least 2. Who is asked in a cohort of fewer sends what nobody can ever read.

    Raises:
        ConfigError: A value out of range.

    Cost: ``bits`` an element and 6 bytes, and for each client that drops out 8 bytes from each that
    does not. With 16 clients and no correlation, 4 bits have the error that independent coding has
    with 0.74, and 5 bits that of 1.76: codes that nobody can read cannot be entropy coded, and M
    has to hold the sum. A client draws K - 1 masks.

    Source: see :mod:`commrt.federated.secure`; the tail of rotated elements is Hoeffding's, to the
    letter where N is a power of two.
    """

    bits: int
    norm: float
    correlation: float = 1.0
    failure: float = 1e-5
    predict: float = 0.0
    least: int = 2

    def __post_init__(self) -> None:
        for name in ("norm", "correlation", "failure", "predict"):
            object.__setattr__(self, name, float(getattr(self, name)))
        self._require("bits", 1 <= self.bits <= MOST_BITS, f"from 1 to {MOST_BITS}")
        self._require("norm", 1e-20 <= self.norm <= 1e20, "from 1e-20 to 1e20")
        self._require("correlation", 0 <= self.correlation <= 1, "from 0 to 1")
        self._require("failure", 0 < self.failure < 1, "above 0 and below 1")
        self._require("predict", 0 <= self.predict <= 1, "from 0 to 1")
        self._require("least", 2 <= self.least <= MOST_CLIENTS, "at least 2")

    @property
    def spec(self) -> str:
        """``secure:key=value,...`` with what is not the default."""
        told = (
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )
        return "secure:" + ",".join(told)

    @property
    def modulus(self) -> int:
        """M."""
        return 1 << self.bits

    @property
    def reach(self) -> float:
        """z: half the range in standard deviations of an element of the sum."""
        return math.sqrt(2 * math.log(2 / self.failure))

    def step(self, num_clients: int, numel: int) -> float:
        """The quantizer's, for a cohort.

        Raises:
            ConfigError: So many clients that their dithers alone fill M.
        """
        if num_clients > MOST_CLIENTS:
            raise ConfigError(f"a cohort of {num_clients}: must be of {MOST_CLIENTS} at most")
        room = self.modulus**2 / 4 - self.reach**2 * num_clients / 12
        if room <= 0:
            enough = math.floor(math.log2(self.reach * math.sqrt(num_clients / 3))) + 1
            raise ConfigError(
                f"bits={self.bits} with a cohort of {num_clients} and failure={self.failure}: "
                f"must be at least {enough}"
            )
        together = num_clients * (1 + (num_clients - 1) * self.correlation)
        return self.reach * self.norm * math.sqrt(together / numel / room)

    def client(
        self, layout: Layout, client: int, *, seed: int = 0, pairs: Pairs | None = None
    ) -> "SecureClient":
        """See :meth:`Uplink.client`.

        Args:
            layout: Of the updates.
            client: Its number.
            seed: Of dithers and rotation, which the server has as well.
            pairs: The client's secrets; default, dealt from the seed.
        """
        return SecureClient(Ends(self, layout, seed), client, pairs or _dealt(seed, client))

    def server(self, layout: Layout, *, seed: int = 0, peers: Peers = ALONE) -> "SecureServer":
        """See :meth:`Uplink.server`; it is not shared."""
        del peers
        return SecureServer(Ends(self, layout, seed))

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"{name}={getattr(self, name)!r}: must be {allowed}")


def _dealt(seed: int, client: int) -> Pairs:
    return lambda other: derive_seed("secure pair", seed, *sorted((client, other)))
