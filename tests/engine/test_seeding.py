"""Draws depend on where in the run they are made, and on nothing else."""

import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch

from polopt.engine.seeding import generator, seed_sequence

GOLDEN = {
    (0, "rollout", 0, 0): 6844957005384495665,
    (0, "rollout", 1, 0): 685700532582892600,
    (1, "minibatches 2", 10**6, 7): 6539437101160579371,
    (-1, "Übung", 3, 0): 5417589274821528499,
}


@pytest.mark.parametrize(("position", "seed"), GOLDEN.items())
def test_seeds_never_change(position: tuple[int, str, int, int], seed: int) -> None:
    assert seed_sequence(*position) == seed


def test_draws_never_change() -> None:
    assert torch.randint(1000, (6,), generator=generator(0, "rollout", 0)).tolist() == [
        575,
        717,
        162,
        745,
        55,
        502,
    ]


def test_seeds_are_the_same_in_every_interpreter() -> None:
    program = (
        f"from polopt.engine.seeding import seed_sequence; print([seed_sequence(*p) for p in {list(GOLDEN)}])"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "12345",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONUTF8": "1",
    }
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == str(list(GOLDEN.values()))


def test_every_position_has_its_own_seed_of_63_bits() -> None:
    positions = list(product(range(-2, 10), ["", "a", "b", "a 1", "a\x001"], range(50), range(8)))
    seeds = {seed_sequence(*position) for position in positions}
    assert len(seeds) == len(positions) == 24_000
    assert min(seeds) >= 0 and 2**62 < max(seeds) < 2**63


def test_names_and_numbers_do_not_run_together() -> None:
    assert seed_sequence(1, "a", 11, 1) != seed_sequence(1, "a", 1, 11)
    assert seed_sequence(1, 'a", 1', 1) != seed_sequence(1, "a", 1, 1)


def test_generator_is_fresh_at_every_call() -> None:
    first, second = (torch.rand(5, generator=generator(3, "rollout", 2)) for _ in range(2))
    assert torch.equal(first, second)


def test_neighbouring_streams_are_independent() -> None:
    count = 20_000
    streams = [("rollout", 5, 0), ("score", 5, 0), ("rollout", 6, 0), ("rollout", 5, 1)]
    draws = torch.stack(
        [torch.randn(count, generator=generator(0, *s), dtype=torch.float64) for s in streams]
    )
    correlation = torch.corrcoef(draws) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / count**0.5


def test_first_draws_of_successive_iterations_are_uniform() -> None:
    first = np.array([torch.rand((), generator=generator(0, "rollout", i)).item() for i in range(2000)])
    counts, _ = np.histogram(first, bins=20, range=(0, 1))
    assert (
        (counts - 100) ** 2 / 100
    ).sum() < 60  # chi-squared of 19 degrees of freedom: exceeded with p = 5e-6
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / 2000**0.5


def test_seeds_serve_numpy_and_count_only_in_integers() -> None:
    assert np.random.default_rng(seed_sequence(0, "environment", 1)).random() < 1
    assert seed_sequence(np.int64(3), "a", np.int32(1)) == seed_sequence(3, "a", 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        seed_sequence(0.5, "a", 1)  # type: ignore[arg-type]
