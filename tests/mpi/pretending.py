"""``python -m commrt`` on a machine with a GPU, which is pretended."""

import sys

from commrt.__main__ import main
from tests.unit.pretended import pretended_gpu

if __name__ == "__main__":
    with pretended_gpu():
        sys.exit(main(sys.argv[1:]))
