"""Ctrl-C: in processes that tests start, however they were started themselves, and while processes are started."""

import os
import signal
import subprocess
import sys

import pytest

from sharpwise.processes import interrupts_deferred

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


def test_ctrl_c_ends_a_process_of_a_test() -> None:
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


def test_also_where_the_shell_ignores_it() -> None:
    """As under `nohup make test &`."""
    test = f"{__file__}::{test_ctrl_c_ends_a_process_of_a_test.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", test]
    done = subprocess.run(
        ["sh", "-c", "trap '' INT HUP QUIT; exec \"$@\"", "sh", *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_ctrl_c_waits_until_processes_have_started() -> None:
    begun = []
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        begun.append(1)
    assert begun
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_that_is_ignored_stays_so(request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
