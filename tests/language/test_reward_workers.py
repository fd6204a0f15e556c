"""One row's fault is that row's loss: nothing a reward function does may hang, crash or leak into the run."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from polopt.errors import ConfigError, PoloptError
from polopt.language.reward_workers import RewardFaults, RewardPool, source_of
from polopt.language.worker_pool import WorkerPool
from polopt.language.worker_process import FunctionSource

TIMEOUT = 1.0
REWARDS = """
import asyncio, math, os, re, signal, subprocess, sys, threading, time

class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no")

def hang(**_):
    while True:
        pass

def deaf(**_):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGIO):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass

def background(**_):
    threading.Thread(target=hang, daemon=True).start()
    return 1.0

def fork(**_):
    os.fork()
    return 1.0

def leak(pids, **_):
    child = subprocess.Popen(["sleep", "600"])
    open(pids, "a").write(f"{child.pid}\\n")
    return 1.0

def daemonise(pids, **_):
    script = f"sleep 600 & echo $! >> {pids}"
    subprocess.run(["setsid", "sh", "-c", script], check=True, close_fds=True)
    return 1.0

def hang_with_children(pids, **_):
    leak(pids)
    daemonise(pids)
    time.sleep(600)

def noise(**_):
    block = "x" * 1_000_000
    for _ in range(30):
        print(block)
        sys.stderr.write(block)
        os.write(1, block.encode())
    return 1.0

async def patient(**_):
    await asyncio.sleep(0.01)
    return 2.0

FAULTS = {
    "hang": hang,
    "deaf": deaf,
    "sleep": lambda **_: time.sleep(600),
    "regex": lambda **_: re.match(r"(a+)+$", "a" * 50 + "b"),
    "raise": lambda **_: 1 / 0,
    "unprintable": lambda **_: (_ for _ in ()).throw(Unprintable()),
    "recursion": lambda **_: FAULTS["recursion"](),
    "sys.exit": lambda **_: sys.exit(0),
    "os._exit": lambda **_: os._exit(0),
    "killed": lambda **_: os.kill(os.getpid(), signal.SIGKILL),
    "aborted": lambda **_: os.abort(),
    "unnamed signal": lambda **_: os.kill(os.getpid(), signal.SIGRTMIN + 5),
    "interrupt": lambda **_: (_ for _ in ()).throw(KeyboardInterrupt()),
    "closes": lambda **_: os.closerange(0, 100),
    "none": lambda **_: None,
    "nan": lambda **_: math.nan,
    "inf": lambda **_: math.inf,
    "-inf": lambda **_: -math.inf,
    "huge": lambda **_: 1e300,
    "integer": lambda **_: 10**400,
    "text": lambda **_: "1.0",
    "bytes": lambda **_: b"1.0",
    "list": lambda **_: [1.0],
    "long list": lambda **_: [1.0] * 10**6,
    "object": lambda **_: object(),
    "complex": lambda **_: 1j,
    "true": lambda **_: True,
    "slow": lambda **_: time.sleep(0.1) or 0.5,
    "background": background,
    "fork": fork,
    "leak": leak,
    "daemonise": daemonise,
    "hang with children": hang_with_children,
    "noise": noise,
    "fine": lambda **_: 0.25,
}

def reward(completion, **metadata):
    return FAULTS[completion](**metadata)

async def later(completion):
    await asyncio.sleep(0.01)
    return float(len(completion))

def length(completion: str):
    return len(completion)

def correct(completion, answer):
    return completion == answer

def everything(**keywords):
    return float(len(keywords))

