"""The first signal asks, the second stops; both say how to go on."""

import os
import signal
import threading

import pytest

from rae.pipeline.stopping import Stopped, again, as_error, raised, requested
from rae.store.errors import Interrupted, PartialResult

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
EACH = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


@EACH
def test_the_first_signal_is_a_request(number: int) -> None:
    with requested("rae run mine") as request:
        request.check()
        assert not request
        signal.raise_signal(number)
        assert request
        with pytest.raises(PartialResult) as stop:
            request.check()
    assert stop.value.exit_code == (130 if number == signal.SIGINT else 6)
    assert stop.value.next_command == "rae run mine"


@EACH
def test_the_second_signal_stops_at_once(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    with raised(), requested("rae run mine") as request:
        signal.raise_signal(number)
        assert "once" in capfd.readouterr().err
        with pytest.raises(Stopped) as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.value.number == signal.SIGINT
    assert request.signal == number


@EACH
def test_a_signal_outside_a_stage_stops(number: int) -> None:
    with raised(), pytest.raises(Stopped):
        signal.raise_signal(number)
    assert isinstance(as_error(signal.SIGINT, ""), Interrupted)
    assert "stopped by SIGUSR1" in as_error(signal.SIGUSR1, "").message
    assert not issubclass(Stopped, Exception)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with raised(), requested("x"):
        signal.raise_signal(signal.SIGTERM)
    with requested("x"):
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_in_another_thread_no_signal_arrives_and_nothing_fails() -> None:
    seen = []

    def work() -> None:
        with raised(), requested("x") as request:
            seen.append(bool(request))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_the_command_that_continues_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/rae", "encode", "my data.yaml", "-s", "shards.train=a-{0..2}.tar"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert again() == "rae encode 'my data.yaml' -s 'shards.train=a-{0..2}.tar'"
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "8")
    assert again().startswith("torchrun --nproc-per-node 8 -m rae.pipeline.cli encode")
