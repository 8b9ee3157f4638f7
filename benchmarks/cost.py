"""The old name of `python benchmarks/speed.py cost`, and with --adapter of `python benchmarks/speed.py adapter`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.speed import main

if __name__ == "__main__":
    given = [each for each in sys.argv[1:] if each != "--adapter"]
    sys.exit(main(["cost" if given == sys.argv[1:] else "adapter", *given]))
