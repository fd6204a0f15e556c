"""`python -m polopt.cli`, for launchers that start modules."""

import sys

from polopt.cli import main

sys.exit(main())
