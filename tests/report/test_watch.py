"""`dist-looksam watch`: the page follows real files, and nothing in them harms it."""

import fcntl
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import browser
import made_up
import pytest
import yaml

from dist_looksam.cli import main as cli
from dist_looksam.watch.lines import Lines
from dist_looksam.watch.run import Watched
from dist_looksam.watch.series import Series

READY = "document.body && document.body.dataset.version"
HIT = "<img src=x onerror=window.hit=1></script><script>window.hit=1</script><!--<script>"
NEWEST = """[...document.querySelectorAll('.newest_%s_marks path')].map(e => e.__data__.datum)
    .map(d => ({step: d.step, exact: d.exact, run: d.run}))"""
TEXT = "document.body.innerText"


def line(step: int, **values) -> str:
    row = {"step": step, "loss": 2.0, "lr": 0.1, "look": step % 5 == 0, "skipped": False}
    return json.dumps(row | {"images_per_s": 90.0, "seconds": 0.5 * (step + 1)} | values) + "\n"


def append(folder: Path, text: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs, a run directory without anything yet, and one whose names and contents are odd."""
    folder = tmp_path_factory.mktemp("watched")
    made_up.run(folder / "a", "look_sam", steps=40, gv_ratio=0.3, done=False)
    made_up.run(folder / "b", "adamw", seed=1, steps=30, done=False)
    (folder / "empty").mkdir()
    odd = made_up.run(folder / "<img src=x onerror=window.hit=1>'\"&\u202e", steps=20, done=False)
    settings = {"optimizer": HIT, "base": {"signal": "hit"}, "model": "__proto__", "steps": HIT}
    (odd / "config.yaml").write_text(yaml.safe_dump(settings | {HIT: HIT, "data": [HIT, [1]]}))
    hosts, started = [HIT, {"expr": "hit"}], {"starts": 10**30, "ranks": True, "launcher": HIT}
    (odd / "job.json").write_text(json.dumps(started | {"hosts": hosts, "slurm_job_id": "--help"}))
    (odd / "log.txt").write_text(f"{HIT}\n\x1b[31mred\n")
    foreign = [HIT, "[" * 20000, "3", '{"step": -1}', '{"step": 1e3}', '{"step": true}', "\xff"]
    strange = [line(20, loss=HIT, lr=[1]), line(21, loss=1e300), '{"step": 22, "loss": NaN}\n']
    append(odd, "".join(f"{text}\n" for text in foreign) + "".join(strange))
    return folder


@pytest.fixture(scope="module")
def address(runs):
    """What the command prints; Ctrl-C ends it with exit code 0."""
    command = [sys.executable, "-m", "dist_looksam.cli.main", "watch", ".", "empty", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=runs) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[0]
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


@pytest.fixture(scope="module")
def page(address, tmp_path_factory, needs):
    needs("chromium")
    with browser.Page(tmp_path_factory.mktemp("browser") / "profile") as found:
        found.call("Page.navigate", url=address)
        found.wait(READY)
        yield found


@pytest.mark.slow
def test_the_page_draws_every_run_and_odd_texts_run_no_script(page, runs, address):
    drawn = {mark["step"]: mark for mark in page.js(NEWEST % "loss")}
    assert set(drawn) == {39, 29, 19}  # of the odd run, the last loss that is a number
    text = page.js(TEXT)
    assert "7 lines of metrics.jsonl are not of this program" in text
    assert "window.hit=1</script>" in text and "nothing here yet" in text
    page.wait("document.title.startsWith('4 runs')")
    asked = {urlsplit(url).netloc for url in page.requests if url.startswith("http")}
    assert asked == {urlsplit(address).netloc}
    assert not page.js("window.hit") and not page.errors
    assert page.js("document.querySelectorAll('img, #rows script, #logs script').length") == 0


@pytest.mark.slow
def test_a_new_point_is_shown_within_3_s_of_its_line(page, runs):
    append(runs / "a", line(40, loss=1.25, skipped=True))
    began = time.monotonic()
    page.wait(f"({NEWEST % 'loss'}).some(m => m.step === 40)", seconds=3)
    assert time.monotonic() - began < 3
    (mark,) = [m for m in page.js(NEWEST % "looks") if m["step"] == 40]
    assert mark["exact"] == 9  # steps 0, 5, ..., 40
    assert "1 step skipped" in page.js(TEXT) and "last was step 40" in page.js(TEXT)
    append(runs / "a", '{"step": 41, "eval_top1": 0.625, "eval_loss": 1.5}\n')
    page.wait(f"({NEWEST % 'top1'}).some(m => m.exact === 0.625)", seconds=3)


@pytest.mark.slow
def test_a_resumed_run_goes_back_and_a_removed_one_stays_with_a_note(page, runs):
    rows = (runs / "a" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs / "a" / "new").write_text("".join(rows[:25]))
    (runs / "a" / "log.txt").write_text("2026-11-28 14:00:00 resumed from c/step-25 at step 25\n")
    (runs / "a" / "job.json").write_text(json.dumps({"starts": 2}))
    os.replace(runs / "a" / "new", runs / "a" / "metrics.jsonl")
    append(runs / "a", line(25) + line(26))
    shutil.rmtree(runs / "b")
    page.wait(f"({NEWEST % 'loss'}).some(m => m.step === 26)", seconds=5)
    page.wait(f"{TEXT}.includes('Started 2 times; resumed at step 25')", seconds=5)
    page.wait(f"{TEXT}.includes('The directory is gone')", seconds=5)
    assert {m["step"] for m in page.js(NEWEST % "loss")} == {26, 29, 19}
    assert page.js("document.querySelectorAll('.resumed_marks path, .resumed_marks line').length")
    assert not page.errors


@pytest.mark.slow
def test_the_exported_page_needs_no_server(page, runs, tmp_path):
    out = tmp_path / "page.html"
    assert cli.main(["watch", str(runs), "--export", str(out)]) == 0
    page.call("Page.navigate", url="about:blank")
    page.wait("!document.body.dataset.version")
    before = len(page.requests)
    page.open(out, ready=READY)
    assert {m["step"] for m in page.js(NEWEST % "loss")} == {26, 19}
    assert not page.js("window.hit") and not page.errors
    assert all(url.startswith("file:") for url in page.requests[before:])


def ask(address: str, path: str = "", host: str | None = None, method: str = "GET"):
    url = urlsplit(address)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=20)
    connection.request(method, path or url.path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.mark.slow
def test_only_this_machine_with_the_printed_address_gets_an_answer(address):
    port = urlsplit(address).port
    assert ask(address)[0] == 200 and ask(address, host="localhost:9")[0] == 200  # ssh -L 9:...
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "[::"):
        assert ask(address, host=host)[0] == 403
    for path in ("/", "/data", "/wrong/data", urlsplit(address).path + "../../etc/passwd"):
        status, text = ask(address, path)
        assert status == 404 and "run" not in text
    assert ask(address, method="POST")[0] == 501
    listening = Path("/proc/net/tcp").read_text().split()
    assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening


def test_a_refresh_reads_only_what_is_new(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(line(step) for step in range(30000)))
    lines = Lines(file)
    total = 0
    while new := lines.new()[1]:
        total += len(new)
    assert total == 30000 and lines.share == 1

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    with file.open("a") as out:
        out.write(line(30000) + '{"step": 30001, "lo')  # its writer is still writing the second
    before = read_so_far()
    void, new = lines.new()
    assert not void and [json.loads(text)["step"] for text in new] == [30000]
    assert read_so_far() - before < 20_000
    with file.open("a") as out:
        out.write('ss": 1}\n' + "x" * (3 << 20) + "\n" + line(30002))
    assert [json.loads(text)["step"] for text in lines.new()[1]] == [30001, 30002]


def test_a_long_series_keeps_its_means_and_its_newest_point():
    series, last = Series(most=64), Series(most=64, last=True)
    for step in range(10_001):
        series.add(step, float(step))
        last.add(step, float(step))
        assert series.points()[-1][0] == step
    assert len(series.points()) <= 64 and series.size == 256
    assert series.points()[0] == (255, 127.5) and last.points()[0] == (255, 255.0)


def test_the_time_left_is_that_of_the_newest_steps_of_a_run_that_trains(tmp_path):
    run = made_up.run(tmp_path / "a", steps=0, done=False)
    (run / "config.yaml").write_text("steps: 1000\n")
    slow = "".join(line(step, seconds=10.0 * step) for step in range(100))
    append(run, slow + "".join(line(100 + i, seconds=1000.0 + i) for i in range(60)))
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        watched = Watched(run)
        watched.refresh()
        row = watched.row()
    assert row["state"] == "running" and row["ETA"] == "0:14:00"  # 840 steps of 1 s
    assert row["step"] == "160 / 1,000" and row["looks"] == "32 (20%)"
    stopped = Watched(run)
    stopped.refresh()
    assert stopped.row()["state"] != "running" and stopped.row()["ETA"] == "-"


@pytest.mark.parametrize("name", ["config.yaml", "job.json", ".lock", "metrics.jsonl", "log.txt"])
def test_a_pipe_in_the_place_of_a_file_does_not_stop_the_page(tmp_path, name):
    """Opening a pipe without a writer waits for ever."""
    run = made_up.run(tmp_path / "a", done=False)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    watched = Watched(run)
    watched.refresh()
    watched.row()
    assert watched.steps == (0 if name == "metrics.jsonl" else 12)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], "run must be a run directory (--out) or a folder of runs, got nowhere"),
        ([".", "--port", "70000"], "port must be from 0 to 65535, got 70000"),
    ],
)
def test_a_wrong_argument_is_one_sentence(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["watch", *argv]) == 2
    assert words in capsys.readouterr().err
