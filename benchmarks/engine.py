"""The old name of `python benchmarks/speed.py engine`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.speed import main

if __name__ == "__main__":
    sys.exit(main(["engine", *sys.argv[1:]]))
