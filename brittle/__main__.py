"""`python -m brittle` is `brittle`."""

import sys

from brittle.cli import main

if __name__ == "__main__":
    sys.exit(main())
