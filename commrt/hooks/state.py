"""Which state dicts a Comm takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from commrt.errors import StateError
from commrt.hooks.residuals import Residuals, Unmatched

STATE_VERSION = 3
State = Mapping[str, Any]

_KEYS = ("steps", "loss_scale", "residuals", "shards", "bases", "carries")


Exempt = Mapping[str, tuple[str, int]]
"""Parameters that are not compressed here, with the reason."""


def check_own(
    state: State, identity: State, residuals: Residuals, strict: bool, exempt: Exempt
) -> Unmatched:
    """Raise StateError unless ``state`` is of this rank, in a world like this one."""
    unmatched = _check(state, identity, tuple(identity), residuals, strict, exempt)
    if not residuals.fits(state):
        raise StateError("state dict is of other shards: load those of all ranks")
    return unmatched


def check_world(
    states: Sequence[State], identity: State, residuals: Residuals, strict: bool, exempt: Exempt
) -> Unmatched:
    """Raise StateError unless ``states`` are of all ranks of one world, at the same step."""
    if not states:
        raise StateError("no state dicts: must be those of all ranks of a world")
    unmatched = [
        _check(state, identity, ("version", "codec"), residuals, strict, exempt) for state in states
    ]
    for key in ("world_size", "placement", "steps", "loss_scale"):
        if any(state[key] != states[0][key] for state in states):
            raise StateError(f"state dicts differ in {key}: {[state[key] for state in states]}")
    ranks = sorted(state["rank"] for state in states)
    if ranks != list(range(states[0]["world_size"])):
        raise StateError(
            f"state dicts are of ranks {ranks}: must be all {states[0]['world_size']}, once"
        )
    return unmatched[0]


def find_own(states: Sequence[State], identity: State) -> State | None:
    """This rank's state, if a world like this one wrote them; so on all ranks or on none."""
    for state in states:
        if all(state[key] == value for key, value in identity.items()):
            return state
    return None


def _check(
    state: State,
    identity: State,
    equal: Sequence[str],
    residuals: Residuals,
    strict: bool,
    exempt: Exempt,
) -> Unmatched:
    for key in (*identity, *_KEYS):
        if key not in state:
            raise StateError(f"state dict has no {key!r}: it is not one of commrt's")
    for key in equal:
        if state[key] != identity[key]:
            raise StateError(f"state dict has {key}={state[key]!r}: must be {identity[key]!r} here")
    for name in state["residuals"]:
        if strict and name in exempt:
            raise StateError(
                f"state dict has a residual of {name!r}, which is not compressed here: "
                f"{exempt[name][0]}; strict=False gives it up"
            )
    return residuals.check(state, strict)
