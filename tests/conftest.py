"""Rules for the whole suite: no skip without a known reason, repeatable property tests in CI."""

import importlib.util
import os
from collections import Counter

import hypothesis
import pytest

# A skip for any other reason fails: a suite that quietly stops testing something looks green.
# Each names what the machine lacks; launch/test itself makes sure of everything else.
ALLOWED_SKIPS = (
    "not run: no Flower",
    "not run: no GPU",
    "not run: one GPU only",
    "not run: no nvcc",
    "not run: CPU without AVX2",
    "not run: CPU without AVX-512",
    "not run: no network namespaces",
)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "local")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put slow tests first, those of a file together: begun last, one worker would end with them.

    pytest-xdist gives each worker as many tests as the next, in order, to begin with.
    """
    count = getattr(config, "workerinput", {}).get("workercount", 1)
    slow = [item for item in items if item.get_closest_marker("slow")]
    others = [item for item in items if not item.get_closest_marker("slow")]
    files = list(dict.fromkeys(item.path for item in slow))
    arranged: list[pytest.Item] = []
    for worker in range(count):
        first = [item for item in slow if files.index(item.path) % count == worker]
        size = max(0, (len(items) - len(arranged)) // (count - worker) - len(first))
        arranged += first + others[:size]
        del others[:size]
    items[:] = arranged + others


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("flower") and importlib.util.find_spec("flwr") is None:
        pytest.skip("not run: no Flower")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("not run: no GPU")


def fail_unexpected_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = skip_reason(report)
    if reason not in ALLOWED_SKIPS:
        report.outcome = "failed"
        report.longrepr = f"skipped, but not for a reason in tests/conftest.py: {reason}"


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    _, _, message = report.longrepr
    return message.removeprefix("Skipped: ")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    fail_unexpected_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    fail_unexpected_skip(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = Counter(skip_reason(report) for report in terminalreporter.stats.get("skipped", []))
    for reason, count in counts.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
