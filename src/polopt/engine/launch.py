"""How the processes of a run find each other: started by `torchrun` or `accelerate launch`, which set the environment."""

import os

import torch
import torch.distributed as dist

from polopt.errors import ConfigError


def check_launch(world: int, expected: int | None, sharding: str) -> None:
    """Refuse a number of processes that the run cannot have.

    Args:
        world: processes that there are.
        expected: number that the run must have; None takes what there is.
        sharding: "none" needs one, anything else several.

    Raises:
        ConfigError: with the command that starts as many as are needed.
    """
    asked_in_vain = world == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    has = f"this run has {world} process{'es' * (world > 1)}"
    if asked_in_vain:
        has += " (`accelerate launch --cpu` starts one, whatever its --num_processes)"
    start = (
        "start it with `torchrun --nproc-per-node {0}` or `accelerate launch --multi_gpu --num_processes {0}`"
    )
    if expected is not None and expected != world:
        raise ConfigError(f"ranks = {expected}: {has}; {start.format(expected)} (neither needs a GPU)")
    if expected is None and asked_in_vain:
        raise ConfigError(f"ranks: {has}; {start.format('N')} (neither needs a GPU), or set ranks = 1")
    if sharding != "none" and world == 1:
        raise ConfigError(
            f"sharding = {sharding!r}: {has}, nothing to shard over; {start.format('N')}, or use 'none'"
        )


def connect(world: int) -> None:
    """Join the process group that the environment describes.

    Raises:
        ConfigError: the environment names the processes' number only.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE = {world}, but {', '.join(missing)} not set: start the run with `torchrun`"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend)
