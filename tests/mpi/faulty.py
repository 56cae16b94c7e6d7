"""``python -m commrt``, but one rank fails: FAULT RANK ARGUMENTS...

raise           with a StateError, as its third state of a client is stored
setting         with a ConfigError, there
EVENT:NAME      killed just before an audit event of a file whose name begins so, once a checkpoint
                is there
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from commrt.__main__ import main
from commrt.errors import ConfigError, StateError
from commrt.federated.store import StateStore

ERRORS = {"raise": StateError, "setting": ConfigError}


def raise_at_third(error: type[Exception]) -> None:
    plain, stored = StateStore.__setitem__, list[int]()

    def store(self: StateStore, client: int, state: Any) -> None:
        stored.append(client)
        if len(stored) == 3:
            raise error("this rank cannot go on")
        plain(self, client, state)

    StateStore.__setitem__ = store  # type: ignore[method-assign]


def kill_at(event: str, beginning: str) -> None:
    def heard(name: str, arguments: tuple[Any, ...]) -> None:
        if name != event or not isinstance(arguments[0], str | os.PathLike):
            return
        path = Path(arguments[0])
        if path.name.startswith(beginning) and (path.parent / "checkpoint.pt").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heard)


if __name__ == "__main__":
    fault, rank, *arguments = sys.argv[1:]
    if os.environ["OMPI_COMM_WORLD_RANK"] == rank:
        if fault in ERRORS:
            raise_at_third(ERRORS[fault])
        else:
            kill_at(*fault.split(":"))
    sys.exit(main(arguments))
