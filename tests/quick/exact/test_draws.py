"""Draws of other threads, which libraries make, and what the training draws."""

import _thread
import os
import pickle
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import pytest
import torch

from labtrain.data.loader import DataLoader
from labtrain.exact import determinism
from labtrain.exact.draws import share_draws, take_draws
from labtrain.record.digests import digest_tree

FUNCTIONS = (random.random, random.getrandbits)  # as a module imports them that is imported before the run
said: list[str] = []


@pytest.fixture
def run() -> Iterator[None]:
    said.clear()
    give_back = take_draws(said.append)
    yield
    give_back()


def in_thread_of_a_library() -> float:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(random.random).result()


class Streamed(torch.utils.data.Dataset[torch.Tensor]):
    """Waits in each sample for a thread of a library, which draws if the network is slow."""

    def __init__(self, slow: bool) -> None:
        self.slow = slow

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        first = random.random()
        if self.slow:
            in_thread_of_a_library()
        return torch.tensor([first, random.gauss(0, 1), random.choice(range(100))])


@pytest.mark.parametrize("start", ["here", "fork", "spawn"])
def test_a_sample_does_not_depend_on_what_another_thread_draws(run: None, start: str) -> None:
    determinism.set_run(seed=7, mode="strict")
    workers = {} if start == "here" else {"num_workers": 1, "multiprocessing_context": start}
    try:
        slow, fast = (digest_tree(list(DataLoader(Streamed(slow), 4, **workers))) for slow in (True, False))  # type: ignore[arg-type]
    finally:
        determinism.set_run(seed=0, mode="off")
    assert slow == fast


def test_functions_that_were_imported_before_draw_for_the_training(run: None) -> None:
    random.seed(1)
    expected = [random.random(), random.getrandbits(32), random.random()]
    random.seed(1)
    assert [FUNCTIONS[0](), FUNCTIONS[1](32), random.random()] == expected
    assert not said


def test_threads_that_train_draw_from_the_same_generator(run: None) -> None:
    """labtrain's own threads, and torch's, which Python has not started."""
    drawn: Queue[float] = Queue()

    def shared() -> None:
        share_draws()
        drawn.put(random.random())

    random.seed(1)
    expected = [random.random(), random.random()]
    random.seed(1)
    thread = threading.Thread(target=shared)
    thread.start()
    thread.join()
    _thread.start_new_thread(lambda: drawn.put(random.random()), ())
    assert [drawn.get(timeout=10), drawn.get(timeout=10)] == expected
    assert not said


def test_the_first_thread_that_draws_is_named(run: None) -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    for name in ("reads ahead", "reads more"):
        thread = threading.Thread(target=lambda: random.seed(random.randint(0, 9)), name=name)
        thread.start()
        thread.join()
    assert random.random() == expected
    (warning,) = said
    assert "thread 'reads ahead'" in warning


def test_one_thread_that_loads_samples_draws_the_same_for_each(run: None) -> None:
    """Whatever was drawn before, and also where a thread that trains has seeded."""

    def seed() -> None:
        share_draws()
        random.seed(5)

    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as shard:
        drawn = []
        for number in (5, 6, 5):
            random.seed(number)
            drawn.append([pool.submit(random.random).result(), pool.submit(random.gauss, 0, 1).result()])
        shard.submit(seed).result()
        drawn.append([pool.submit(random.random).result(), pool.submit(random.gauss, 0, 1).result()])
    first, second, again, shards = drawn
    assert first == again == shards != second


def test_a_delivery_that_draws_is_not_reported(run: None) -> None:
    """A thread that runs code of labtrain's, here of the class that checks datasets."""
    rows = DataLoader(Streamed(False), 4)
    thread = threading.Thread(target=lambda: list(rows))
    thread.start()
    thread.join()
    assert not said


def test_a_forked_process_draws_from_what_it_seeds(run: None) -> None:
    """Also if another thread has forked it: only that thread is left."""
    random.seed(1)
    expected = random.random(), random.random()
    reading, writing = os.pipe()

    def fork() -> None:
        if os.fork() == 0:
            random.seed(1)
            os.write(writing, pickle.dumps((random.random(), FUNCTIONS[0]())))
            os._exit(0)
        os.wait()

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        assert pickle.load(file) == expected


def test_after_the_run_random_is_as_before() -> None:
    real = {name: value for name, value in vars(random).items() if not name.startswith("__")}
    outer = take_draws(print)
    inner = take_draws(print)
    assert random.random is not real["random"]
    assert pickle.loads(pickle.dumps(random.random)) is random.random
    captured = random.random
    inner()
    outer()
    assert {name: value for name, value in vars(random).items() if not name.startswith("__")} == real
    random.seed(1)
    expected = random.random()
    random.seed(1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(captured).result() == expected