not_a_function = 3
"""
KINDS = {
    "hang": "timeouts",
    "deaf": "timeouts",
    "sleep": "timeouts",
    "regex": "timeouts",
    "raise": "errors",
    "unprintable": "errors",
    "recursion": "errors",
    "sys.exit": "errors",
    "os._exit": "died",
    "killed": "died",
    "aborted": "died",
    "unnamed signal": "died",
    "interrupt": "died",
    "closes": "died",
    "none": "missing",
    "nan": "missing",
    "inf": "infinite",
    "-inf": "infinite",
    "huge": "infinite",
    "integer": "malformed",
    "text": "malformed",
    "bytes": "malformed",
    "list": "malformed",
    "long list": "malformed",
    "object": "malformed",
    "complex": "malformed",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("user") / "user_rewards.py"
    path.write_text(REWARDS)
    return str(path)


@pytest.fixture(scope="module")
def pool(file: str) -> Iterator[RewardPool]:
    with RewardPool([FunctionSource(file, "reward")], timeout=TIMEOUT, workers=2) as pool:
        yield pool.start()


def rows(*completions: str, **metadata: str) -> list[dict[str, str]]:
    return [{"completion": completion, **metadata} for completion in completions]


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return status != "Z"


def eventually_dead(pids: list[int]) -> bool:
    end = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def worker_pids(pool: RewardPool) -> list[int]:
    assert pool._pool
    return [worker.process.pid for worker in pool._pool._workers]


@pytest.mark.parametrize("completion", KINDS)
def test_a_fault_costs_its_own_row_only_and_is_counted(pool: RewardPool, completion: str) -> None:
    started = time.monotonic()
    rewards, faults = pool.score(rows("fine", completion, "fine"))
    assert time.monotonic() - started < TIMEOUT + 5
    assert rewards[:, 0].nan_to_num(nan=-1).tolist() == [0.25, -1.0, 0.25]
    kind = KINDS[completion]
    assert dict(faults.items()) == {name: 0 for name, _ in faults.items()} | {"calls": 3, kind: 1}
    assert faults.total == (kind != "missing")
    assert (len(faults.messages) == 1) == (kind != "missing")
    assert all(len(message) < 600 and "\n" not in message for message in faults.messages)
    assert pool.score(rows("fine"))[0].item() == 0.25


def test_all_faults_at_once_leave_the_other_rows_alone(pool: RewardPool) -> None:
    names = [name for name, kind in KINDS.items() if kind != "timeouts"]
    rewards, faults = pool.score(rows(*(name for fault in names for name in (fault, "fine"))))
    assert rewards[1::2, 0].tolist() == [0.25] * len(names)
    assert rewards[::2].isnan().all()
    assert faults.total + faults.missing == len(names)


def test_a_call_in_which_every_row_hangs_ends_after_its_deadlines(file: str) -> None:
    with RewardPool([FunctionSource(file, "reward")], timeout=0.5, workers=2) as pool:
        rewards, faults = pool.score(rows(*["hang"] * 4))
    assert rewards.isnan().all()
    assert faults.timeouts == faults.total == 4


def test_slow_but_fine_is_fine(pool: RewardPool) -> None:
    rewards, faults = pool.score(rows("slow", "true", "slow"))
    assert rewards[:, 0].tolist() == [0.5, 1.0, 0.5]
    assert not faults.total


def test_a_hanging_background_thread_cannot_outlive_its_deadline(pool: RewardPool) -> None:
    rewards, _ = pool.score(rows(*["background", "fine"] * 3))
    assert set(rewards.nan_to_num(nan=-1)[:, 0].tolist()) <= {0.25, 1.0, -1.0}


def test_a_forking_function_answers_once(pool: RewardPool) -> None:
    rewards, _ = pool.score(rows(*["fork", "fine"] * 8))
    assert rewards[:, 0].tolist() == [1.0, 0.25] * 8


def test_printing_without_end_is_swallowed(pool: RewardPool, capfd: pytest.CaptureFixture[str]) -> None:
    rewards, _ = pool.score(rows("noise"))
    assert rewards.item() == 1.0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("completion", ["leak", "daemonise", "hang with children"])
def test_children_die_with_their_worker(file: str, tmp_path: Path, completion: str) -> None:
    pids = tmp_path / "pids"
    with RewardPool([FunctionSource(file, "reward")], timeout=TIMEOUT, workers=1) as pool:
        pool.score(rows(completion, pids=str(pids)))
        if completion != "hang with children":
            assert all(map(alive, map(int, pids.read_text().split())))
    children = [int(pid) for pid in pids.read_text().split()]
    assert children
    assert eventually_dead(children)


def test_closing_leaves_no_process_and_no_open_file(file: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    pool = RewardPool([FunctionSource(file, "reward")], timeout=TIMEOUT, workers=2)
    pool.score(rows("fine", "os._exit", "fine", "hang"))
    pool.score(rows("fine"))
    pids = worker_pids(pool)
    assert pids
    pool.close()
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids), "not even a zombie"
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(PoloptError, match="closed"):
        pool.score(rows("fine"))


def test_a_forgotten_pool_is_closed(file: str) -> None:
    pool = RewardPool([FunctionSource(file, "reward")], timeout=TIMEOUT, workers=1).start()
    pids = worker_pids(pool)
    del pool
    gc.collect()
    assert eventually_dead(pids)


@pytest.mark.parametrize("ending", ["", "os.kill(os.getpid(), 9)", "raise SystemExit(3)"])
def test_workers_die_with_the_parent_even_when_hung(file: str, tmp_path: Path, ending: str) -> None:
    pids = tmp_path / "pids"
    script = f"""
