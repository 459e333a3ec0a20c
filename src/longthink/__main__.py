"""``python -m longthink`` is the same as ``longthink``."""

import sys

from longthink.cli import main

sys.exit(main())
