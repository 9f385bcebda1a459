"""Command line of a checkout, the same as `dp-runtime` of an installed package."""

import sys

from dp_runtime.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
