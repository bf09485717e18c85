"""What a process remembers of signals. What a training does with them is in test_training.py and test_exact.py."""

import os
import signal
import subprocess
import sys
import time

import pytest

from labtrain.base.signals import NUMBERS, Stopped, Wishes, children_of
from tests.support.waiting import wait_until


def arrived(wishes: Wishes) -> float:
    """Return the signal that is remembered; SIGUSR1 comes by way of a thread."""
    wait_until(lambda: wishes.numbers()[0], 5)
    return wishes.numbers()[0]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_is_remembered_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in NUMBERS], signal.pthread_sigmask(signal.SIG_BLOCK, ())
    wishes = Wishes()
    with wishes.listening(leads=True):
        assert wishes.numbers() == (0.0, 0.0)
        os.kill(os.getpid(), number)
        assert arrived(wishes) == number
        os.kill(os.getpid(), signal.SIGTERM)  # as the kernel sends it for each thread of a parent that dies
        assert wishes.numbers() == (float(number), 0.0)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second Ctrl-C ends the process
    assert ([signal.getsignal(each) for each in NUMBERS], signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before


def test_before_the_first_step_it_stops_at_once_but_on_other_ranks() -> None:
    def signalled() -> None:
        with Wishes().listening(leads=True):
            os.kill(os.getpid(), signal.SIGUSR1)
            for _ in range(500):
                time.sleep(0.01)  # fixed: what the signal ends

    before = [signal.getsignal(each) for each in NUMBERS], signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(Stopped, match="SIGUSR1"):
        signalled()
    assert ([signal.getsignal(each) for each in NUMBERS], signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before
    wishes = Wishes()
    with wishes.listening(leads=False):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert arrived(wishes) == signal.SIGUSR1


def test_one_that_has_waited_leaves_nothing_behind_where_it_stops_a_training() -> None:
    """In a process of its own: this one's other threads have it not blocked."""
    code = (
        "import os, signal; from labtrain.base.signals import NUMBERS, Stopped, Wishes, children_of, block\n"
        "block(); os.kill(os.getpid(), signal.SIGUSR1)\n"
        "state = lambda: ([signal.getsignal(each) for each in NUMBERS], signal.pthread_sigmask(signal.SIG_BLOCK, ()))\n"
        "before = state()\n"
        "try:\n"
        "    with Wishes().listening(leads=True):\n"
        "        while True: pass\n"
        "except Stopped as stopped: print(stopped, state() == before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout == "SIGUSR1 True\n", done.stderr


def test_a_signal_that_comes_before_anybody_listens_waits() -> None:
    """Over execve too; and what is started in the meantime has it blocked and lives."""
    listens = (
        "import subprocess, sys, time; from labtrain.base.signals import Wishes\n"
        "wishes = Wishes()\n"
        "with wishes.listening(leads=False):\n"
        "    child = subprocess.Popen(['sleep', '0.2'])\n"
        "    child.send_signal(10)\n"
        "    while not wishes.numbers()[0]: time.sleep(0.01)\n"  # fixed: between two looks
        "    print(wishes.signum, child.wait())\n"
    )
    starts = (
        "import os, sys; from labtrain.base.signals import block\n"
        f"block(); os.kill(os.getpid(), 10); os.execv(sys.executable, [sys.executable, '-c', {listens!r}])"
    )
    done = subprocess.run([sys.executable, "-c", starts], capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout == "10 0\n", done.stderr


def test_what_all_agree_on_is_the_most_that_any_wants() -> None:
    wishes = Wishes(every_seconds=1e-9)
    assert wishes.numbers() == (0.0, 1.0)
    wishes.agree(15.0, 0.0)
    assert (wishes.agreed_stop, wishes.agreed_save) == (15, False)


def test_a_stop_is_no_exception_that_code_swallows() -> None:
    assert not issubclass(Stopped, Exception)
    assert str(Stopped(signal.SIGUSR1)) == "SIGUSR1"


def test_a_process_ends_with_its_parent() -> None:
    """The parent is killed; the kernel ends the child, which would say in a while that it is alive."""
    child = "import os, signal, time; from labtrain.base.signals import end_with_parent; "
    child += "end_with_parent(os.getppid(), signal.SIGKILL); print('here', flush=True); time.sleep(20); print('alive')"  # fixed: it is ended in this
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"  # fixed: killed
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.kill()
    process.wait()
    assert process.stdout.read() == ""  # at its end when no process has it any more


def test_a_killed_parent_asks_once_however_many_threads_it_had() -> None:
    """The kernel sends its signal for each thread that a child is handed on to: a sweep's has those of Optuna's numpy."""
    child = "import os, signal, time; from labtrain.base.signals import Wishes, end_with_parent; "
    child += "wishes = Wishes(); end_with_parent(os.getppid(), signal.SIGTERM)\n"
    child += "with wishes.listening(leads=False):\n os.write(1, b'here\\n')\n while not wishes.signum: time.sleep(0.001)\n"  # fixed: a look
    child += " time.sleep(0.2); os.write(1, b'saved\\n')"  # fixed: a save, in which the other signals come
    parent = "import subprocess, sys, threading, time\n"
    parent += "for _ in range(100): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    parent += (
        f"for _ in range(10): subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"  # fixed: killed
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(10)] == 10 * ["here\n"]
    process.kill()
    process.wait()
    assert process.stdout.read() == 10 * "saved\n"


def test_the_children_of_a_process() -> None:
    children = [subprocess.Popen(["tail", "-f", "/dev/null"]) for _ in range(2)]
    try:
        assert {each.pid for each in children} <= set(children_of(os.getpid()))
        assert children_of(children[0].pid) == []
    finally:
        for each in children:
            each.kill()
            each.wait()
