"""Limits of coding Gaussian updates: printed tables, textbook formulas, exact arithmetic."""

import math
import sys
import types
from fractions import Fraction

import numpy as np
import pytest

from commrt.errors import ConfigError
from commrt.federated import limits
from commrt.federated.gaussian import FactorCovariance, array_namespace
from commrt.federated.limits import Symmetric
from tests.unit.gaussians import (
    LIBRARIES,
    conditional,
    equicorrelated,
    mean_error,
    random_covariance,
    subset_information,
    subset_sums,
)

# Bits a client, by K D and the number of clients K, at correlations .3 .6 .9 .99: of a Monte Carlo
# run whose K D differed from cell to cell in the digits not printed, which is worth .01 bit.
TABLE = {
    (1.04, 4): (0.25, 0.30, 0.27, 0.25),
    (1.04, 16): (0.37, 0.30, 0.18, 0.13),
    (1.04, 64): (0.38, 0.27, 0.11, 0.05),
    (0.109, 4): (1.57, 1.40, 0.98, 0.69),
    (0.109, 16): (1.53, 1.24, 0.66, 0.28),
    (0.109, 64): (1.48, 1.16, 0.53, 0.13),
    (0.0234, 4): (2.65, 2.42, 1.81, 1.12),
    (0.0234, 16): (2.56, 2.24, 1.41, 0.54),
    (0.0234, 64): (2.50, 2.13, 1.27, 0.34),
}


@pytest.mark.parametrize(("scaled", "num_clients"), TABLE)
def test_berger_tung_table(scaled: float, num_clients: int) -> None:
    row = TABLE[scaled, num_clients]
    for rho, printed in zip((0.3, 0.6, 0.9, 0.99), row, strict=True):
        limit = Symmetric(num_clients=num_clients, correlation=rho).limit(scaled / num_clients)
        assert limit == pytest.approx(printed, abs=0.0125)


@pytest.mark.parametrize(
    ("scaled", "shrunk", "unbiased"), [(1.04, 0, 0.49), (0.109, 1.60, 1.67), (0.0234, 2.71, 2.73)]
)
def test_independent_clients(scaled: float, shrunk: float, unbiased: float) -> None:
    for num_clients in (4, 16, 64):
        source = Symmetric(num_clients=num_clients, correlation=0.0)
        variances, distortion = np.ones(num_clients), scaled / num_clients
        for printed, kind in ((shrunk, False), (unbiased, True)):
            rates = limits.independent_rates(variances, distortion, unbiased=kind)
            assert rates == pytest.approx(printed, abs=0.005)
            assert source.limit(distortion, unbiased=kind) == pytest.approx(rates[0])


def test_distortion_at_one_bit() -> None:
    for rho, printed in ((0.6, 0.17), (0.9, 0.050), (0.99, 0.0062)):
        source = Symmetric(num_clients=16, correlation=rho)
        assert 16 * source.distortion_at(1.0) == pytest.approx(printed, rel=0.02)
        for unbiased in (False, True):
            distortion = source.distortion_at(1.0, unbiased=unbiased)
            assert source.limit(distortion, unbiased=unbiased) == pytest.approx(1.0)


def test_many_clients_save_as_much_as_theory_says() -> None:
    for rho, saving in ((0.3, 0.26), (0.6, 0.66), (0.9, 1.66), (0.99, 3.32)):
        joint = Symmetric(num_clients=10**9, correlation=rho)
        alone = Symmetric(num_clients=10**9, correlation=0.0)
        assert alone.rate(1e-6) - joint.rate(1e-6) == pytest.approx(saving, abs=0.005)
        assert alone.rate(1e3) / joint.rate(1e3) == pytest.approx(1 / (1 - rho), rel=0.01)


@pytest.mark.parametrize("rho", [-0.25, 0.0, 0.7, 1.0])
def test_closed_forms_are_the_general_ones(rho: float) -> None:
    source = Symmetric(num_clients=5, correlation=rho, variance=2.0)
    covariance, noise = equicorrelated(5, rho, 2.0), np.full(5, 0.3)
    assert source.rate(0.3) == pytest.approx(limits.sum_rate(covariance, noise) / 5)
    assert source.distortion(0.3) == pytest.approx(limits.distortion(covariance, noise), abs=1e-15)
    rates = limits.corner_rates(covariance, noise, range(5))
    known = [source.conditional_variance(0.3, i) for i in range(5)]
    assert rates == pytest.approx(0.5 * np.log2(1 + np.array(known) / 0.3))


def test_no_scheme_beats_cooperation_and_joint_coding_beats_independent() -> None:
    for rho in (0.0, 0.5, 0.95):
        source, covariance = Symmetric(num_clients=6, correlation=rho), equicorrelated(6, rho)
        for distortion in (0.1, 0.01, 0.001):
            least = source.cooperative_limit(distortion)
            assert least == pytest.approx(limits.cooperative_rate(covariance, distortion))
            alone = limits.independent_rates(np.ones(6), distortion, unbiased=True)[0]
            assert least <= source.limit(distortion) <= alone
    assert Symmetric(num_clients=3, correlation=-0.5).limit(1e-9) == 0.0


