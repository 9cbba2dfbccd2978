"""``python -m logitless_demo``."""

import sys

from logitless_demo.cli import main

sys.exit(main())
