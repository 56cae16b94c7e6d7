"""Gaussian cases and what is true of them, by textbook formulas: dense, slow, in plain numpy."""

import itertools

import array_api_strict
import numpy as np
import pytest

LIBRARIES = pytest.mark.parametrize(
    "xp", [pytest.param(np, id="numpy"), pytest.param(array_api_strict, id="strict")]
)


def random_covariance(num_clients: int, seed: int, rank: int | None = None) -> np.ndarray:
    factor = np.random.default_rng(seed).standard_normal((num_clients, rank or num_clients))
    return factor @ factor.T / factor.shape[1]


def equicorrelated(num_clients: int, rho: float, variance: float = 1.0) -> np.ndarray:
    return variance * (rho * np.ones((num_clients, num_clients)) + (1 - rho) * np.eye(num_clients))


def conditional(covariance, noise, client: int, decoded) -> tuple[np.ndarray, float]:
    """Weights of the decoded in the estimate of a client, and its variance given them."""
    others = list(decoded)
    seen = covariance[np.ix_(others, others)] + np.diag(noise[others])
    known = covariance[others, client]
    weights = np.linalg.solve(seen, known)
    return weights, covariance[client, client] - known @ weights


def information(covariance, noise, chosen) -> float:
    """``I(X_A; U_A)`` in bits."""
    chosen = list(chosen)
    ratio = covariance[np.ix_(chosen, chosen)] / noise[chosen]
    return 0.5 * np.log2(np.linalg.det(np.eye(len(chosen)) + ratio))


def subset_information(covariance, noise) -> np.ndarray:
    """``I(X_A; U_A | U_others)`` in bits for each set A, client k being bit k of its index."""
    num_clients = len(noise)
    everyone = set(range(num_clients))
    total = information(covariance, noise, everyone)
    sets = [{k for k in everyone if chosen >> k & 1} for chosen in range(2**num_clients)]
    return np.array([total - information(covariance, noise, everyone - found) for found in sets])


def subset_sums(rates) -> np.ndarray:
    chosen = np.arange(2 ** len(rates))[:, None] >> np.arange(len(rates)) & 1
    return chosen @ rates


def mean_error(covariance, noise, weights) -> float:
    """Of the linear estimate of least error."""
    known = covariance @ weights
    return weights @ known - known @ np.linalg.solve(covariance + np.diag(noise), known)


def corner_noise(covariance, rates, order) -> np.ndarray:
    """Noises of clients that use all their rate, decoded in an order."""
    noise = np.full(len(rates), np.inf)
    for i, client in enumerate(order):
        _, variance = conditional(covariance, noise, client, order[:i])
        noise[client] = variance / (2 ** (2 * rates[client]) - 1)
    return noise


def best_corner(covariance, rates, weights, *, unbiased: bool = False) -> float:
    """The least error of the mean over all K! orders."""

    def error(order) -> float:
        noise = corner_noise(covariance, rates, order)
        return weights**2 @ noise if unbiased else mean_error(covariance, noise, weights)

    return min(error(order) for order in itertools.permutations(range(len(rates))))
