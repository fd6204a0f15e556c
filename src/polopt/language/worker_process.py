"""What runs inside a worker process: load functions, answer one call at a time.

Standard library only, so that replacing a killed worker costs a bare interpreter start (about 50 ms). The parent sends
calls over its own socket; whatever comes back is JSON.
"""

import ctypes
import fcntl
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

MAX_MESSAGE = 500
"""Characters of an error message that are kept."""
MAX_TEXT = 100_000
"""Characters of a text that a function may return."""
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class FunctionSource:
    """Where a worker finds a function."""

    module: str
    """Path of a Python file (ends in `.py`) or name of an importable module."""
    function: str
    """Name of a function at the top level of it."""
    options: dict[str, Any] | None = None
    """If given, the function is called once with these keywords and returns the function to use."""

    def load(self) -> Callable[..., Any]:
        """Import the module and fetch the function.

        Raises:
            Exception: whatever importing the module raises.
            AttributeError: the module has no such function.
        """
        function = self.find(self.import_module())
        return function if self.options is None else function(**self.options)

    def import_module(self) -> ModuleType:
        """Import the file or module."""
        return load_file(self.module) if self.module.endswith(".py") else importlib.import_module(self.module)

    def find(self, module: ModuleType) -> Callable[..., Any]:
        """The function in its module.

        Raises:
            AttributeError: there is none of that name.
        """
        function = getattr(module, self.function, None)
        if not callable(function):
            defined = ", ".join(name for name, value in vars(module).items() if inspect.isfunction(value))
            raise AttributeError(f"there is no function {self.function!r}; defined are: {defined or 'none'}")
        return function


def load_file(path: str) -> ModuleType:
    """Import a Python file under a name of its own; modules beside it can be imported by it.

    Raises:
        FileNotFoundError: no such file.
        Exception: whatever the file raises.
    """
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}")
    name = f"polopt_user_{os.path.basename(path).removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    if os.path.dirname(path) not in sys.path:
        sys.path.append(os.path.dirname(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def accepted(function: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords that a function takes, so that it need name only what it uses."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return keywords
    return {name: value for name, value in keywords.items() if name in parameters}


def reply_to(value: Any) -> dict[str, Any]:
    """A function's result as JSON: `{"value": None | number | text}` or `{"malformed": what it is}`."""
    if value is None:
        return {"value": None}
    if isinstance(value, str):
        return (
            {"value": value}
            if len(value) <= MAX_TEXT
            else {"malformed": f"a text of {len(value)} characters"}
        )
    try:
        return {"malformed": "bytes"} if isinstance(value, bytes | bytearray) else {"value": float(value)}
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return {"malformed": f"a {type(value).__name__}"}


def describe(error: BaseException) -> str:
    """One bounded line for an exception, even for one that cannot be printed."""
    try:
        text = " ".join(str(error)[:MAX_MESSAGE].split())
    except Exception:
        text = "(its message raised)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def answer_call(function: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """Call a function, sync or async, with those of the keywords that it takes; whatever happens is a JSON reply."""
    try:
        value = function(**accepted(function, keywords))
        if inspect.iscoroutine(value):
            import asyncio  # more than half of a worker's start-up time, and seldom needed

            value = asyncio.run(value)
        return reply_to(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: the function's own exit is its error
        return {"error": describe(error)}


def _bind_to_parent(lifeline: int) -> None:
    """Let the kernel end this process group when the parent's end of the lifeline closes, whatever runs here."""
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")


def main() -> None:
    """Serve calls until the parent hangs up."""
    channel, lifeline = int(sys.argv[1]), int(sys.argv[2])
    for descriptor in (channel, lifeline):
        os.set_inheritable(descriptor, False)
    _bind_to_parent(lifeline)
    connection, process = Connection(channel), os.getpid()
    sys.path[:], sources = connection.recv()
    try:
        functions = [FunctionSource(**source).load() for source in sources]
    except BaseException as error:
        connection.send_bytes(json.dumps({"error": describe(error)}).encode())
        return
    connection.send_bytes(json.dumps({"ready": process}).encode())
    while True:
        try:
            index, keywords = connection.recv()
        except (EOFError, OSError):
            return
        except Exception as error:  # a keyword of a class that cannot be imported here
            reply = {"error": describe(error)}
        else:
            reply = answer_call(functions[index], keywords)
        if os.getpid() != process:  # the function forked and its child came back too
            os._exit(0)
        connection.send_bytes(json.dumps(reply).encode())


if __name__ == "__main__":
    main()