@LIBRARIES
def test_subsets_and_corners(xp) -> None:
    covariance, noise = random_covariance(4, 1), np.array([0.1, 1.0, 0.02, 0.5])
    needed = limits.subset_rates(xp.asarray(covariance), xp.asarray(noise))
    assert np.asarray(needed) == pytest.approx(subset_information(covariance, noise))
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        corner = limits.corner_rates(xp.asarray(covariance), xp.asarray(noise), order)
        slack = subset_sums(np.asarray(corner)) - np.asarray(needed)
        assert slack.min() > -1e-12
        last_decoded = [sum(1 << client for client in order[i:]) for i in range(4)]
        assert slack[last_decoded] == pytest.approx(0.0, abs=1e-12)
    assert limits.sum_rate(xp.asarray(covariance), xp.asarray(noise)) == pytest.approx(
        float(needed[-1])
    )


def test_shared_orders_need_the_mean_of_their_corners() -> None:
    covariance, noise = random_covariance(3, 2), np.array([0.1, 0.4, 0.2])
    orders = [(0, 1, 2), (2, 0, 1)]
    corners = [limits.corner_rates(covariance, noise, order) for order in orders]
    shared = limits.shared_rates(covariance, noise, orders, (0.25, 0.75))
    assert shared == pytest.approx(0.25 * corners[0] + 0.75 * corners[1])


@LIBRARIES
def test_the_combination_has_the_least_error(xp) -> None:
    covariance, noise = random_covariance(4, 3), np.array([0.1, 1.0, 0.02, np.inf])
    target = np.array([0.1, 0.2, 0.3, 0.4])
    arrays = [xp.asarray(value) for value in (covariance, noise, target)]
    weights = np.asarray(limits.combine_weights(*arrays))
    assert weights[3] == 0.0

    def error(found: np.ndarray) -> float:
        missed = target - found
        return missed @ covariance @ missed + found[:3] ** 2 @ noise[:3]

    least = limits.distortion(*arrays)
    assert error(weights) == pytest.approx(least)
    assert least == pytest.approx(mean_error(covariance, np.minimum(noise, 1e15), target))
    for step in np.eye(4)[:3]:
        assert error(weights + 0.01 * step) > least < error(weights - 0.01 * step)
    size = target @ covariance @ target
    assert limits.combine_bias(*arrays) == pytest.approx(1 - weights @ covariance @ target / size)


def test_the_plain_mean_needs_everybody() -> None:
    noise, weights = np.array([0.5, 1.0, np.inf]), np.array([0.5, 0.5, 0.0])
    assert limits.unbiased_distortion(noise, weights) == pytest.approx(0.375)
    assert limits.unbiased_distortion(noise) == math.inf


def exact_error(covariance, noise, weights) -> float:
    """Of the mean, in rational arithmetic."""
    rows = [[Fraction(x) for x in row] for row in covariance.tolist()]
    target = [Fraction(x) for x in weights.tolist()]
    size = len(target)
    known = [sum(rows[i][j] * target[j] for j in range(size)) for i in range(size)]
    system = [[*row, value] for row, value in zip(rows, known, strict=True)]
    for i, value in enumerate(noise.tolist()):
        system[i][i] += Fraction(value)
    for i in range(size):
        system[i] = [value / system[i][i] for value in system[i]]
        for j in range(size):
            if j != i:
                factor = system[j][i]
                pairs = zip(system[j], system[i], strict=True)
                system[j] = [value - factor * other for value, other in pairs]
    return float(sum(known[i] * (target[i] - system[i][size]) for i in range(size)))


@pytest.mark.parametrize("exponents", [(0, 0, 0, 0), (-30,) * 4, (-24, 0, 3, -12), (2, -5, -20, 9)])
def test_noises_may_be_orders_apart(exponents) -> None:
    factor = np.random.default_rng(4).integers(-8, 9, (4, 4)) / 8.0
    covariance, weights = factor @ factor.T, np.array([0.5, 0.125, 0.25, 0.125])
    noise = 10.0 ** np.array(exponents)
    expected = exact_error(covariance, noise, weights)
    assert limits.distortion(covariance, noise, weights) == pytest.approx(expected, rel=1e-9)
    assert limits.distortion(FactorCovariance(factor, np.zeros(4)), noise, weights) == (
        pytest.approx(expected, rel=1e-9)
    )


def test_updates_that_follow_from_others() -> None:
    """Three clients with one update: joint coding sends it once."""
    covariance = np.ones((3, 3))
    noise = np.array([0.3, 0.3, 0.3])
    assert limits.sum_rate(covariance, noise) == pytest.approx(0.5 * np.log2(1 + 10))
    assert limits.distortion(covariance, noise) == pytest.approx(1 / 11)
    assert limits.distortion(np.zeros((2, 2)), np.ones(2)) == 0.0
    assert limits.subset_rates(covariance, np.full(3, np.inf)) == pytest.approx(0.0)


