"""The emulated cluster, on the kernel's own namespaces, bridge and queues."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NETCLUSTER = ROOT / "launch/netcluster"
MARKER = "NETCLUSTER_TEST"
TIMEOUT_S = 100
MEGABYTE = 1_000_000
BURST_BYTES = 7500
Start = Callable[..., subprocess.Popen[str]]
UNSHARE = ["unshare", "--net", "--mount", "--pid", "--fork"]
PRIVATE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    """Root has them, other users have them together with a user namespace."""
    ways = [UNSHARE, [*UNSHARE, "--map-root-user"]]
    mount = ["mount", "-t", "proc", "proc", "/proc"]
    if all(
        subprocess.run([*way, *mount], capture_output=True, check=False).returncode for way in ways
    ):
        pytest.skip("not run: no network namespaces")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the launcher; checks at the end that nothing it started is left."""
    value = str(uuid.uuid4())
    runs: list[subprocess.Popen[str]] = []

    def start_run(*arguments: str, script: str = "") -> subprocess.Popen[str]:
        path = tmp_path / f"script{len(runs)}.py"
        path.write_text(script)
        arguments = tuple(argument.replace("SCRIPT", str(path)) for argument in arguments)
        run = subprocess.Popen(
            [sys.executable, NETCLUSTER, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=ROOT, env={**os.environ, MARKER: value},
        )  # fmt: skip
        runs.append(run)
        return run

    yield start_run
    for run in runs:
        run.kill()
        run.communicate(timeout=TIMEOUT_S)
    wait_until(lambda: not processes_with(f"{MARKER}={value}"))
    names = set(os.listdir("/sys/class/net"))
    assert not {"bridge", "node0", "node1"} & names
    assert "/netns/node" not in Path("/proc/self/mountinfo").read_text()


def processes_with(marker: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes()
        except OSError:  # ended since, or another user's
            continue
        if marker.encode() in environment.split(b"\0"):
            found.append(path.parent.name)
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S / 2
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read_until_ready(run: subprocess.Popen[str], num_ranks: int) -> None:
    for _ in range(num_ranks):
        assert run.stdout.readline() == "ready\n"


# Ranks write a line at once: print writes its end apart, and another rank's line gets in between.
EXCHANGE = f"""
import json, os, sys, time
import torch
import torch.distributed as dist
from pathlib import Path

def bytes_in_and_out():
    lines = Path("/proc/net/dev").read_text().splitlines()
    interface = os.environ["COMMRT_NETCLUSTER_INTERFACE"] + ":"
    [counters] = [line.split() for line in lines if line.split()[0] == interface]
    return int(counters[1]), int(counters[9])

def to_rank_0():
    if rank == 0:
        for work in [dist.irecv(part, i + 1) for i, part in enumerate(parts)]:
            work.wait()
    else:
        dist.send(parts[rank - 1], 0)

def from_rank_0():
    if rank == 0:
        works = [dist.isend(part, i + 1) for i, part in enumerate(parts)]
        for i in range(len(parts)):
            dist.recv(torch.zeros(1), i + 1)
    else:
        dist.recv(parts[rank - 1], 0)
        dist.send(torch.zeros(1), 0)

def measure(action, index):
    dist.barrier()
    before, began = bytes_in_and_out(), time.perf_counter()
    action()
    duration = time.perf_counter() - began
    return duration, bytes_in_and_out()[index] - before[index]

dist.init_process_group("gloo")
rank = dist.get_rank()
parts = torch.zeros({MEGABYTE}, dtype=torch.uint8).chunk(2)
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
names = ("NODES", "NODE", "RATE")
report = json.dumps({{
    "rank": rank, "sum": total.item(), "interfaces": sorted(os.listdir("/sys/class/net")),
    "in": measure(to_rank_0, 0), "out": measure(from_rank_0, 1),
    **{{name: os.environ["COMMRT_NETCLUSTER_" + name] for name in names}},
}})
sys.stdout.write(report + "\\n")
sys.stderr.write(f"for stderr {{rank}}\\n")
dist.barrier()
dist.destroy_process_group()
"""

FAIL = """
import os, sys
sys.stdout.write(f"{sorted(os.listdir('/sys/class/net'))}\\n")
sys.stderr.write("for stderr\\n")
sys.exit(3)
"""


def test_two_runs_at_once(start: Start) -> None:
    """Each with interfaces, addresses and a port of the same names. Two nodes that send to one, or
    receive from one, never get more than that one's rate; output and exit codes pass through.
    """
    shaped = start("--nodes", "3", "--rate", "20mbit", "--", "SCRIPT", script=EXCHANGE)
    options = ["--nodes", "1", "--nproc-per-node", "2", "--rate", "none", "--prefix"]
    failing = start(*options, "--", "SCRIPT", script=FAIL)
    output, errors = shaped.communicate(timeout=TIMEOUT_S)
    assert shaped.returncode == 0, errors
    rows = [json.loads(line) for line in output.splitlines()]
    ranks = {row["rank"]: row for row in rows}
    assert sorted(ranks) == [0, 1, 2]
    for rank, report in ranks.items():
        assert f"for stderr {rank}\n" in errors
        assert (report["NODES"], report["NODE"]) == ("3", str(rank))
        assert float(report["RATE"]) == 20e6
        assert report["interfaces"] == ["eth0", "lo"]
        assert report["sum"] == 6
    for duration_s, num_bytes in (ranks[0]["in"], ranks[0]["out"]):
        assert duration_s >= (MEGABYTE - BURST_BYTES) * 8 / 20e6
        assert MEGABYTE <= num_bytes <= 1.1 * MEGABYTE
    output, errors = failing.communicate(timeout=TIMEOUT_S)
    assert failing.returncode == 1
    assert output.splitlines()[0] == "node0: ['eth0', 'lo']"
    assert "node0: for stderr\n" in errors
    assert "netcluster: node0 ended with exit code 1\n" in errors


ATTEMPTS = """
import os, sys
print("attempt", os.environ["TORCHELASTIC_RESTART_COUNT"], sys.argv[1:], flush=True)
sys.exit(1)
"""


def test_options_of_torchrun(start: Start) -> None:
    options = ["--nodes", "1", "--rate", "none", "--max-restarts", "1"]
    run = start(*options, "--", "SCRIPT", "--nodes", "two words", script=ATTEMPTS)
    output, _ = run.communicate(timeout=TIMEOUT_S)
    assert run.returncode == 1
    assert output == "".join(f"attempt {i} ['--nodes', 'two words']\n" for i in range(2))


def test_plan_measures_the_links(start: Start) -> None:
    """Inside a node and between nodes. A shaped link cannot be faster than it is, and over it
    codecs pay.
    """
    job = ["--params", "7e6", "--compute-ms", "10", "--methods", "loco4", "loco4+intra=none"]
    ranks = ["--nodes", "2", "--nproc-per-node", "2", "--rate", "20mbit"]
    output, errors = start(*ranks, "--", "-m", "commrt", "plan", *job).communicate(
        timeout=TIMEOUT_S
    )
    first, *lines = output.splitlines()
    assert first.startswith("measured: 2 nodes with 2 ranks each, "), errors
    between, inside = (
        float(rate.replace(",", "")) for rate in re.findall(r"([0-9,]+) Mbit", first)
    )
    assert 5 < between < 21 < inside
    assert [line.split()[0] for line in lines] == [
        *("method", "none", "loco4", "loco4+intra=none", "use"),
    ]
    assert lines[-1].startswith("use loco4+intra=none: ")


def test_ctrl_c_writes_a_checkpoint(start: Start, tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_bytes(Path(subprocess.__file__).read_bytes()[:40_000])
    out = tmp_path / "run"
    train = f"-m commrt train --data {text} --out {out} --batch-size 1 --seq-len 16 --steps 100000"
    run = start("--nodes", "2", "--rate", "1gbit", "--", *train.split(), "--eval-every", "0")
    wait_until(lambda: (out / "metrics.jsonl").exists() or run.poll() is not None)
    run.send_signal(signal.SIGINT)
    output, errors = run.communicate(timeout=TIMEOUT_S)
    assert run.returncode == 130, errors
    assert "netcluster: SIGINT to all ranks, which have 30 s to end\n" in errors
    assert "Stopped at step " in output
    assert list(out.glob("step_*/model.pt"))


STUBBORN = """
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
sys.stdout.write("ready\\n")
time.sleep(1000)
"""


def test_after_the_grace_period_ranks_are_killed(
    start: Start,
) -> None:
    run = start("--nodes", "1", "--rate", "none", "--grace", "1", "--", "SCRIPT", script=STUBBORN)
    read_until_ready(run, 1)
    run.terminate()
    _, errors = run.communicate(timeout=TIMEOUT_S)
    assert run.returncode == 128 + signal.SIGTERM
    assert errors.endswith("netcluster: killed node0\n")


def test_nothing_is_left_of_a_launcher_that_was_killed(
    start: Start,
) -> None:
    """The fixture looks for it."""
    run = start("--nodes", "2", "--rate", "1mbit", "--", "SCRIPT", script=STUBBORN)
    read_until_ready(run, 2)
    run.kill()


def refusal(run: subprocess.Popen[str]) -> str:
    output, errors = run.communicate(timeout=TIMEOUT_S)
    assert (run.returncode, output) == (2, "")
    return errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--nodes 2 --rate 200", "argument --rate: 200 must be none or a number with kbit, mbit"),
        ("--nodes 2 --rate 0mbit", "argument --rate: 0mbit must be none or"),
        ("--nodes 2 --rate 1mbyte", "argument --rate: 1mbyte must be none or"),
        ("--nodes 0 --rate none", "argument --nodes: 0 must be a number from 1 to 100"),
        ("--nodes 101 --rate none", "argument --nodes: 101 must be a number from 1 to 100"),
        ("--nodes two --rate none", "argument --nodes: two must be a number from 1 to 100"),
        ("--nodes 2 --rate none --delay 10", "argument --delay: 10 must be a number with us, ms"),
        ("--nodes 2", "the following arguments are required: --rate"),
    ],
)
def test_mistakes_are_named(start: Start, options: str, message: str) -> None:
    errors = refusal(start(*options.split(), "--", "SCRIPT"))
    assert f"netcluster: error: {message}" in errors


def test_a_run_needs_a_command(start: Start) -> None:
    for rest in ([], ["script.py"], ["--"]):
        errors = refusal(start("--nodes", "2", "--rate", "none", *rest))
        assert "netcluster: error: no command: it follows --" in errors


def run_in_private(preparation: str, *python_options: str, **environment: str) -> str:
    """Returns what the launcher refuses in namespaces of its own, after a shell command."""
    options = ["--nodes", "2", "--rate", "none", "--", "script.py"]
    launcher = [sys.executable, *python_options, str(NETCLUSTER), *options]
    found = subprocess.run(
        [*PRIVATE, f'{preparation}; exec "$@"', "sh", *launcher],
        capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **environment},
        check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (2, "")
    return found.stderr


def test_missing_iproute2_is_named() -> None:
    hide = "[ ! -e $folder/tc ] || mount --bind /dev/null $folder/tc"
    message = run_in_private(
        f"path=$PATH:/usr/sbin:/sbin; IFS=:; for folder in $path; do {hide}; done"
    )
    assert message.startswith("netcluster: error: no tc: install iproute2 (apt-get install")


def test_missing_namespaces_are_named() -> None:
    message = run_in_private("echo 0 > /proc/sys/user/max_net_namespaces")
    assert message.startswith("netcluster: error: no network namespaces (No space left")
    assert "they need root" in message


def test_missing_torch_is_named() -> None:
    """Python without its site-packages."""
    message = run_in_private("true", "-S", COMMRT_VENV="/nowhere")
    assert "has no torch and /nowhere/bin/python is not there: run launch/test" in message


ROUND_TRIP = """
import os, socket, time
from pathlib import Path
if os.environ["GROUP_RANK"] == "1":
    server = socket.create_server(("198.18.0.102", 5000))
    connection, _ = server.accept()
    connection.sendall(connection.recv(1))
else:
    while True:
        try:
            connection = socket.create_connection(("198.18.0.102", 5000))
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    began = time.perf_counter()
    connection.sendall(b"x")
    connection.recv(1)
    print(time.perf_counter() - began, flush=True)
"""


def test_delay_is_there_or_refused(start: Start) -> None:
    """A kernel with netem delays each way, one without is named as the reason."""
    in_private = ["unshare", "--net", "--map-root-user"]
    add_netem = ["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    has_netem = subprocess.run([*in_private, *add_netem], capture_output=True, check=False)
    options = ["--nodes", "2", "--rate", "10mbit", "--delay", "30ms"]
    run = start(*options, "--", "SCRIPT", script=ROUND_TRIP)
    if has_netem.returncode == 0:
        output, errors = run.communicate(timeout=TIMEOUT_S)
        assert run.returncode == 0, errors
        assert float(output) >= 0.06
    else:
        message = "netcluster: error: --delay needs a kernel with netem (CONFIG_NET_SCH_NETEM"
        assert refusal(run).startswith(message)
