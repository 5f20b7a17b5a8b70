"""`python -m lowmem` is `lowmem`."""

import sys

from .cli import main

sys.exit(main())
