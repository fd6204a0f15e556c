"""What test_ranks.py runs in two processes at once: all functions `check_...` of a module of this folder.

    PYTHONPATH=. torchrun --nproc-per-node 2 -m tests.engine.two_ranks.worker replicated

Each process makes the same checks in the same order and says `passed NAME` after each. Runs are written to the working
directory.
"""

import importlib
import sys

from polopt.engine.ranks import Ranks


def main(kind: str) -> None:
    module = importlib.import_module(f"tests.engine.two_ranks.{kind}")
    ranks = Ranks.start(expected=2)
    for name, check in vars(module).items():
        if name.startswith("check_"):
            check(ranks)
            ranks.barrier()
            sys.stdout.write(f"passed {name}\n")
            sys.stdout.flush()
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[1])
