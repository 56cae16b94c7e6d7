"""Traces of clients in a CSV file."""

import csv
import math
from pathlib import Path

from commrt.errors import ConfigError

Window = tuple[float, float]

_RATES = ("up_bytes_per_s", "down_bytes_per_s")
_SPEEDS = ("compute_s", *_RATES, "latency_s")
COLUMNS = ("client", *_SPEEDS, "on_s", "off_s")


class TraceFile:
    """What a file says of clients.

    Its first line names its columns: ``client``, counted from 0, and any of ``compute_s`` (an
    example), ``up_bytes_per_s``, ``down_bytes_per_s``, ``latency_s``, ``on_s`` and ``off_s``. A
    field may be empty. A client has a line for each window ``[on_s, off_s)`` in which it is there,
    or one line; its speeds are on one of them.

    Args:
        path: The file, UTF-8, with or without the mark that spreadsheets begin it with.
        num_clients: How many clients it must have at least; further ones are left out.
        period_s: When its windows begin again: each begins before that, and the last may end after
            it but not later than the first begins again. Infinite if they do not.

    Attributes:
        values: By column of a speed, by client.
        windows: By client, in order. Windows that touch are one; one that is a whole period is
            ``(0, inf)``.

    Raises:
        ConfigError: The file cannot be read or has a wrong value; says in which line.
    """

    def __init__(self, path: Path, num_clients: int, period_s: float) -> None:
        self._path = path
        self.values: dict[str, dict[int, float]] = {column: {} for column in _SPEEDS}
        windows: dict[int, list[Window]] = {}
        seen: set[int] = set()
        for line, row in self._rows():
            client = self._client(row, line)
            if client >= num_clients:
                continue
            seen.add(client)
            self._take_speeds(client, row, line)
            window = self._window(row, line, period_s)
            if window is not None:
                windows.setdefault(client, []).append(window)
        missing = sorted(set(range(num_clients)) - seen)
        if missing:
            raise ConfigError(
                f"{path} has no line of {len(missing)} clients, client {missing[0]} among them: "
                f"it must have all {num_clients}"
            )
        self.windows = {c: self._joined(c, w, period_s) for c, w in windows.items()}

    def _rows(self) -> list[tuple[int, dict[str, str]]]:
        try:
            with self._path.open(newline="", encoding="utf-8-sig") as stream:
                reader = csv.DictReader(stream, restkey="", restval="")
                names = reader.fieldnames or []
                rows = [(reader.line_num, dict(row)) for row in reader]
        except (OSError, ValueError, csv.Error) as error:
            raise ConfigError(f"{self._path} cannot be read: {error}") from error
        wrong = [name for name in names if name not in COLUMNS]
        if wrong or "client" not in names or len(set(names)) != len(names):
            raise ConfigError(
                f"{self._path} has columns {', '.join(names)}: they must be "
                f"{', '.join(COLUMNS)}, each once at most, client among them"
            )
        for line, row in rows:
            if "" in row:
                raise ConfigError(f"{self._path}, line {line}: more fields than columns")
        return rows

    def _client(self, row: dict[str, str], line: int) -> int:
        text = row["client"].strip()
        if not (text.isascii() and text.isdecimal()):
            raise ConfigError(
                f"{self._path}, line {line}: client is {text!r}: it must be a number from 0"
            )
        return int(text)

    def _take_speeds(self, client: int, row: dict[str, str], line: int) -> None:
        for column in _SPEEDS:
            value = self._number(row, column, line)
            if value is None:
                continue
            if client in self.values[column]:
                raise ConfigError(f"{self._path}, line {line}: {column} of client {client} again")
            if not (value > 0 if column in _RATES else 0 <= value < math.inf):
                allowed = "above 0" if column in _RATES else "at least 0 and finite"
                raise ConfigError(
                    f"{self._path}, line {line}: {column} is {value}: it must be {allowed}"
                )
            self.values[column][client] = value

    def _window(self, row: dict[str, str], line: int, period_s: float) -> Window | None:
        on_s, off_s = (self._number(row, column, line) for column in ("on_s", "off_s"))
        if on_s is None and off_s is None:
            return None
        if on_s is None or off_s is None or not 0 <= on_s < min(off_s, period_s):
            raise ConfigError(
                f"{self._path}, line {line}: on_s is {on_s} and off_s {off_s}: on_s must be at "
                f"least 0, and below off_s and the period of {period_s} s"
            )
        return on_s, off_s

    def _number(self, row: dict[str, str], column: str, line: int) -> float | None:
        text = row.get(column, "").strip()
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise ConfigError(f"{self._path}, line {line}: {column} is {text!r}: not a number")
        return value

    def _joined(self, client: int, windows: list[Window], period_s: float) -> tuple[Window, ...]:
        windows.sort()
        joined = [windows[0]]
        for on_s, off_s in windows[1:]:
            last_on_s, last_off_s = joined[-1]
            if on_s < last_off_s:
                raise ConfigError(
                    f"{self._path}: windows of client {client} overlap at {on_s} s: none may"
                )
            if on_s == last_off_s:
                joined[-1] = (last_on_s, off_s)
            else:
                joined.append((on_s, off_s))
        begin_s, end_s = joined[0][0], joined[-1][1]
        if end_s > begin_s + period_s:
            raise ConfigError(
                f"{self._path}: a window of client {client} ends at {end_s} s: the first begins "
                f"again at {begin_s + period_s} s"
            )
        if len(joined) == 1 and end_s == begin_s + period_s:
            return ((0.0, math.inf),)
        return tuple(joined)
