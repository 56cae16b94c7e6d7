"""Jointly Gaussian updates seen through independent noise: what the pillar's numerics stand on.

A coordinate, of one layer or block (zero mean)::

    X = F z + e,    z ~ N(0, I_r),  e_k ~ N(0, unique_k)       the clients' updates
    U_k = X_k + Z_k,                Z_k ~ N(0, 1 / precision_k)  what the server decodes

A dense covariance is F F^T with nothing unique; a factor model of rank r costs O(K r^2) where that
costs O(K^3). Nothing is inverted that may be singular, and nothing small is a difference: precision
may be 0 (a silent client) or as large as float64 holds.

Arrays are numpy's, cupy's, or of another library that follows the array API standard (2024.12, with
linear algebra); what is computed is float64 of that library. Not all of the standard is used: numpy
2.4 and cupy 14 sort in ascending order only, and cupy.linalg has no diagonal.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from commrt.errors import ConfigError

Array = Any

_ASYMMETRY = 1e-6  # of the largest element: more is a mistake, not rounding


def array_namespace(array: Array) -> Any:
    """The functions of an array's library.

    Raises:
        ConfigError: It is no array, or its library does not follow the array API standard.
    """
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    library = type(array).__module__.partition(".")[0]
    if library == "cupy":  # whose arrays do not say that its functions follow the standard
        return sys.modules[library]
    raise ConfigError(f"{type(array).__name__} given: must be an array of numpy or cupy")


def diagonal(matrix: Array) -> Array:
    """Of square matrices (..., n, n): (..., n)."""
    xp = array_namespace(matrix)
    return xp.sum(matrix * xp.eye(matrix.shape[-1], dtype=xp.float64), axis=-1)


@dataclasses.dataclass(frozen=True)
class FactorCovariance:
    """``factor factor^T + diag(unique)``: positive semidefinite however its parts are rounded.

    Attributes:
        factor: float64 (..., K, r).
        unique: float64 (..., K), at least 0: variance that a client shares with no other.
    """

    factor: Array
    unique: Array

    @property
    def variances(self) -> Array:
        """The diagonal, (..., K)."""
        return self.unique + array_namespace(self.factor).sum(self.factor**2, axis=-1)

    @property
    def is_diagonal(self) -> bool:
        """Whether no client tells anything of another."""
        return not bool(array_namespace(self.factor).any(self.factor != 0))

    def dense(self) -> Array:
        """The matrix, (..., K, K)."""
        xp = array_namespace(self.factor)
        eye = xp.eye(self.unique.shape[-1], dtype=xp.float64)
        return self.factor @ xp.matrix_transpose(self.factor) + eye * self.unique[..., None]

    def times(self, vector: Array) -> Array:
        """The matrix times a vector (K,): (..., K)."""
        return self.unique * vector + (self.factor @ self._shared(vector)[..., None])[..., 0]

    def quadratic(self, vector: Array) -> Array:
        """``vector^T matrix vector`` of a vector (K,), as a sum of squares: (...)."""
        xp = array_namespace(self.factor)
        alone = xp.sum(self.unique * vector**2, axis=-1)
        return alone + xp.sum(self._shared(vector) ** 2, axis=-1)

    def _shared(self, vector: Array) -> Array:
        return array_namespace(self.factor).matrix_transpose(self.factor) @ vector


def factored(covariance: Array | FactorCovariance) -> FactorCovariance:
    """A covariance in factors; a dense one by its eigenvectors, eigenvalues below 0 being rounding.

    Args:
        covariance: (K, K), symmetric and positive semidefinite; or a factor model, returned as is.

    Raises:
        ConfigError: It is neither.
    """
    if isinstance(covariance, FactorCovariance):
        return covariance
    xp = array_namespace(covariance)
    shape = covariance.shape
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ConfigError(f"covariance has shape {shape}: must be (K, K)")
    matrix = xp.astype(covariance, xp.float64)
    largest = float(xp.max(xp.abs(matrix)))
    # Of a matrix with NaN or infinity the comparison is false.
    if not float(xp.max(xp.abs(matrix - matrix.T))) <= _ASYMMETRY * largest:
        raise ConfigError("covariance must be finite and symmetric")
    values, vectors = xp.linalg.eigh((matrix + matrix.T) / 2)
    if float(values[0]) < -_ASYMMETRY * largest:
        raise ConfigError(
            f"covariance has the eigenvalue {float(values[0]):.3g}: must be positive semidefinite"
        )
    zeros = xp.zeros_like(values)
    return FactorCovariance(vectors * xp.sqrt(xp.where(values > 0, values, zeros)), zeros)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What U tells of X; made by :func:`see`.

    Attributes:
        model: Of X.
        precision: float64 (..., K).
        root: R with ``R^T R = I + F^T diag(known) F``, the inverse covariance of z given U.
    """

    model: FactorCovariance
    precision: Array
    root: Array

    @property
    def covariance(self) -> FactorCovariance:
        """Of X given U: ``(Sigma^-1 + diag(precision))^-1``, where Sigma^-1 need not exist."""
        xp = array_namespace(self.root)
        hidden = 1 + self.model.unique * self.precision
        left = xp.matrix_transpose(self.model.factor / hidden[..., None])
        factor = xp.linalg.solve(xp.matrix_transpose(self.root), left)
        return FactorCovariance(xp.matrix_transpose(factor), self.model.unique / hidden)

    @property
    def log_det(self) -> Array:
        """``ln det(I + Sigma diag(precision))``, twice I(X; U) in nats: (...)."""
        xp = array_namespace(self.root)
        alone = xp.sum(xp.log1p(self.model.unique * self.precision), axis=-1)
        return 2 * xp.sum(xp.log(xp.abs(diagonal(self.root))), axis=-1) + alone


