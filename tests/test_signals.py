"""What a process remembers of signals. What a training does with them is in test_training.py and test_exact.py."""

import os
import signal
import subprocess
import sys

import pytest

from labtrain.signals import NUMBERS, Stopped, Wishes


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_is_remembered_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in NUMBERS]
    wishes = Wishes()
    with wishes.listening():
        assert wishes.numbers() == (0.0, 0.0)
        os.kill(os.getpid(), number)
        assert wishes.numbers() == (float(number), 0.0)
        assert all(signal.getsignal(each) == signal.SIG_DFL for each in NUMBERS)  # a second one ends the process
    assert [signal.getsignal(each) for each in NUMBERS] == before


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
    child = "import os, signal, time; from labtrain.signals import end_with_parent; "
    child += "end_with_parent(os.getppid(), signal.SIGKILL); print('here', flush=True); time.sleep(20); print('alive')"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.kill()
    process.wait()
    assert process.stdout.read() == ""  # at its end when no process has it any more


def test_a_killed_parent_asks_once_however_many_threads_it_had() -> None:
    """The kernel sends its signal for each thread that a child is handed on to: a sweep's has those of Optuna's numpy."""
    child = "import os, signal, time; from labtrain.signals import Wishes, end_with_parent; "
    child += "wishes = Wishes(); end_with_parent(os.getppid(), signal.SIGTERM)\n"
    child += "with wishes.listening():\n os.write(1, b'here\\n')\n while not wishes.signum: time.sleep(0.001)\n"
    child += " time.sleep(0.2); os.write(1, b'saved\\n')"
    parent = "import subprocess, sys, threading, time\n"
    parent += "for _ in range(100): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    parent += f"for _ in range(10): subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(10)] == 10 * ["here\n"]
    process.kill()
    process.wait()
    assert process.stdout.read() == 10 * "saved\n"
