"""``python -m fedmpi``."""

import sys

from fedmpi import start  # noqa: F401 (before what takes time to import: signals are heard from here on)
from fedmpi.cli import main

sys.exit(main())
