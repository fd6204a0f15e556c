"""polopt's side with `trainer.compile`."""

from functools import partial

from settings import run
from worker_polopt import train

if __name__ == "__main__":
    run(partial(train, compiled=True))
