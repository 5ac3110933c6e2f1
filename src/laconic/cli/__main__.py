"""``laconic`` and ``python -m laconic.cli``."""

import os
import signal
import sys


def main() -> int:
    """Run the command line as a process; Ctrl-C before and after the command itself ends it without a traceback."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from laconic.cli.app import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
