import io
import re

import pytest

from dist_looksam.record import progress
from dist_looksam.record.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    return Terminal()


def test_a_log_file_gets_a_line_with_everything(clock):
    file = io.StringIO()
    with Progress(1000, start=100, file=file) as p:
        p.evaluation(100, 0.5, 1.25)
        clock[0] = 20
        p.update(120, loss=0.71828, images_per_s=3233.4, epoch=2)
    assert "step 120/1000 loss 0.7183 top1 0.5000 images/s 3,233 ETA 0:14:40 epoch 2" in (
        file.getvalue().splitlines()
    )


def test_a_log_file_gets_the_first_and_last_step_and_a_line_every_ten_seconds(clock):
    file = io.StringIO()
    with Progress(100, file=file) as p:
        for step in range(1, 101):
            clock[0] += 0.25
            p.update(step, loss=1.0)
    steps = [line.split()[1] for line in file.getvalue().splitlines()]
    assert steps == ["1/100", "41/100", "81/100", "100/100"]


def test_time_left_follows_the_last_minute_not_a_slow_start(clock):
    p = Progress(1000, file=io.StringIO())
    clock[0] = 300
    p.update(1)
    for step in range(2, 202):
        clock[0] += 1
        p.update(step)
    assert p.eta() == "0:13:19"  # 799 steps of a second


def test_no_time_left_is_invented_before_the_first_step():
    assert Progress(10, file=io.StringIO()).eta() == "-:--:--"


def test_a_number_not_given_stays_as_it_was(clock):
    p = Progress(10, file=io.StringIO())
    p.update(1, loss=0.5, images_per_s=10)
    p.update(2)
    assert "loss 0.5000" in p.line() and "images/s 10" in p.line()


def test_the_other_ranks_print_nothing(clock):
    file = io.StringIO()
    with Progress(10, file=file, shown=False) as p:
        p.update(1, loss=1.0, images_per_s=1.0)
        p.note("hello")
        p.evaluation(1, 0.5, 1.0)
    assert file.getvalue() == ""


def test_notes_are_printed_as_they_are(clock):
    file = io.StringIO()
    Progress(10, file=file).note("saved [red]x[/red] " + "long " * 60)
    assert file.getvalue() == "saved [red]x[/red] " + "long " * 60 + "\n"


def test_a_terminal_gets_one_bar_that_is_drawn_over(terminal):
    with Progress(1000, file=terminal) as p:
        for step in range(1, 1001):
            p.update(step, loss=1 / step, images_per_s=3210.0, look=step % 5 == 0)
        p.note("a note")
    shown = terminal.getvalue()
    assert "1000/1000" in shown and "0.0010" in shown and "3,210" in shown and "a note" in shown
    assert shown.count("\n") < 10


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_bar_fits_on_one_line(terminal, monkeypatch, columns):
    """Wrapped over two lines, it was hard to read and left lines behind."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with Progress(100_000, file=terminal) as p:
        p.update(90_000, loss=1.2345, images_per_s=123_456.0, epoch=299)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert drawn.rstrip().splitlines()[-1].startswith("step 90000/100000")
    assert "images/s 123,456" in drawn.rstrip().splitlines()[-1]


def test_a_run_that_fails_gives_the_terminal_back(terminal):
    with pytest.raises(ZeroDivisionError), Progress(10, file=terminal):
        raise ZeroDivisionError
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_shown_and_breaks_nothing(clock, bad):
    p = Progress(10, file=io.StringIO())
    p.update(1, loss=bad, images_per_s=bad)
    assert f"loss {bad}" in p.line()


def test_a_file_gets_what_the_terminal_shows(clock, terminal, tmp_path):
    """A terminal's bar is gone with the terminal."""
    log = tmp_path / "log.txt"
    with Progress(100, file=terminal, log=log) as p:
        p.note("resumed from X")
        for step in range(1, 61):
            clock[0] += 0.25
            p.update(step, loss=1.0)
    lines = [line[len("2026-11-25 13:20:01 ") :] for line in log.read_text().splitlines()]
    assert [line.split(" loss")[0] for line in lines] == [
        "resumed from X", "step 1/100", "step 41/100",
    ]  # fmt: skip


def test_ranks_that_show_nothing_write_nothing(tmp_path):
    with Progress(10, shown=False, log=tmp_path / "log.txt") as p:
        p.note("text")
    assert not (tmp_path / "log.txt").exists()


def test_under_mpirun_which_gives_ranks_a_terminal_there_are_lines_and_no_bar(
    terminal, monkeypatch
):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with Progress(10, file=terminal) as p:
        p.update(1)
    assert terminal.getvalue().startswith("step 1/10 ") and "\x1b" not in terminal.getvalue()
