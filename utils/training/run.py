"""What surrounds the steps of a training loop: resuming, stop rules, dropped steps, checkpoints, meters and the log.

The loop itself, and everything that calls the model, is in the scripts.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from utils.errors import Interrupted, UsageError
from utils.progress import close_bars
from utils.training import checkpoint_files
from utils.training.batching import StepBatches
from utils.training.checkpoints import Checkpoints, set_learning_rate
from utils.training.log import Meters, RunLog
from utils.training.loop_state import steps_left, stop_reason
from utils.training.memory import give_back_memory, is_out_of_memory
from utils.training.signals import Signals
from utils.training.step import (
    NanDetector,
    any_process,
    check_loss_scale,
    check_weight_norm,
    is_sharded,
    profiler,
    seed_step,
)


class Run:
    """One run of a training script, new or resumed; all methods are called on all processes.

    Args:
        folder: the run folder.
        max_steps, warmup: optimizer steps of the learning rate schedule (0: no end), and of its rise.
        plan: `plan(epoch, without=example numbers, shape=...)` gives the steps of an epoch, as `plan_epoch` does.
        shape: `shape(epoch)` gives what decides the examples of a step, beside data and seed (see `batch_shape`).
        data: a checksum of what is trained on, the same on all processes (else UsageError). Only a run with the same
            checksum resumes.

    Attributes:
        state: where the run stands (`LoopState`).
        received: the number of the signal that asks the run to save and leave, or None.
        scores, predictions: those of the last validation, or None before it.
        published: the files of the published model, relative to the run folder; on the main process only.
    """

    def __init__(self, accelerator, args, folder: Path, log: RunLog, *, model, optimizer, scheduler,
                 max_steps: int, warmup: int, plan, shape, data):  # fmt: skip
        everywhere = gather_object([str(data)]) if accelerator.num_processes > 1 else []
        if others := [number for number, found in enumerate(everywhere) if found != everywhere[0]]:
            raise UsageError(
                f"process {others[0]} has other training data than process 0: all machines need the same files, models "
                "and code"
            )
        self.accelerator, self.args, self.folder, self.log = accelerator, args, folder, log
        self.model, self.optimizer, self.scheduler, self.plan = model, optimizer, scheduler, plan
        self.max_steps, self.warmup = max_steps, warmup
        self.signals, self.received = Signals(), None
        self.checkpoints = Checkpoints(accelerator, args, folder, log, self.signals, model=model, optimizer=optimizer,
                                       scheduler=scheduler, data=data, shape=shape)  # fmt: skip
        self.state, resumed_from, is_own, old_shape = self.checkpoints.resume()
        if old_shape:  # the epoch continues with the examples that were not yet read with the old shape
            self.state.leave_out(plan(self.state.epoch, without=self.state.done_before, shape=old_shape))
        if max_steps and resumed_from and (old_shape or not is_own):
            left = steps_left(args, plan, shape, self.state)
            if is_own and max_steps != args.max_train_steps:  # it ends with the last epoch, whose steps are others now
                set_learning_rate(optimizer, scheduler, max(max_steps - left, 0))
            at = scheduler.last_epoch
            if not is_own and args.schedule_ends() and at + left > max_steps:
                raise UsageError(f"{resumed_from}: its learning rate schedule is at step {at:,} of {max_steps:,}, and "
                                 f"this run has {left:,} steps more; add --reset_lr_scheduler")  # fmt: skip
        self.checkpoints.begin()
        self.meters = {name: Meters(accelerator, self.state.meters.get(name)) for name in ("train", "epoch")}
        log.begin(self.state.step, self.state.validation_due, tests=bool(args.test_file))
        if resumed_from:
            log("resume", step=self.state.step, checkpoint=str(resumed_from))
        self.profile = profiler(accelerator, args, folder)
        self.trace = self.profile.__enter__()
        self.is_culprit_named = False
        self.scores: dict | None = None
        self.predictions: list[str] | None = None
        self.published: list[Path] = []
        self.model_step: int | None = None  # of the best weights, if they were loaded
        self.first_step = self.state.step
        if self.state.step_in_epoch or self.state.done_before:
            self._plan_epoch(self.state.epoch)
        self.began = self.step_began = self.counted = time.perf_counter()
        self._look_for_a_stop()
        if self.state.stop:
            log.say(f"nothing to train: {self.state.stop}")
        else:
            log.say(self.state.forget_other_validation(args))

    def _look_for_a_stop(self) -> None:
        lr = self.scheduler.get_last_lr()[0]
        self.state.stop = stop_reason(self.accelerator, self.args, self.state, lr, self.warmup)

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.state.wall_seconds, self.counted = self.state.wall_seconds + now - self.counted, now

    def is_over(self) -> bool:
        """Whether a stop rule is met or a signal came."""
        return bool(self.state.stop or self.received)

    def poll(self) -> None:
        """Raises Interrupted on all processes if one of them received a signal."""
        self.signals.poll()

    # ---- a step

    def loader(self, examples: list, epoch: int, collate: Callable) -> DataLoader:
        """The steps that remain of an epoch, each a list of this process's micro-batches.

        `collate(examples, dummy=...)` makes a micro-batch, as in `StepBatches`.
        """
        steps, done = self._plan_epoch(epoch), self.state.step_in_epoch
        self.log.start_epoch(epoch, done, len(steps))
        batches = StepBatches(examples, steps[done:], collate, self.accelerator.process_index)
        pins = self.accelerator.device.type == "cuda"
        return DataLoader(batches, batch_size=None, num_workers=self.args.dataloader_num_workers, pin_memory=pins)

    def _plan_epoch(self, epoch: int) -> list:
        steps, before = self.plan(epoch, without=self.state.done_before), len(self.state.done_before)
        planned = sum(len(part) for step in steps for micro_batch in step for part in micro_batch)
        self.steps_in_epoch, self.done_share = len(steps), before / (before + planned)
        return steps

    def begin_step(self, count: int) -> int:
        """Returns `count` summed over all processes, and notes a signal to any of them."""
        total, self.received = self.signals.agree(count)
        return total

    def try_step(self, micro_step, micro_batches: list, total: int, halve: Callable | None = None) -> list[dict] | None:
        """Calls `micro_step(batch, total)` for each micro-batch. Returns None if memory ran out on any process.

        The exchange of gradients begins in the last micro-batch. If memory runs out and `halve` is given, all processes
        try again and exchange nothing meanwhile: where it ran out, with the smaller ones that `halve(micro_batches)`
        makes, until it returns [].
        """
        self.tried, exchange = (micro_step, micro_batches, total), getattr(self.model, "exchange", None)
        sums = self._compute(*self.tried, exchange)
        if not any_process(self.accelerator, sums is None):
            return sums
        if exchange:
            exchange.drop()
        self.optimizer.zero_grad()
        if not halve:
            return None
        micro_batches, sums = micro_batches if sums else halve(micro_batches), None
        while micro_batches and sums is None:
            self.tried = (micro_step, micro_batches, total)
            sums = self._compute(*self.tried)
            micro_batches = micro_batches if sums else halve(micro_batches)
        return None if any_process(self.accelerator, sums is None) else sums

    def _compute(self, micro_step, micro_batches: list, total: int, exchange=None) -> list[dict] | None:
        """What `micro_step` returns for each micro-batch, or None and no gradients if memory ran out on this process.

        With an `exchange`, gradients are sent to the other processes.
        """
        self._seed_step()
        sums = []
        try:
            for number, batch in enumerate(micro_batches, start=1):
                if exchange:
                    exchange.is_due = number == len(micro_batches)
                sums.append(micro_step(batch, total))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or is_sharded(self.accelerator):
                raise
            sums = None
        if sums is None:
            self.optimizer.zero_grad()
        if exchange:
            exchange.complete(is_failed=sums is None)
        return sums

    def check_gradients(self, sums: list[dict], gnorm: float) -> str | None:
        """Why the step must be dropped: what is not finite in it. None if the gradient norm is finite.

        Once in a run the step is computed again, to name the first module whose output is not finite. In fp16 the loss
        is scaled, and gradients overflow now and then although the loss is finite: nothing is to be named then.
        """
        if math.isfinite(gnorm):
            return None
        failure = "the gradient norm is not finite"
        is_overflow = self.accelerator.scaler and not any_process(
            self.accelerator, not all(math.isfinite(of_micro_batch["loss"]) for of_micro_batch in sums)
        )
        if self.args.nan_detector and not self.is_culprit_named and not is_overflow:
            self.is_culprit_named = True
            self.optimizer.zero_grad()
            self._seed_step()
            micro_step, micro_batches, total = self.tried
            with NanDetector(self.accelerator, self.model) as detector:
                for batch in micro_batches:
                    micro_step(batch, total)
            failure = detector.culprit
        if self.accelerator.scaler:  # fp16: lower the loss scale, as `optimizer.step()` would
            self.accelerator.scaler.update()
        return failure

    def skip(self, reason: str) -> None:
        """Counts and logs a step that is dropped on all processes; raises Diverged after too many in a row."""
        self.state.note_skip(self.args, self.log, reason)

    def count(self, sums: list[dict], gnorm: float) -> None:
        """Adds a step that is applied to the meters: the sums of its micro-batches and its gradient norm."""
        self.state.skipped_in_a_row = 0
        for meter in self.meters.values():
            meter.add_step(gnorm, self.args.max_grad_norm)
            for of_micro_batch in sums:
                meter.add(**of_micro_batch)

    def end_step(self) -> None:
        """Moves on to the next step: writes log lines that are due and looks whether a stop rule is met."""
        accelerator, args, state = self.accelerator, self.args, self.state
        if state.skipped_in_a_row:  # only then it has fallen; reading it waits for the GPU
            check_loss_scale(accelerator, args)
        state.advance(self.steps_in_epoch)
        self._count_time()
        for meter in self.meters.values():
            meter.seconds += self.counted - self.step_began  # from batch to weights
        if state.step % args.log_steps == 0 or state.step_in_epoch == 0:
            if args.check_weight_norm:
                check_weight_norm(accelerator, self.model)
            self.log("train", step=state.step, epoch=self._epochs(), lr=self.scheduler.get_last_lr()[0],
                     skipped=state.skipped, **self.meters["train"].read(accelerator), wall=state.wall_seconds,
                     seconds_left=self._seconds_left())  # fmt: skip
        if state.step_in_epoch == 0:
            self.log("epoch", step=state.step, epoch=self._epochs(), **self.meters["epoch"].read(accelerator))
        self.log.advance()
        give_back_memory()
        if self.trace:
            self.trace.step()
        self._look_for_a_stop()
        self.step_began = time.perf_counter()

    def _epochs(self) -> float:
        """Passes over the examples that are done, with the fraction of the present one."""
        state = self.state
        if not state.step_in_epoch and not state.done_before:
            return float(state.epoch)
        return state.epoch + self.done_share + (1 - self.done_share) * state.step_in_epoch / self.steps_in_epoch

    def _seconds_left(self) -> float | None:
        """Until the last step of the learning rate schedule, at the pace since the start; None if it has no end."""
        remaining, done = self.max_steps - self.scheduler.last_epoch, self.state.step - self.first_step
        return remaining * (self.counted - self.began) / done if remaining >= 0 else None

    def _seed_step(self) -> None:
        seed_step(self.args.seed, self.state.step, self.accelerator.process_index)

    # ---- validation and checkpoints, between two steps

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A context in which a signal (see `poll`) stops the work early and ends the run."""
        try:
            yield
        except Interrupted as signalled:
            self.received = signalled.number
            close_bars()
        self.step_began = time.perf_counter()

    def is_validation_due(self) -> bool:
        """Whether this step is to be validated and was not yet; the last step of a run always is."""
        return self.state.is_validation_due(self.args)

    def note_validation(
        self, scores: dict, *, best_by: float | None, texts: dict[str, str], predictions: list[str] | None = None
    ) -> None:
        """Logs a validation and saves what it decides. The best checkpoint is that with the best `best_by`.

        `texts` are examples for TensorBoard, as Markdown, by tag.
        """
        self.scores, self.predictions = scores, predictions
        scores = {self.args.metric_for_best: best_by, **scores}  # the one that decides comes first
        self.log("validation", step=self.state.step, epoch=self._epochs(), **scores)
        self.log.track(texts, self.state.step)
        is_best = self.state.note_validation(self.args, best_by)
        self._look_for_a_stop()
        self.save(is_best=is_best)

    def is_checkpoint_due(self) -> bool:
        """Whether to save: at each interval, before each validation, and when the run is over."""
        return self.is_over() or self.is_validation_due() or self.state.is_checkpoint_due(self.args)

    def save(self, is_best: bool = False) -> None:
        """Starts to write a checkpoint. Raises CheckpointError if the one before could not be written."""
        self._count_time()
        self.state.validation_due = self.is_validation_due()  # for a run that resumes from here
        self.checkpoints.save(self.state, self.meters, is_best=is_best)

    def load_best(self) -> None:
        """With --load_best_model_at_end, puts the best checkpoint's weights into the model, which then has no scores.

        Warns if there is no such checkpoint.
        """
        if self.args.load_best_model_at_end and self.checkpoints.load_best(self.state):
            self.scores = self.predictions = None
            self.model_step = self.state.best_step

    def publish(self, write: Callable[[Path], None]) -> None:
        """Publishes the model that `write(folder)` writes, on the main process (see `checkpoint_files.publish`)."""
        self.published = checkpoint_files.publish(self.folder, write)

    def note_test(self, scores: dict, *, scored: int, of: int, need: str) -> None:
        """Logs the scores of the test split, which decide nothing, with the step of the weights, as `model_step`.

        Says how many `scored` examples have what scores `need`, if not all do.
        """
        if scored < of:
            rest = "only these are scored" if scored else "nothing is scored"
            self.log.say(f"test: {scored} of {of} examples have {need}; {rest}")
        if scored:
            self.log("test", step=self.state.step, model_step=self.model_step or self.state.step, **scores)

    def finish(self) -> None:
        """Waits for the last checkpoint and logs why the run ended."""
        self.log.end_epoch()
        self.profile.__exit__(None, None, None)
        self.checkpoints.wait()
        if self.received:
            reason = f"{signal.Signals(self.received).name}; run the same command again to resume"
            self.log("stop", step=self.state.step, reason=reason)
            return
        seconds = time.perf_counter() - self.began
        self.log("stop", step=self.state.step, reason=self.state.stop)
        self.log("done", step=self.state.step, seconds=seconds)
        self.log.say(f"done training in {seconds:.1f} s")
