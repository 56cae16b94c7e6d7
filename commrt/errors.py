"""Exceptions. A user's mistake is always a ``ValueError`` as well."""


class CommrtError(Exception):
    """Base of everything commrt raises on purpose."""


class ConfigError(CommrtError, ValueError):
    """A setting, argument or model that commrt cannot work with; says what is allowed."""


class StateError(CommrtError, ValueError):
    """A state dict that does not fit the model, rank or codec it is loaded into."""


class OffloadError(CommrtError, RuntimeError):
    """Offloaded state could not be had or kept; says whether weights and state still match."""


class PeerMismatchError(CommrtError, ValueError):
    """Ranks of one group disagree; raised on every rank, with both values."""


class CollectiveError(CommrtError, RuntimeError):
    """A collective failed earlier, so the ones behind it in the queue cannot run."""


class WireFormatError(CommrtError, ValueError):
    """A payload from another machine that cannot be decoded; nothing of it was used."""
