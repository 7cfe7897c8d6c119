"""The hvlite command line as it is, and what its process took: python benchmarks/measured.py REPORT ARGUMENTS..."""

import json
import sys
from pathlib import Path

from cold import fetched_bytes, peak_bytes

from hvlite.cli import main


def measured(report: Path) -> None:
    try:
        main()
    finally:
        report.write_text(json.dumps({"peak_bytes": peak_bytes(), "fetched_bytes": fetched_bytes()}))


if __name__ == "__main__":
    sys.argv[0] = "hvlite"
    measured(Path(sys.argv.pop(1)))