import os, threading, time
from pathlib import Path
from polopt.language.worker_pool import WorkerPool
from polopt.language.worker_process import FunctionSource
pool = WorkerPool([FunctionSource({file!r}, "reward")], timeout=600, workers=2)
pool.start()
call = (0, {{"completion": "regex"}})
threading.Thread(target=pool.run, args=([call, call],), daemon=True).start()
while sum(worker.call is not None for worker in pool._workers) < 2:
    time.sleep(0.01)
Path({str(pids)!r}).write_text(" ".join(str(worker.process.pid) for worker in pool._workers))
{ending}
"""
    subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
    )
    assert len(pids.read_text().split()) == 2
    assert eventually_dead([int(pid) for pid in pids.read_text().split()])


def test_works_from_threads_at_once(pool: RewardPool) -> None:
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: pool.score(rows("fine", "raise", "fine")), range(8)))
    assert all(faults.errors == 1 for _, faults in results)
    assert all(rewards[::2, 0].tolist() == [0.25, 0.25] for rewards, _ in results)


def test_several_functions_give_columns_with_names(file: str) -> None:
    names = ["length", "later", "correct", "everything"]
    with RewardPool([FunctionSource(file, name) for name in names], timeout=TIMEOUT, workers=2) as pool:
        rewards, faults = pool.score(
            [{"completion": "abc", "answer": "abc", "extra": 1}, {"completion": "a", "answer": "b"}]
        )
    assert pool.names == tuple(names)
    assert rewards.tolist() == [[3.0, 3.0, 1.0, 3.0], [1.0, 1.0, 0.0, 2.0]]
    assert faults == RewardFaults(calls=8)


def test_no_rows_give_no_rewards(pool: RewardPool) -> None:
    rewards, faults = pool.score([])
    assert rewards.shape == (0, 1)
    assert faults == RewardFaults()


def test_large_texts_pass(pool: RewardPool, file: str) -> None:
    with RewardPool([FunctionSource(file, "length")], timeout=5.0, workers=1) as lengths:
        assert lengths.score(rows("x" * 5_000_000))[0].item() == 5e6


def test_a_keyword_that_cannot_be_sent_costs_its_row(file: str) -> None:
    with RewardPool([FunctionSource(file, "everything")], timeout=TIMEOUT, workers=1) as pool:
        rewards, faults = pool.score([{"lock": threading.Lock()}, {"completion": "x"}])
    assert rewards[:, 0].nan_to_num(nan=-1).tolist() == [-1.0, 1.0]
    assert faults.errors == 1


@pytest.mark.parametrize(
    ("content", "function", "words"),
    [
        ("import no_such_module", "reward", "ModuleNotFoundError"),
        ("def reward(:", "reward", "SyntaxError"),
        ("def rewrad(): ...", "reward", "rewrad"),
        ("reward = 3", "reward", "no function 'reward'"),
        ("raise SystemExit", "reward", "SystemExit"),
        ("import os; os._exit(4)", "reward", "status 4"),
        (None, "reward", "no file"),
    ],
)
def test_functions_that_cannot_be_loaded_are_refused_in_one_line(
    tmp_path: Path, content: str | None, function: str, words: str
) -> None:
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with (
        pytest.raises(ConfigError, match=words) as error,
        RewardPool([FunctionSource(str(path), function)]) as pool,
    ):
        pool.start()
    assert "mine.py" in str(error.value)
    assert "reward" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_hangs_on_import_costs_its_start_up_time_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("while True: pass")
    with WorkerPool([FunctionSource(str(path), "f")], timeout=1, workers=2, startup_timeout=0.5) as pool:
        with pytest.raises(ConfigError, match=r"no answer within 0\.5 s"):
            pool.start()
        outcomes = pool.run([(0, {})] * 50)
    assert {outcome.kind for outcome in outcomes} == {"died"}
    assert "no worker could be started" in outcomes[0].message


def test_files_may_import_their_neighbours_and_are_not_shadowed_by_ours(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("VALUE = 7.0")
    (tmp_path / "mine.py").write_text("import neighbour, json\ndef reward(): return neighbour.VALUE")
    (tmp_path / "json.py").write_text(
        "raise RuntimeError('a neighbour must not replace the standard library')"
    )
    with RewardPool([FunctionSource(str(tmp_path / "mine.py"), "reward")], workers=1) as pool:
        assert pool.score([{}])[0].item() == 7.0


def top_level(completion: str) -> float:
    return float(len(completion))


async def waits(completion: str) -> float:
    if completion == "hang":
        await asyncio.sleep(600)
    if completion == "raise":
        raise ValueError(completion)
    return float(len(completion))


def test_functions_are_found_by_module_or_refused() -> None:
    source = source_of(os.path.getsize)
    assert (source.module, source.function) == ("genericpath", "getsize")

    def local() -> float:
        return 0.0

    for function in (local, lambda: 0.0):
        with pytest.raises(ConfigError, match="in_process=True"):
            RewardPool([function])
    with pytest.raises(ConfigError, match="rename"):
        RewardPool([FunctionSource("a.py", "reward"), FunctionSource("b.py", "reward")])


def test_in_process_faults_cost_their_rows() -> None:
    with RewardPool([top_level, waits, lambda completion: completion], in_process=True, timeout=0.5) as pool:
        rewards, faults = pool.score(rows("abc", "hang", "raise", "abc"))
    assert rewards.nan_to_num(nan=-1).tolist() == [[3, 3, -1], [4, -1, -1], [5, -1, -1], [3, 3, -1]]
    assert (faults.timeouts, faults.errors, faults.malformed) == (1, 1, 4)


def test_in_process_async_calls_run_together() -> None:
    arrived = []

    async def meet(completion: str) -> float:
        arrived.append(completion)
        while len(arrived) < 8:
            await asyncio.sleep(0.001)
        return 1.0

    with RewardPool([meet], in_process=True, timeout=10.0) as pool:
        assert pool.score(rows(*"abcdefgh"))[0].sum() == 8


def test_in_process_works_inside_a_running_event_loop() -> None:
    async def caller() -> float:
        with RewardPool([waits], in_process=True) as pool:
            return pool.score(rows("abc"))[0].item()

    assert asyncio.run(caller()) == 3.0


def test_an_interrupt_in_process_is_the_users() -> None:
    def interrupt() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), RewardPool([interrupt], in_process=True) as pool:
        pool.score([{}])


def test_faults_add_up() -> None:
    one = RewardFaults(calls=3, timeouts=1, messages=("a", "b"))
    two = RewardFaults(calls=2, timeouts=2, infinite=1, messages=("c", "d"))
    assert one + two == RewardFaults(calls=5, timeouts=3, infinite=1, messages=("a", "b", "c"))
    assert (one + two).total == 4


@pytest.mark.parametrize(("field", "value"), [("timeout", 0.0), ("timeout", float("nan")), ("workers", 0)])
def test_impossible_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        WorkerPool([FunctionSource("a.py", "f")], **{"timeout": 1.0, field: value})  # type: ignore[arg-type]