def see(model: FactorCovariance, precision: Array) -> Seen:
    """X seen through noise.

    The root comes by QR, which does not square the condition number, of rows sorted by size:
    Householder's method is accurate by rows only then (Cox and Higham, 1998), and precisions may be
    orders apart.

    Args:
        model: Of K clients.
        precision: 1 / noise variance, float64 (..., K), at least 0; leading dimensions are a batch.
    """
    xp = array_namespace(precision)
    known = precision / (1 + model.unique * precision)
    rows = xp.sqrt(known)[..., None] * model.factor
    rank = rows.shape[-1]
    eye = xp.broadcast_to(xp.eye(rank, dtype=xp.float64), (*rows.shape[:-2], rank, rank))
    rows = xp.concat([rows, eye], axis=-2)
    largest_first = xp.argsort(-xp.sum(rows**2, axis=-1), axis=-1)
    index = xp.broadcast_to(largest_first[..., None], rows.shape)
    _, root = xp.linalg.qr(xp.take_along_axis(rows, index, axis=-2))
    return Seen(model, precision, root)


class Sight(NamedTuple):
    """A client about to be decoded, in each of B orders.

    Attributes:
        variance: Of its X given what was decoded before, (B,).
        unique: The part of it that no other client shares, (B,).
        spread: Covariance of z with its X given what was decoded before, (B, r).
        direction: The root's coordinates of its factor, (B, r).
    """

    variance: Array
    unique: Array
    spread: Array
    direction: Array


class Decoding:
    """Successive decoding, one client after the other, in B orders at once.

    Holds a square root of the covariance of z given what was decoded so far, and updates it by
    Potter's formula, so that no variance is a difference. A client costs O(B r^2).

    Args:
        model: Of the clients, without batch dimensions.
        num_orders: B.
    """

    def __init__(self, model: FactorCovariance, num_orders: int = 1) -> None:
        xp = array_namespace(model.factor)
        rank = model.factor.shape[1]
        self._model = model
        self._root = xp.broadcast_to(xp.eye(rank, dtype=xp.float64), (num_orders, rank, rank))

    def look(self, clients: Array) -> Sight:
        """What is known of the next clients before they are decoded.

        Args:
            clients: Integers (B,), one for each order.
        """
        xp = array_namespace(clients)
        factor = xp.take(self._model.factor, clients, axis=0)
        unique = xp.take(self._model.unique, clients, axis=0)
        direction = (factor[:, None, :] @ self._root)[:, 0, :]
        spread = (self._root @ direction[..., None])[..., 0]
        return Sight(unique + xp.sum(direction**2, axis=-1), unique, spread, direction)

    def learn(self, sight: Sight, precision: Array) -> Array:
        """Decodes them.

        Args:
            sight: Of the clients.
            precision: At which they are seen, (B,).

        Returns:
            The gain, (B, r): how the expectation of z moves with the surprise in U_k.
        """
        xp = array_namespace(precision)
        total = 1 + sight.variance * precision
        gain = (precision / total)[:, None] * sight.spread
        damping = 1 / (1 + xp.sqrt((1 + sight.unique * precision) / total))
        step = (damping[:, None] * gain)[..., None] * sight.direction[:, None, :]
        self._root = self._root - step
        return gain


def precision_of(noise: Array, like: Array) -> Array:
    """1 / noise, float64.

    Args:
        noise: (K,).
        like: Any array (K,).

    Raises:
        ConfigError: Not one positive number (infinity: silent) a client.
    """
    xp = array_namespace(noise)
    if noise.shape != like.shape:
        raise ConfigError(f"noise has shape {noise.shape}: must be {like.shape}")
    if not bool(xp.all(noise > 0)):
        raise ConfigError("noise must be positive, or infinity where a client is silent")
    return 1 / xp.astype(noise, xp.float64)


def weights_of(weights: Array | None, like: Array) -> Array:
    """Weights of the mean, float64 (K,): as given, or 1 / K each.

    Args:
        weights: (K,) or None.
        like: Any float64 array (K,) of the library.

    Raises:
        ConfigError: Not one finite number a client.
    """
    xp = array_namespace(like)
    if weights is None:
        return xp.ones_like(like) / like.shape[0]
    if weights.shape != like.shape or not bool(xp.all(xp.isfinite(weights))):
        raise ConfigError(f"weights must be {like.shape[0]} finite numbers, one a client")
    return xp.astype(weights, xp.float64)


def order_of(order: Sequence[int], like: Array) -> Array:
    """An order of decoding as an array of client numbers (K,).

    Args:
        order: All clients, the first to be decoded first.
        like: Any array (K,) of the library.

    Raises:
        ConfigError: It is no permutation of the clients.
    """
    num_clients = like.shape[0]
    if sorted(order) != list(range(num_clients)):
        raise ConfigError(f"order is {order}: must hold each of 0..{num_clients - 1} once")
    return array_namespace(like).asarray(order)
