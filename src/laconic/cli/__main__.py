"""``python -m laconic.cli``."""

import sys

from laconic.cli.app import main

sys.exit(main())
