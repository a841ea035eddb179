"""Where a run stands, and the rules that end it."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from utils.errors import Diverged
from utils.training.step import any_process


@dataclass
class LoopState:
    """Where a run stands. Checkpoints hold it as JSON."""

    epoch: int = 0  # complete passes over the examples
    step_in_epoch: int = 0
    step: int = 0  # optimizer steps, dropped ones included
    done_before: list[int] = field(default_factory=list)  # examples of this epoch that were read with another plan
    best: float | None = None
    best_step: int = 0
    best_metric: str | None = None  # whose score that is
    best_judged_by: list | None = None  # and how the validation was made
    validations_without_improvement: int = 0
    last_validation: int = 0  # its step
    validation_due: bool = False  # a signal interrupted it
    skipped: int = 0
    skipped_in_a_row: int = 0
    wall_seconds: float = 0.0  # since training began, validation and saving included, over all resumed runs
    negatives: list[list[list[int]]] | None = None  # mined hard negatives of each training pair and hop
    mined_in: int = 0  # the epoch before which they were mined
    stop: str | None = None  # why the run ended
    meters: dict = field(default_factory=dict)

    def note_validation(self, args, score: float | None) -> bool:
        """Counts a validation; True if its score is the best so far. A tie is no improvement."""
        greater_is_better = args.greater_is_better
        if greater_is_better is None:
            greater_is_better = args.metric_for_best not in ("loss", "nll_loss", "ppl")
        self.last_validation, self.validation_due = self.step, False
        is_number = score is not None and not math.isnan(score)
        better = is_number and (self.best is None or (score > self.best if greater_is_better else score < self.best))
        self.validations_without_improvement = 0 if better else self.validations_without_improvement + 1
        if better:
            self.best, self.best_step = score, self.step
            self.best_metric, self.best_judged_by = args.metric_for_best, args.judged_by()
        return better

    def forget_other_metric(self, args) -> None:
        """Forgets the best score, and with it the patience, if it is one of another metric."""
        if self.best_metric != args.metric_for_best:
            self.best, self.best_step, self.validations_without_improvement = None, 0, 0

    def forget_other_validation(self, args) -> str:
        """Forgets the best score if later validations are made otherwise; says so, or ""."""
        if self.best is None or self.best_judged_by in (None, args.judged_by()):
            return ""
        self.best, self.best_step, self.validations_without_improvement = None, 0, 0
        return "the best score so far is forgotten: the next validations are made otherwise"

    def advance(self, steps_in_epoch: int) -> None:
        """Counts a step; after the last one of an epoch, the epoch."""
        self.step += 1
        self.step_in_epoch += 1
        if self.step_in_epoch == steps_in_epoch:
            self.epoch, self.step_in_epoch, self.done_before = self.epoch + 1, 0, []

    def leave_out(self, plan: list) -> None:
        """Notes the examples read in this epoch with `plan`, because the rest of the epoch follows a new plan."""
        done = [i for step in plan[: self.step_in_epoch] for micro_batch in step for part in micro_batch for i in part]
        self.done_before, self.step_in_epoch = sorted({*self.done_before, *done}), 0

    def note_skip(self, args, log, reason: str) -> None:
        """Counts and logs a dropped step. Raises Diverged after more than `--max_skipped_steps` in a row."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        log("skip", step=self.step + 1, reason=reason, in_a_row=self.skipped_in_a_row)
        if self.skipped_in_a_row > args.max_skipped_steps:
            raise Diverged(
                f"{self.skipped_in_a_row} steps in a row were dropped, more than --max_skipped_steps "
                f"{args.max_skipped_steps}; the last one because {reason}"
            )

    def is_validation_due(self, args) -> bool:
        """Whether the current step must still be validated; the last step of a run always is."""
        if self.step == self.last_validation or not self.step:
            return False
        due = self.step % args.eval_steps == 0 if args.eval_steps else self.step_in_epoch == 0
        return bool(self.stop) or self.validation_due or (due and self.step >= args.eval_after_steps)

    def is_checkpoint_due(self, args) -> bool:
        every = args.checkpointing_steps
        return self.step % every == 0 if every else self.step_in_epoch == 0


def warmup_steps(args, max_steps: int) -> int:
    """Optimizer steps over which the learning rate rises: `--num_warmup_steps`, but a tenth of all steps at most."""
    return min(args.num_warmup_steps, max_steps // 10) if max_steps else args.num_warmup_steps


def schedule_steps(args, plan, shape) -> int:
    """Optimizer steps of the learning rate schedule: the smaller limit of steps and epochs, or 0 if there is none.

    `plan(epoch)` gives the steps of an epoch. Without `--max_tokens` their number depends on `shape(epoch)` only.
    """
    steps = 0
    for count in _steps_of_epochs(args, plan, shape, range(args.num_train_epochs)):
        steps += count
        if 0 < args.max_train_steps <= steps:
            break
    return min((limit for limit in (args.max_train_steps, steps) if limit), default=0)


def _steps_of_epochs(args, plan, shape, epochs: Iterable[int]) -> Iterator[int]:
    """Optimizer steps of each of these epochs; epochs of one shape are planned once."""
    counts = {}
    for epoch in epochs:
        key = epoch if args.max_tokens else tuple(shape(epoch).values())
        if key not in counts:
            counts[key] = len(plan(epoch))
        yield counts[key]


def steps_left(args, plan, shape, state: LoopState) -> int:
    """Optimizer steps from where a run stands until the last epoch ends, or until `--max_train_steps`."""
    most = max(args.max_train_steps - state.step, 0) if args.max_train_steps else math.inf
    if not args.num_train_epochs:
        return most
    left = 0
    if state.epoch < args.num_train_epochs:
        left = len(plan(state.epoch, without=state.done_before)) - state.step_in_epoch
    for count in _steps_of_epochs(args, plan, shape, range(state.epoch + 1, args.num_train_epochs)):
        if left >= most:
            break
        left += count
    return min(left, most)


def stop_reason(accelerator, args, state: LoopState, lr: float, warmup: int) -> str | None:
    """The first stop rule that is met, in words, or None. Called on all processes, which get the same answer.

    `--stop_min_lr` holds after the `warmup` steps, in which the learning rate rises.
    """
    hours = state.wall_seconds / 3600
    if args.stop_time_hours and any_process(accelerator, hours >= args.stop_time_hours):
        return f"stop_time_hours {args.stop_time_hours} reached"
    if args.max_train_steps and state.step >= args.max_train_steps:
        return f"max_train_steps {args.max_train_steps} reached"
    if args.num_train_epochs and state.epoch >= args.num_train_epochs:
        return f"num_train_epochs {args.num_train_epochs} reached"
    if state.step and state.step >= warmup and lr <= args.stop_min_lr:
        return f"learning rate {lr:.3g} at or under stop_min_lr {args.stop_min_lr}"
    if args.patience >= 0 and max(args.patience, 1) <= state.validations_without_improvement:
        return f"patience {args.patience}: {state.validations_without_improvement} validations without improvement"
    return None
