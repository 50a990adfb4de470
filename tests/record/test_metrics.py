import json
import math

import pytest
import torch

from dist_looksam.errors import RunError
from dist_looksam.record.metrics import FIELDS, MetricsLog, rate, read


def train(log: MetricsLog, first: int, last: int, *, eval_every: int = 5) -> None:
    """Steps first..last-1, as a loop does: log the step, count it, perhaps evaluate."""
    for step in range(first, last):
        log.step(step, epoch=step // 10, loss=torch.tensor(1 / (step + 1)), look=step % 5 == 0)
        if (step + 1) % eval_every == 0:
            log.evaluation(step + 1, top1=0.5, loss=1.0)


def without_time(path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def test_a_line_has_every_field_and_no_other(path):
    with MetricsLog(path) as log:
        log.step(0, loss=1.5, lr=0.1, look=True, skipped=torch.tensor(False))
    row = json.loads(path.read_text())
    assert tuple(row) == FIELDS
    assert row["look"] is True and row["skipped"] is False and row["gv_norm"] is None


def test_a_name_that_is_no_field_is_refused(path):
    with pytest.raises(TypeError, match=r"no field .*los"):
        MetricsLog(path).step(0, los=1.0)


def test_values_are_read_only_at_a_flush(path):
    log = MetricsLog(path, every=3, seconds=1000)
    for step in range(3):
        assert path.read_text() == ""
        log.step(step, loss=torch.tensor(1.0))
    assert len(path.read_text().splitlines()) == 3


def test_values_are_read_after_some_seconds_even_if_few(path):
    log = MetricsLog(path, every=1000, seconds=0)
    log.step(0, loss=1.0)
    assert len(path.read_text().splitlines()) == 1


def test_all_tensors_come_to_the_host_in_one_copy(path, monkeypatch):
    copies = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: copies.append(t.shape) or real(t))
    monkeypatch.setattr(torch.Tensor, "item", lambda t: pytest.fail("a copy of its own"))
    log = MetricsLog(path, every=1000, seconds=1000)
    for step in range(10):
        log.step(step, loss=torch.tensor(0.5), gv_norm=torch.tensor([2.0]), lr=0.1)
    log.flush()
    assert copies == [(20,)]
    assert read(path)[0][9]["gv_norm"] == 2.0


def test_a_tensor_that_is_overwritten_later_keeps_its_logged_value(path):
    loss = torch.tensor(1.0)
    with MetricsLog(path) as log:
        log.step(0, loss=loss)
        loss.fill_(2.0)
    assert read(path)[0][0]["loss"] == 1.0


def test_a_float32_comes_back_exactly(path):
    values = torch.rand(100, generator=torch.Generator().manual_seed(0)) * 1e-3
    with MetricsLog(path) as log:
        for step, value in enumerate(values):
            log.step(step, loss=value)
    got = torch.tensor([row["loss"] for row in read(path)[0]], dtype=torch.float32)
    assert torch.equal(got, values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, torch.tensor(math.nan)])
def test_nan_and_infinity_are_null_so_that_every_line_is_json(path, bad):
    with MetricsLog(path) as log:
        log.step(0, loss=bad)
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["loss"] is None


@pytest.mark.parametrize("killed_at", [12, 15, 17])
@pytest.mark.parametrize("resumed_at", [5, 10, 12])
def test_a_resumed_file_looks_as_if_never_interrupted(path, tmp_path, killed_at, resumed_at):
    with MetricsLog(tmp_path / "whole.jsonl") as log:
        train(log, 0, 20)
    with MetricsLog(path) as log:
        train(log, 0, killed_at)
    with MetricsLog(path, resume_step=resumed_at) as log:
        train(log, resumed_at, 20)
    assert without_time(path) == without_time(tmp_path / "whole.jsonl")


@pytest.mark.parametrize("torn", ['{"step": 12, "lo', "{", "\0\0\0"])
def test_a_line_torn_by_a_kill_is_repaired(path, torn):
    with MetricsLog(path) as log:
        train(log, 0, 12)
    with open(path, "a") as file:
        file.write(torn)
    assert len(read(path)[0]) == 12
    with MetricsLog(path, resume_step=12) as log:
        train(log, 12, 13)
    assert [row["step"] for row in read(path)[0]] == list(range(13))


