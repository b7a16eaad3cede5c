"""Signals: acknowledged while a reward or environment runs, and followed at once where that is safe."""

import os
import signal
import threading
import time

import pytest

from lmrl.plugins.foreign import foreign, waited_for, watch
from lmrl.training.interrupt import Interrupt, Interrupted


def signalled(number, after=0.2):
    threading.Timer(after, os.kill, (os.getpid(), number)).start()


@pytest.fixture
def hangup():
    """SIGHUP as it is without nohup, under which these tests may run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_call_that_sleeps_is_ended_where_it_is_safe(hangup, capfd, number):
    before = signal.getsignal(number)
    began = time.monotonic()
    with Interrupt() as interrupt, pytest.raises(Interrupted) as caught:
        interrupt.safe = True
        signalled(number)
        with foreign("reward mine.py:slow"):
            time.sleep(60)
    assert caught.value.number == number and time.monotonic() - began < 30
    name = signal.Signals(number).name
    assert f"lmrl: {name} in the middle of reward mine.py:slow (" in capfd.readouterr().err
    assert signal.getsignal(number) == before and waited_for() is None


def test_elsewhere_the_call_is_named_and_waited_for(capfd):
    with Interrupt() as interrupt:
        signalled(signal.SIGTERM)
        with foreign("environment Mine"):
            until = time.monotonic() + 30
            while interrupt.number is None and time.monotonic() < until:
                time.sleep(0.05)
        assert interrupt.number == signal.SIGTERM
    err = capfd.readouterr().err
    assert err.startswith("lmrl: SIGTERM in the middle of environment Mine (") and "ends the run at once" in err


def test_nohup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_slow_call_is_named(capfd, monkeypatch):
    monkeypatch.setattr("lmrl.plugins.foreign.PATIENCE", 0.1)
    monkeypatch.setattr("lmrl.plugins.foreign._watcher", None)
    watch()
    with foreign("reward mine.py:slow"):
        time.sleep(1.5)
    assert "lmrl: still waiting for reward mine.py:slow (" in capfd.readouterr().err
