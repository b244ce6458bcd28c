"""``python -m evad``: the same as the command ``evad``."""

import sys

from .cli import main

sys.exit(main())
