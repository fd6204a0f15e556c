import os
import subprocess
import sys

import pytest

from polopt.cli import main
from polopt.engine import memory

PROGRAM = """
import os, sys
from polopt.engine.memory import restart_without_thread_cache
print("started")
sys.stdout.flush()
restart_without_thread_cache()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:])
"""
glibc = pytest.mark.skipif(memory._GLIBC is None, reason="the C library is not glibc")


@glibc
@pytest.mark.parametrize(
    ("before", "starts", "after"),
    [
        (None, 2, "glibc.malloc.tcache_count=0"),
        ("glibc.malloc.perturb=1", 2, "glibc.malloc.perturb=1:glibc.malloc.tcache_count=0"),
        ("glibc.malloc.tcache_count=3", 1, "glibc.malloc.tcache_count=3"),
    ],
)
def test_a_process_restarts_once_with_its_arguments_and_leaves_what_is_set(before, starts, after):
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if before:
        environment["GLIBC_TUNABLES"] = before
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "a b", "--c"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["started"] * starts + [f"{after} ['a b', '--c']"]


def test_a_command_that_a_program_runs_does_not_restart_it(monkeypatch, capsys):
    monkeypatch.setattr(memory.os, "execv", lambda *_: pytest.fail("restarted"))
    assert main(["--version"]) == 0
