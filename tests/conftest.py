"""What every test runs under, with `make test` or with plain `pytest`."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and inherited by the processes that tests start: tests run side by side, one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes and types in the signatures of the mathematics are checked at every call. beartype cannot check Self, which
# needs the class, in a function that is decorated alone.
SELF_IS_ANYTHING = "beartype.BeartypeConf(is_pep484_tower=True, hint_overrides=beartype.FrozenDict({beartype.typing.Self: object}))"
install_import_hook(["polopt.functional", "polopt.methods"], f"beartype.beartype(conf={SELF_IS_ANYTHING})")

settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options are read before the folders under `tests/` are."""
    data = Path(__file__).parent / "vectors" / "data"
    parser.addoption("--vectors", type=Path, default=data, help="folder of JSON test vectors")


@pytest.fixture(autouse=True, scope="module")
def registry_as_it_was() -> Iterator[None]:
    """What the tests of a module register is gone afterwards, so that no other test sees it, in whatever order they run."""
    from polopt import registry

    registry.load_all()
    tables = (registry._parts, registry._recipes)
    before = [{name: dict(known) for name, known in table.items()} for table in tables]
    yield
    for table, known in zip(tables, before, strict=True):
        table.clear()
        table.update(known)