@LIBRARIES
def test_reverse_water_filling(xp) -> None:
    variances, weights = np.array([4.0, 1.0, 0.25, 0.0]), np.array([0.25, 0.25, 0.25, 0.25])
    share = weights**2 * variances
    for distortion in (0.3, 0.1, 0.01):
        found = limits.independent_rates(xp.asarray(variances), distortion, xp.asarray(weights))
        errors = share * 2 ** (-2 * np.asarray(found))
        assert errors.sum() == pytest.approx(distortion)
        level = errors.max()
        assert errors == pytest.approx(np.minimum(level, share))
    assert not np.asarray(limits.independent_rates(xp.asarray(variances), 1.0)).any()


@LIBRARIES
def test_unbiased_rates_are_the_fewest(xp) -> None:
    variances, weights = np.array([4.0, 1.0, 0.25]), np.array([0.6, 0.4, 0.0])
    rates = np.asarray(
        limits.independent_rates(xp.asarray(variances), 0.05, xp.asarray(weights), unbiased=True)
    )
    assert rates[2] == 0.0
    noise = variances[:2] / (2 ** (2 * rates[:2]) - 1)
    assert weights[:2] ** 2 @ noise == pytest.approx(0.05)
    for moved in (0.9, 1.1):  # another division of the same error
        other = noise[0] * moved
        rest = (0.05 - weights[0] ** 2 * other) / weights[1] ** 2
        bits = 0.5 * np.log2(1 + variances[:2] / np.array([other, rest]))
        assert bits.sum() > rates.sum()


def dithered_entropy(step: float) -> float:
    """``H(n | u)`` of a unit Gaussian, n = round(x / step + u)."""
    codes = np.arange(-200, 201)
    bits = []
    for dither in (np.arange(64) + 0.5) / 64 - 0.5:
        edges = [step * (n - 0.5 - dither) / math.sqrt(2) for n in (*codes, 201)]
        cells = np.diff([math.erf(edge) / 2 for edge in edges])
        bits.append(-sum(p * math.log2(p) for p in cells if p > 0))
    return float(np.mean(bits))


@pytest.mark.parametrize("step", [0.25, 1.0, 2.0, 6.0])
def test_what_a_quantiser_needs(step: float) -> None:
    """Less than the bound, by less than its offset."""
    noise = np.array(step**2 / 12)
    bound = float(limits.quantiser_rate(np.array(1.0), noise))
    gaussian = bound - limits.lattice_offset(limits.SCALAR_MOMENT)
    assert gaussian < dithered_entropy(step) < bound + 1e-3
    assert limits.lattice_offset(limits.SCALAR_MOMENT) == pytest.approx(0.2546, abs=1e-4)
    assert limits.lattice_offset(limits.E8_MOMENT) == pytest.approx(0.1460, abs=1e-4)


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (np.array([[1.0, 0.5], [0.2, 1.0]]), "symmetric"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "finite"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "eigenvalue -1"),
        (np.ones((2, 3)), r"shape \(2, 3\)"),
        ([[1.0]], "list given"),
    ],
)
def test_covariances_that_are_none(covariance, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        limits.sum_rate(covariance, np.ones(2))


def test_mistakes_are_named() -> None:
    eye, ones = np.eye(3), np.ones(3)
    with pytest.raises(ConfigError, match="positive"):
        limits.sum_rate(eye, np.array([1.0, 0.0, 1.0]))
    with pytest.raises(ConfigError, match=r"shape \(2,\): must be \(3,\)"):
        limits.distortion(eye, np.ones(2))
    with pytest.raises(ConfigError, match="3 finite numbers"):
        limits.distortion(eye, ones, np.ones(2))
    with pytest.raises(ConfigError, match=r"each of 0\.\.2 once"):
        limits.corner_rates(eye, ones, (0, 1, 1))
    with pytest.raises(ConfigError, match="16 at most"):
        limits.subset_rates(np.eye(17), np.ones(17))
    with pytest.raises(ConfigError, match=r"correlation is -0\.9"):
        Symmetric(num_clients=3, correlation=-0.9)
    with pytest.raises(ConfigError, match="must be positive"):
        Symmetric(num_clients=3, correlation=0.5).limit(0.0)


def test_conditional_variances_are_those_of_the_order() -> None:
    covariance, noise = random_covariance(4, 5), np.array([0.2, 0.1, 0.4, 0.3])
    order = (2, 0, 3, 1)
    rates = limits.corner_rates(covariance, noise, order)
    for i, client in enumerate(order):
        _, variance = conditional(covariance, noise, client, order[:i])
        assert rates[client] == pytest.approx(0.5 * np.log2(1 + variance / noise[client]))


def test_arrays_of_cupy_are_recognised(monkeypatch) -> None:
    """Its arrays have no ``__array_namespace__``; its main namespace follows the standard."""
    library = types.ModuleType("cupy")
    monkeypatch.setitem(sys.modules, "cupy", library)
    array = type("ndarray", (), {"__module__": "cupy"})()
    assert array_namespace(array) is library
