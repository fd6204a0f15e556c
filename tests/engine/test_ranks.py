"""One process is one rank; several share the work and get what one would get."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import polopt
from polopt.engine.ranks import Piece, Ranks
from polopt.engine.sharding import full_state, layers, load_full_state
from polopt.errors import ConfigError
from polopt.functional.blocks import side_by_side

CHECKS = Path(__file__).with_name("two_ranks")
LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION")


@pytest.fixture(autouse=True)
def _nobody_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def run_on_two_ranks(kind: str, folder: Path) -> list[str]:
    """Both processes' output of one kind of checks."""
    warnings = "ignore" if kind == "language" else "error"  # transformers has some of its own
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    paths = [Path(__file__).parents[2], Path(str(polopt.__file__)).parents[1]]
    shared["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", warnings, "-m", "tests.engine.two_ranks.worker", kind],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["replicated", "sharded", "language"])
def test_two_processes_get_what_one_gets(kind: str, tmp_path: Path) -> None:
    if kind == "language":
        pytest.importorskip("transformers")
    checks = re.findall(r"^def (check_\w+)", (CHECKS / f"{kind}.py").read_text(), re.MULTILINE)
    assert checks
    for output in run_on_two_ranks(kind, tmp_path):
        assert [line for line in output.splitlines() if line] == [f"passed {check}" for check in checks]


@st.composite
def micro_batches(draw: st.DrawFn) -> tuple[list[Tensor], Tensor]:
    """Rows cut anywhere, with their lengths."""
    count = draw(st.integers(1, 24))
    order = draw(st.permutations(range(count)))
    cuts = sorted(draw(st.sets(st.integers(1, count - 1)))) if count > 1 else []
    lengths = torch.tensor(draw(st.lists(st.integers(0, 50), min_size=count, max_size=count)))
    return [torch.tensor(order[a:b]) for a, b in zip([0, *cuts], [*cuts, count], strict=True)], lengths


def shares(pieces: list[Tensor], lengths: Tensor, world: int) -> list[list[Piece]]:
    return [Ranks(rank, world).share(pieces, lengths) for rank in range(world)]


@given(case=micro_batches(), world=st.integers(1, 5))
def test_every_row_counts_once_and_every_rank_has_as_many_passes(
    case: tuple[list[Tensor], Tensor], world: int
) -> None:
    pieces, lengths = case
    dealt = shares(pieces, lengths, world)
    counted = [int(row) for mine in dealt for piece in mine if piece.counts for row in piece.rows]
    assert sorted(counted) == list(range(len(lengths)))
    assert len({len(mine) for mine in dealt}) == 1
    assert all(len(piece.rows) for mine in dealt for piece in mine)
    idle = sum(not piece.counts for mine in dealt for piece in mine)
    assert idle < world
    assert idle == 0 or all(len(piece.rows) == 1 for mine in dealt for piece in mine)


@given(case=micro_batches(), world=st.integers(2, 5))
def test_micro_batches_are_never_joined(case: tuple[list[Tensor], Tensor], world: int) -> None:
    pieces, lengths = case
    given_ = [set(piece.tolist()) for piece in pieces]
    for mine in shares(pieces, lengths, world):
        for piece in mine:
            assert any(set(piece.rows.tolist()) <= rows for rows in given_)


def test_one_process_keeps_its_micro_batches_as_they_are() -> None:
    pieces = [torch.tensor([2, 0]), torch.tensor([1])]
    share = Ranks().share(pieces, torch.tensor([1, 2, 3]))
    assert [piece.rows.tolist() for piece in share] == [[2, 0], [1]]
    assert all(piece.counts for piece in share)


def test_work_is_balanced_in_every_pass_and_over_all() -> None:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (96,), generator=g)
    dealt = shares(list(lengths.argsort().split(8)), lengths, 4)
    work = torch.tensor([[int(lengths[piece.rows].sum()) for piece in mine] for mine in dealt])
    assert work.sum(1).max() <= 1.1 * work.sum(1).double().mean()
    assert (work.amax(0) <= 1.7 * work.double().mean(0)).all()


def test_a_single_micro_batch_is_shared_too() -> None:
    dealt = shares([torch.arange(64)], torch.full((64,), 10), 4)
    assert [[len(piece.rows) for piece in mine] for mine in dealt] == [[16]] * 4


def test_ranks_without_rows_do_work_that_does_not_count() -> None:
    dealt = shares([torch.tensor([0, 1])], torch.tensor([5, 5]), 3)
    assert [[(len(p.rows), p.counts) for p in mine] for mine in dealt] == [
        [(1, True)],
        [(1, True)],
        [(1, False)],
    ]


