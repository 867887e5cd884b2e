"""`python -m orchestrator.cli`, the same as `iiet-orch`."""

import sys

from orchestrator.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
