"""Efficient attention against plain PyTorch, dot-product attention and other packages: `lineara bench attention`.

    python benchmarks/attention/suite.py --preset full --output runs/attention

The same from a checkout that is not installed; it needs torch and nothing else. `--help` tells the options. Rows are
written to the folder after every shape and pass: a run that is killed keeps what it has, and a second one goes on from
there. Report and, where there is matplotlib, picture follow at the end. A quiet machine is the caller's business.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from lineara.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "attention", *sys.argv[1:]]))