def test_one_process_is_said_to_be_one() -> None:
    ranks = Ranks.start()
    assert (ranks.rank, ranks.world, ranks.is_main) == (0, 1, True)
    assert ranks.describe() == "1 process"
    assert Ranks.start(expected=1).world == 1


def test_one_process_has_nobody_to_talk_to() -> None:
    ranks, tensor = Ranks.start(), torch.tensor([1.0, 2.0])
    assert ranks.sum(tensor) is tensor
    ranks.barrier()
    ranks.close()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "arguments", "reasons"),
    [
        ({}, {"expected": 2}, ["ranks = 2", "1 process", "torchrun --nproc-per-node 2"]),
        ({"WORLD_SIZE": "3"}, {"expected": 2}, ["ranks = 2", "3 processes"]),
        ({"WORLD_SIZE": "2", "RANK": "0"}, {}, ["WORLD_SIZE = 2", "MASTER_ADDR, MASTER_PORT", "torchrun"]),
        ({}, {"sharding": "fsdp2"}, ["sharding = 'fsdp2'", "1 process", "torchrun", "'none'"]),
        ({}, {"sharding": "fsdp"}, ["sharding = 'fsdp'", "none, fsdp2"]),
    ],
)
def test_runs_that_are_not_as_asked_are_refused(
    environment: dict[str, str],
    arguments: dict[str, Any],
    reasons: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        Ranks.start(**arguments)
    assert all(reason in str(error.value) for reason in reasons), error.value
    assert "\n" not in str(error.value)


ACCELERATE_CPU = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
"""What `accelerate launch --cpu` sets; with --num_processes 2 it adds the two below and starts one process."""
IN_VAIN = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("expected", [None, 2])
def test_accelerate_that_starts_one_process_for_several_is_found_out(
    expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (ACCELERATE_CPU | IN_VAIN).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"accelerate launch --cpu.*--multi_gpu"):
        Ranks.start(expected=expected)
    assert Ranks.start(expected=1).world == 1


def test_accelerate_with_one_process_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ACCELERATE_CPU.items():
        monkeypatch.setenv(name, value)
    assert Ranks.start().world == 1


def test_layers_are_the_entries_of_the_outermost_lists() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 2)
            self.layers = nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])}) if i else nn.Sequential()
                for i in range(2)
            )
            self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2), nn.Tanh()]), nn.Linear(2, 3)])
            self.head = nn.Linear(2, 3)

    decoder: Any = Decoder()
    experts, inner = decoder.layers[1]["experts"], decoder.blocks[0]
    found = list(layers(nn.ModuleDict({"policy": decoder})))
    assert found == [decoder.layers[0], experts[0], inner[0], inner[1], decoder.blocks[1]]


def make_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    module[0].weight.requires_grad_(False)
    last, *rest = [p for p in module.parameters() if p.requires_grad][::-1]
    return module, torch.optim.AdamW([{"params": [last], "lr": 0.1}, {"params": rest}], lr=0.01)


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    module(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


def test_state_by_names_continues_a_run_bit_for_bit() -> None:
    module, optimizer = make_model()
    step(module, optimizer)
    model, state = full_state(module, optimizer)
    assert state["param_groups"][0]["params"] == ["2.bias"]
    assert state["state"].keys() == {"0.bias", "2.weight", "2.bias"}
    model = {name: tensor.clone() for name, tensor in model.items()}
    state["state"] = {n: {k: v.clone() for k, v in values.items()} for n, values in state["state"].items()}
    other, another = make_model()
    load_full_state(other, another, model, state)
    for _ in range(2):
        step(module, optimizer)
        step(other, another)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_taking_a_state_changes_nothing() -> None:
    module, optimizer = make_model()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    _, state = full_state(module, optimizer)
    assert state["state"] == {}
    assert not optimizer.state
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_gradients_in_one_block_are_clipped_as_those_apart() -> None:
    apart, together = make_model()[0], make_model()[0]
    draws = torch.Generator().manual_seed(0)
    for one, other, place in zip(
        apart.parameters(), together.parameters(), side_by_side(list(together.parameters())), strict=True
    ):
        one.grad = torch.randn(one.shape, generator=draws)
        other.grad = place.copy_(one.grad)
    found = [Ranks().clip_gradients(list(module.parameters()), 0.3) for module in (apart, together)]
    assert float(found[0]) > 0.3
    torch.testing.assert_close(found[1], found[0])
    for one, other in zip(apart.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)


def test_clipping_reports_the_norm_before_it() -> None:
    module, optimizer = make_model()
    step(module, optimizer)
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in grads]).norm()
    found = Ranks().clip_gradients(list(module.parameters()), 0.5 * float(norm))
    assert torch.allclose(found, norm)
    assert torch.allclose(torch.stack([g.norm() for g in grads]).norm(), 0.5 * norm, rtol=1e-4)
