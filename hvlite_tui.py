"""Start the terminal UI from a checkout: `python hvlite_tui.py` is `hvlite tui`."""

import sys

from hvlite.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["tui"]
    main()