def test_a_last_line_that_lacks_only_its_end_of_line_is_kept(path):
    with MetricsLog(path) as log:
        train(log, 0, 3)
    path.write_text(path.read_text().rstrip("\n"))
    with MetricsLog(path, resume_step=3) as log:
        train(log, 3, 4)
    assert [row["step"] for row in read(path)[0]] == [0, 1, 2, 3]


def test_damage_in_the_middle_is_an_error_not_a_loss(path):
    with MetricsLog(path) as log:
        train(log, 0, 3)
    path.write_text("x" + path.read_text())
    with pytest.raises(RunError, match="damaged at line 1"):
        MetricsLog(path, resume_step=3)
    assert path.read_text().startswith("x")


def test_the_evaluation_of_the_resumed_checkpoint_is_kept_and_known(path):
    with MetricsLog(path) as log:
        train(log, 0, 10)
    log = MetricsLog(path, resume_step=5)
    assert log.evaluated == 5
    assert [row["step"] for row in read(path)[1]] == [5]


def test_no_resume_starts_an_empty_file(path):
    with MetricsLog(path) as log:
        log.evaluation(0, top1=0.1, loss=2.3)
        train(log, 0, 10)
    MetricsLog(path)
    assert read(path) == ([], [])


def test_seconds_go_on_over_a_resume_and_stand_still_when_paused(path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("dist_looksam.record.metrics.time.monotonic", lambda: now[0])
    with MetricsLog(path) as log:
        now[0] += 2
        log.step(0, loss=1.0)
        with log.paused():
            now[0] += 50
        now[0] += 1
        log.step(1, loss=1.0)
    now[0] = 7.0  # another process, another clock
    with MetricsLog(path, resume_step=2) as log:
        now[0] += 4
        log.step(2, loss=1.0)
    assert [row["seconds"] for row in read(path)[0]] == [2, 3, 7]


def test_images_per_s_is_from_one_completed_step_to_the_next(path, monkeypatch):
    """On a GPU the clock stopped when a step was launched; the wait for it came later and was in no
    step. What lies between two steps, as a slow loader does, was in none either."""
    now = [100.0]
    monkeypatch.setattr("dist_looksam.record.metrics.time.monotonic", lambda: now[0])
    with MetricsLog(path) as log:
        for took in (4, 1, 2):
            now[0] += took
            log.step(0, images=8)
        with log.paused():
            now[0] += 50
        now[0] += 2
        log.step(1, images=8)
    steps = read(path)[0]
    assert [row["images_per_s"] for row in steps] == [2, 8, 4, 4]
    assert [row["seconds"] for row in steps] == [4, 5, 7, 9]


def test_skips_in_a_row_are_counted_over_a_resume_and_nan_stays_nan_for_the_host(path):
    with MetricsLog(path) as log:
        for step, skipped in enumerate([True, False, True, True]):
            log.step(step, skipped=torch.tensor(skipped), loss=torch.tensor(math.nan))
        log.flush()
        assert log.skips == 2 and math.isnan(log.last["loss"])
    assert MetricsLog(path, resume_step=4).skips == 2
    assert MetricsLog(path, resume_step=2).skips == 0


def test_a_flush_hands_back_the_newest_line_as_plain_numbers(path):
    log = MetricsLog(path)
    log.step(0, loss=torch.tensor(0.25))
    log.evaluation(1, top1=0.5, loss=1.0)
    row = log.flush()
    assert row is not None and row["loss"] == 0.25
    assert log.flush() == row


def test_the_other_ranks_write_nothing(tmp_path):
    with MetricsLog(None, every=1) as log:
        log.step(0, loss=torch.tensor(1.0))
    assert not list(tmp_path.iterdir()) and log.flush() is None


def test_the_rate_of_steps_together_is_images_over_time():
    """100 images a step, a look of 0.2 s and four steps of 0.1 s: the mean of rates is 900."""
    assert rate([500.0, *[1000.0] * 4]) == pytest.approx(500 / 0.6)
    assert rate([]) is None
