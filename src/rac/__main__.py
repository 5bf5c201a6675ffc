"""`python -m rac`, the same as the command `rac`."""

import sys

from .cli import main

sys.exit(main())
