"""The command line: `polopt train | resume | eval | compare | methods | tasks`."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from io import TextIOWrapper

import polopt
from polopt.engine.memory import restart_without_thread_cache
from polopt.errors import ConfigError, PoloptError
from polopt.settings import nearest

FAILED, REFUSED, DIVERGED, INTERRUPTED = 1, 2, 3, 130
COMMANDS = {
    "train": ("train:train", "train by a configuration file and flags"),
    "resume": ("train:resume", "continue a run"),
    "eval": ("evaluate:evaluate", "score a run on its held-out split"),
    "compare": ("compare:compare", "run methods under equal budgets and rank them"),
    "methods": ("listing:methods", "show recipes and parts (--json)"),
    "tasks": ("listing:tasks", "show tasks (--json)"),
}
"""By command: where its function is, and what it does."""
_LONGEST = 1000
"""Characters of a message."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        The exit code, see `usage`.
    """
    if argv is None:
        restart_without_thread_cache()
    _prepare_process()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _dispatch(arguments)
        finally:
            sys.stdout.flush()
    except PoloptError as error:
        sys.stderr.write(f"polopt: {_one_line(str(error))}\n")
        return _exit_code(error)
    except KeyboardInterrupt:
        sys.stderr.write("polopt: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit fails again
        return FAILED


def usage() -> str:
    """What `polopt --help` shows."""
    commands = "\n".join(f"  {name:8} {text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: polopt COMMAND ...

{commands}

`polopt COMMAND --help` lists the options of a command; `polopt --version` shows the version.

exit codes: 0 done; 1 failed (damaged checkpoint, full disk, ...); 2 the configuration was refused; 3 the training
diverged; 130 interrupted, `polopt resume RUN` goes on from the checkpoint.
"""


def _dispatch(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("--help", "-h"):
        sys.stdout.write(usage())
        return 0
    if command == "--version":
        sys.stdout.write(f"polopt {polopt.__version__}\n")
        return 0
    if command not in COMMANDS:
        raise ConfigError(
            f"{command!r}: unknown command; {nearest(command, [*COMMANDS, '--help', '--version'])}"
        )
    module, _, name = COMMANDS[command][0].partition(":")
    run: Callable[[Sequence[str]], int] = getattr(import_module(f"polopt.cli.{module}"), name)
    return run(rest)


def _prepare_process() -> None:
    """What must be so before torch is imported, and output that any terminal can show."""
    settings = {
        "GOMP_SPINCOUNT": "10000",  # idle threads sleep after microseconds, not milliseconds
        "THP_MEM_ALLOC_ENABLE": "1",  # large tensors in huge pages
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _exit_code(error: PoloptError) -> int:
    if isinstance(error, ConfigError):
        return REFUSED
    from polopt.engine.optimization import DivergedError

    return DIVERGED if isinstance(error, DivergedError) else FAILED


def _one_line(text: str) -> str:
    from polopt.engine.progress import printable

    line = printable(" ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
