"""How a person stops a run."""

import os
import signal
import threading

import pytest

from polopt.engine.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops_at_once(number: signal.Signals) -> None:
    interrupt = Interrupt()
    with interrupt.listening():
        os.kill(os.getpid(), number)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def fail_while_listening() -> None:
    with Interrupt().listening():
        raise ValueError("inside")


def test_handlers_are_put_back_whatever_happens_inside() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="inside"):
        fail_while_listening()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_other_threads_change_no_handler() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def listen() -> None:
        with Interrupt().listening():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]
