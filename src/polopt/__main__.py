"""`python -m polopt`, and `torchrun -m polopt` for several processes."""

from polopt.cli import main

raise SystemExit(main())
