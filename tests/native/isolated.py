"""Programs that need an interpreter of their own."""

import os
import subprocess
import sys

TIMEOUT_S = 60


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program with these environment variables and no others of ours; it must end well."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("COMMRT_")}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    )
