"""`import commrt` is cheap and has no side effects: measured in a fresh interpreter."""

import json
import subprocess
import sys

PROGRAM = """
import json, logging, os, sys, torch

def state():
    return {
        "environment": dict(os.environ),
        "threads": len(os.listdir("/proc/self/task")),
        "torch threads": torch.get_num_threads(),
        "CUDA initialised": torch.cuda.is_initialized(),
        "log handlers": [repr(handler) for handler in logging.root.handlers],
        "log level": logging.root.level,
    }

state()  # loads what looking needs
before, modules = state(), set(sys.modules)
import commrt
changed = [name for name, value in state().items() if value != before[name]]
print(json.dumps({"changed": changed, "loaded": sorted(set(sys.modules) - modules)}))
"""


def test_import_loads_nothing_else_and_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    seen = json.loads(done.stdout)
    assert seen["changed"] == []
    assert set(seen["loaded"]) <= {"commrt", "commrt.errors"}
    assert done.stderr == ""
