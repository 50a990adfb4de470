"""The training loop of one rank."""

import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from .. import checkpoint, models
from ..data import Data, EvalLoader
from ..data.card import card, metadata
from ..data.fingerprint import fingerprint
from ..engine import Report
from ..errors import RunError
from ..optim.later import Later
from ..record import rundir, trackers
from ..record.metrics import MetricsLog, peak_memory
from ..record.probe import ProbeLog
from ..record.progress import Progress
from ..record.version import made_with
from ..settings import assemble, config, when
from ..settings.config import Settings
from . import extension, results, resume
from .advice import Advice, nothing_learnt, without_effect
from .interrupt import REQUEUES, WATCHED, Interrupt, Interrupted, requeue
from .peak import peak_share
from .pretrained import Init
from .scores import Found, scores
from .unused import Unused


class Fit:
    """The training loop, with its evaluations, checkpoints and logs.

    Args:
        settings: resolved. data: opened. device: of this rank.
        commit: as of `run`. init: weights to start from; None: random ones, or a checkpoint's.
    """

    def __init__(
        self,
        settings: Settings,
        data: Data,
        device: torch.device,
        commit: Callable[[], None] | None = None,
        init: Init | None = None,
    ) -> None:
        self.commit = commit
        assert settings.steps is not None and settings.micro_batch is not None
        self.settings, self.data, self.device = settings, data, device
        self.out = Path(settings.out)
        self.steps = settings.steps
        put = None if init is None else init.put
        self.engine = assemble.engine_of(settings, data, device, put)
        self.backend = self.engine.backend
        self.first = self.backend.rank == 0
        self.lr = float(assemble.base_settings(settings)["lr"])  # of layers with the factor 1
        self.peaks = [group["lr"] for group in self.engine.optimizer.param_groups]
        self.train = assemble.train_loader(settings, data, self.backend)
        self.test = EvalLoader(
            data.test,
            micro_batch=settings.micro_batch,
            rank=self.backend.rank,
            ranks=self.backend.size,
            workers=settings.workers,
        )
        self.unused = Unused(data)
        self.share = peak_share(settings, data, device, ranks=self.backend.size)
        self.start, self.saved = 0, 0
        self.untimed = 0  # steps of this start that are in no time
        self.found = Found()  # by the newest evaluation; on every rank
        self.eval_loss = 0.0  # likewise
        self._shared: tuple[int | None, Later] | None = None
        self.caught: list[signal.Signals] = []  # by any rank
        reader, notes = resume.prepare(self.backend, settings, data)
        self.extension = extension.of(settings, reader)
        self.notes = [*data.notes, *notes, *(init.notes if init else ())]
        if self.first:
            self.made_with = made_with()
            config.write(settings, self.out / rundir.CONFIG, self.made_with)
        self.tracker: trackers.Tracker | None = None
        if settings.track != "none":
            resume.shared(self.backend, self._track)
        self.probe = None
        if settings.probe_every:
            path = self.out / rundir.PROBE if self.first else None
            start = 0 if reader is None else reader.step
            self.probe = ProbeLog(path, every=settings.probe_every, resume_step=start)
            self.engine.optimizer.probe = self.probe
        if reader is not None:
            self._load(reader)
        self.writer = checkpoint.Writer(self.engine, self.out / "checkpoints", keep=settings.keep)

    def _track(self) -> None:
        self.tracker = trackers.start(self.settings.track, self.out, asdict(self.settings))

    def _load(self, reader: checkpoint.Reader) -> None:
        # The optimizer's param groups keep the settings of the flags, which may have changed.
        checkpoint.take(self.engine, reader, settings=False)
        self.start = self.saved = reader.step
        self.found = Found(**{f.name: reader.extra.get(f.name) for f in fields(Found)})
        if self.probe is not None:
            self.probe.looks = int(reader.extra.get("probed_looks", 0))

    # The loop.

    def run(self) -> dict[str, Any] | None:
        """Train to the end. Returns the content of summary.json; None if a signal ended the run.

        Raises Interrupted after Ctrl-C, RunError if nothing was learnt.
        """
        path = self.out / rundir.METRICS if self.first else None
        try:
            with (
                MetricsLog(
                    path,
                    resume_step=self.start or None,
                    tracker=self.tracker,
                    device=self.device,
                    peak_share=self.share,
                ) as log,
                Progress(
                    self.steps, start=self.start, shown=self.first, log=self.out / rundir.LOG
                ) as progress,
                Interrupt() as self.interrupt,
            ):
                self.log, self.progress = log, progress
                self.advice = Advice(progress.note)
                self.notes += [*without_effect(self.settings), *self.data.decoding()]
                self.notes += self.data.augmenting(self.device)
                self.notes += self.unused.notes()
                for note in [*self.notes, self._greeting()]:
                    progress.note(note)
                done = self.start
                for step in range(self.start, self.steps):
                    self._step(step)
                    done = step + 1
                    if self._after(done):
                        if self.caught:
                            self._stop(done)
                            return None
                        break
                return self._end(done)
        finally:
            self.writer.close()
            self.train.close()
            self.test.close()

    def _end(self, done: int) -> dict[str, Any]:
        """Evaluate and write the results; then RunError if nothing was learnt."""
        if self.found.evaluated != done or self.found.top5 is None:
            self._evaluate(done)
        self.writer.wait()
        summary = self._finish(done)
        skips = resume.shared(self.backend, lambda: self.log.skips)
        sentence = nothing_learnt(skips, done, self.settings, loss=self.eval_loss)
        if sentence and done > self.start:
            raise RunError(sentence)
        return summary

    def _greeting(self) -> str:
        s = self.settings
        count = sum(math.prod(piece.shape) for piece in self.backend.pieces())
        m = f"m {s.m}, " if s.m and s.rule.two_passes else ""
        return (
            f"{s.optimizer} on {s.base}, {m}{models.resolve(s.model, self.data.shape)} "
            f"({count:,} parameters), {s.data}, batch {s.batch_size} = {s.micro_batch} x "
            f"{self.backend.size} ranks x {self.train.accumulation}, {self.steps} steps, "
            f"backend {self.backend.name}, {s.precision}"
        )

    def _step(self, step: int) -> None:
        lr = self._set_lr(step)
        # Seeded by step and rank, so that a checkpoint needs no state of random numbers.
        words = np.random.SeedSequence([self.settings.seed, step, self.backend.rank])
        _seed(int(words.generate_state(1, np.uint64)[0]), self.device)
        batches, began = self.train.step(step), time.monotonic()
        done = self.engine.step(batches)
        compiled = step == self.start and self.settings.compile != "off"
        if compiled:
            self._compiled(began)
        if self.probe is not None:
            self.probe.flush(done.seen)
        self._record(done, lr, images=None if compiled else self.settings.batch_size)

    def _compiled(self, began: float) -> None:
        """Leave the first step, which compiled the network, out of the training time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.monotonic() - began
        self.log.leave_out(seconds)
        self.untimed = 1
        self.progress.note(f"compiled in the first step, which took {seconds:.1f} s")

    def _set_lr(self, step: int) -> float:
        """Set the learning rate and the factor of rho."""
        s = self.settings
        share = extension.lr_factor(step, vars(s), self.extension)
        for group, peak in zip(self.engine.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        self.engine.optimizer.rho_scale = when.rho_scale(s, step, lr=share)
        return self.lr * share

    def _record(self, done: Report, lr: float, *, images: int | None) -> None:
        seen, rho = done.seen, self.settings.rho
        assert rho is not None
        self.log.step(
            done.step,
            images=images,
            epoch=self.train.epoch_of(done.step),
            loss=done.loss,
            lr=lr,
            grad_norm=seen.grad_norm,
            update_norm=seen.update_norm,
            look=seen.look,
            skipped=~seen.finite,
            gv_norm=seen.gv_norm,
            gv_ratio=seen.gv_ratio,
            rho=rho * self.engine.optimizer.rho_scale if seen.look else None,
        )
        last = (self.log.flush() if done.step + 1 == self.steps else self.log.last) or {}
        self.advice.look(done.step, seen)
        self.advice.line(self.log.last)
        self.advice.skips(self.log.skips, last.get("step", 0))
        self.progress.update(
            done.step + 1,
            epoch=self.train.epoch_of(done.step + 1),
            loss=last.get("loss"),
            images_per_s=last.get("images_per_s"),
            mfu=last.get("mfu"),
            peak_memory=last.get("peak_memory"),
            look=seen.look,
        )

    def _after(self, done: int) -> bool:
        """Evaluate and save where due after `done` steps. True, on every rank, to stop here."""
        s = self.settings
        stop = self._read_flags()
        every = s.eval_every or max(1, round(self.train.steps_per_epoch))
        if done % every == 0 or done == self.steps:
            self._evaluate(done)
        if (s.save_every and done % s.save_every == 0) or done == self.steps:
            self._save(done)
        self._share_flags()
        return stop and done < self.steps

    # Flags that must be the same on all ranks: one small all-reduce a step, read when the next step
    # is queued, so that the device always has work. The mean is above 0 if any rank has raised the
    # flag.

    def _share_flags(self) -> None:
        writer = self.writer
        signals = (self.interrupt.caught == s for s in WATCHED)
        most = self.settings.max_skips
        hopeless = bool(most) and self.log.skips >= most
        flags = (*signals, hopeless, self.unused.new(), writer.failed, not writer.written)
        # A copy from memory that is not page-locked would wait for the device.
        raised = torch.tensor(flags, dtype=torch.float32, pin_memory=self.device.type == "cuda")
        mean = self.backend.mean(raised.to(self.device, non_blocking=True))
        self._shared = (writer.pending, Later(mean))

    def _read_flags(self) -> bool:
        if self._shared is None:
            return False
        (pending, flags), self._shared = self._shared, None
        *signals, hopeless, unreadable, failed, writing = (flags.read() > 0).tolist()
        self.caught = [s for s, raised in zip(WATCHED, signals, strict=True) if raised]
        if unreadable:
            self._note_unreadable()
        if failed:
            self.writer.wait()  # raises the error
        elif pending is not None and not writing:
            self.writer.commit(pending)
        return bool(self.caught) or hopeless

    def _note_unreadable(self) -> None:
        if note := self.unused.collect(self.backend):
            self.progress.note(note)

    def _stop(self, done: int) -> None:
        """Save a checkpoint and end the run; all ranks have finished the same step."""
        if self.saved != done:
            self._save(done)
        self.writer.wait()
        if self.first:
            names = " and ".join(s.name for s in self.caught)
            self.progress.note(
                f"{names} after step {done}: saved step-{done}; --resume auto goes on"
            )
        if self.caught == [signal.SIGINT]:
            raise Interrupted
        if {*self.caught} & {*REQUEUES} and resume.requeue_asked(self.settings):
            note = resume.shared(self.backend, requeue)
            if note:
                self.progress.note(note)

    def _evaluate(self, done: int) -> None:
        """Of the weights, and of their averages where there are some."""
        with self.log.paused():
            top1, top5, loss = self._scores()
            more = {}
            if self.backend.ema is not None:
                with self.engine.averaged():
                    more["ema_top1"], _, more["ema_loss"] = self._scores()
        self.found, self.eval_loss = Found(top1, top5, more.get("ema_top1"), done), loss
        self.log.evaluation(done, top1=top1, loss=loss, eval_top5=top5, **more)
        self.progress.evaluation(done, top1=top1, loss=loss, **more)

    def _scores(self) -> tuple[float, float, float]:
        found = scores(self.backend, self.test, self.device)
        if found is None:
            self._note_unreadable()
            raise RunError("no test image can be read: log.txt names some; repair or remove them.")
        return found

    def _save(self, done: int) -> None:
        with self.log.paused():
            self.log.flush()  # so that the metrics reach the step of the checkpoint
            extra = {
                "settings": resume.saved_settings(self.settings, self.data),
                extension.KEY: self.extension,
                **asdict(self.found),
                "probed_looks": 0 if self.probe is None else self.probe.looks,
                "data": fingerprint(self.data),
                "card": asdict(card(self.data)),
            }
            self.writer.save(done, extra)
            self.saved = done
            if self.commit is not None:
                self.writer.wait()
                self.commit()

    def _finish(self, done: int) -> dict[str, Any]:
        self.log.flush()
        self._note_unreadable()
        weights = {rundir.WEIGHTS: self.backend.full_weights()}
        if self.backend.ema is not None:
            with self.engine.averaged():
                weights[rundir.WEIGHTS_EMA] = self.backend.full_weights()
        trained, seconds = (done - self.untimed) * self.settings.batch_size, self.log.seconds
        rate = round(trained / seconds, 3) if seconds else None
        summary = {
            **self.found.accuracy(),
            "steps": done,
            "seconds": round(seconds, 3),
            "images_per_s": rate,
            "forward_backward_passes": self.engine.passes,
            "mfu": self._mfu(rate, done),
            "peak_memory": peak_memory(self.device),
            "world_size": self.backend.size,
            "backend": self.backend.name,
            "optimizer": self.settings.optimizer,
            "batch_size": self.settings.batch_size,
            **self.unused.summary(),
        }
        if self.first:
            model = models.resolve(self.settings.model, self.data.shape)
            about = {"model": model, "step": str(done), **metadata(card(self.data))}
            drawn = results.write(self.out, {**summary, **self.made_with}, weights, about)
            self.progress.note(f"{self.found}; {drawn}")
        return summary

    def _mfu(self, images_per_s: float | None, done: int) -> float | None:
        """The share of the devices' peak that all passes have reached; None if it is unknown. Where
        images grow, looks count as if they were spread evenly over the sizes."""
        if not self.share or not images_per_s or not done:
            return None
        share = fmean(map(self.share, range(done)))
        return round(images_per_s * self.engine.passes / done * share, 5)


def _seed(seed: int, device: torch.device) -> None:
    """Seed what this run draws from, as `torch.manual_seed` does.

    That one also turns to every kind of device that was never started here, and formats the stack
    for each: .3 ms, a tenth of a step of a few small images.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
