"""A run's checkpoints: saving them while training goes on, and resuming from them."""

import signal
import sys
from functools import partial
from pathlib import Path
from threading import Thread

from accelerate.utils import broadcast_object_list
from torch.optim.lr_scheduler import LambdaLR

from utils.errors import CheckpointError, DamagedCheckpoint, UsageError
from utils.files import remove
from utils.processes import from_main, wait_for_all
from utils.progress import Phase, progress
from utils.training import checkpoint_files
from utils.training.loop_state import LoopState
from utils.training.sharding import frozen_digest, gather_tensors, restore_tensors, stream, trained_tensors
from utils.training.step import is_sharded


class Checkpoints:
    """Saves the complete state of a run, and resumes from it with identical results.

    Training waits only while tensors are copied; a thread writes them. With FSDP it waits until they are written, one
    by one, because they may not fit into one process. A run resumes from a checkpoint only if `data` (a checksum of
    what is trained on) and `shape(epoch)` (what decides the examples of a step) are the same.
    """

    def __init__(self, accelerator, args, run_folder: Path, log, signals, *, model, optimizer, scheduler, data, shape):
        self.accelerator, self.args, self.log, self.signals = accelerator, args, log, signals
        self.model, self.optimizer, self.scheduler, self.data, self.shape = model, optimizer, scheduler, data, shape
        self.frozen = frozen_digest(accelerator, model)
        self.run_folder, self.folder = run_folder, run_folder / "checkpoints"
        self.copies: dict | None = None  # tensors that are being written
        self.is_writing, self.saved_step = False, -1
        self.thread: Thread | None = None  # on the main process
        self.error: BaseException | None = None

    def fingerprint(self, epoch: int) -> dict:
        """What must be the same in a checkpoint and in a run that resumes from it."""
        return {
            "script": Path(sys.argv[0]).name,
            "data": self.data,
            **{f"--{name}": value for name, value in self.args.decisive().items()},
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "frozen weights": self.frozen,
            "precision": self.accelerator.mixed_precision,
            "shape": self.shape(epoch),
        }

    def save(self, state: LoopState, meters: dict, *, is_best: bool) -> None:
        """Copies the state and starts to write it. Called on all processes. Raises what `wait` raises.

        Called again for the same step, as after its validation, it writes the loop's state anew and keeps the tensors.
        """
        self.wait()
        is_new, self.saved_step = state.step != self.saved_step, state.step
        whole = None
        if is_new and is_sharded(self.accelerator):
            # no copies: what lies on this process
            self.copies = trained_tensors(self.accelerator, self.model, self.optimizer)
            parts = (part[name] for part in self.copies.values() for name in checkpoint_files.file_order(part))
            count = sum(map(len, self.copies.values()))
            parts = progress(parts, "wrote", "tensors of the checkpoint", total=count)
            whole = stream(self.accelerator, parts)
        elif is_new:
            self.copies = gather_tensors(self.accelerator, self.model, self.optimizer, self.copies)
        state.meters = {name: meter.state(self.accelerator) for name, meter in meters.items()}
        scaler = self.accelerator.scaler
        content = {
            "loop": dict(vars(state)),  # no deep copy: the loop replaces lists and changes none
            "scheduler": {name: value for name, value in self.scheduler.state_dict().items() if name != "lr_lambdas"},
            "scaler": scaler.state_dict() if scaler else None,
        }
        if self.accelerator.is_main_process:
            folder = str(self.folder / f"step_{state.step:08d}")
            event = {"step": state.step, "folder": folder, "is_best": is_best}
            contents = {"state": content, "fingerprint": self.fingerprint(state.epoch), "is_best": is_best}
            work = partial(self._write, event, self.copies if is_new else None, contents, whole)
            if whole:
                work()
            else:
                self.thread = Thread(target=work, name=checkpoint_files.WRITER)
                self.thread.start()
        for _ in whole or ():  # on the other processes; on the main one, what is left after a failed write
            pass
        self.is_writing = True

    def _write(self, event: dict, tensors: dict | None, contents: dict, whole=None) -> None:
        try:
            limit = self.args.checkpoints_total_limit
            checkpoint_files.save(self.folder, event["step"], tensors, **contents, limit=limit, whole=whole)
            if tensors or event["is_best"]:
                self.log("checkpoint", **event)
        except BaseException as error:
            self.error = error
            self.signals.received = signal.SIGTERM  # ends the loop on all processes, which then call `wait`

    def wait(self) -> None:
        """Waits until the last checkpoint is complete. Called on all processes. Raises CheckpointError if it failed."""
        if not self.is_writing:
            return
        if self.thread:
            with Phase("waited for", "checkpoint to be written") as phase:
                self.thread.join()
                phase.done = 1
        # known to all, so that all processes end with the same code
        if failure := from_main(self.accelerator, lambda: self.error and (str(self.error) or repr(self.error))):
            raise CheckpointError(failure) from self.error
        self.is_writing, self.thread = False, None

    def begin(self) -> None:
        """Deletes the checkpoints of an earlier run with `--resume_from_checkpoint none`, once nothing is refused."""

        def clear() -> str:
            try:
                remove(self.folder)
            except OSError as error:
                return str(error)
            return ""

        if self.args.resume_from_checkpoint == "none" and (failure := from_main(self.accelerator, clear)):
            raise UsageError(failure)

    def resume(self) -> tuple[LoopState, Path | None, bool, dict | None]:
        """Restores model, optimizer and schedule as `--resume_from_checkpoint` and `--init_from` say.

        Returns the loop's state, the checkpoint (or None), whether it is this run's own, and its batch shape if that
        differs from this run's (or None), which needs `--allow_reshard`. Called on all processes. Raises UsageError.
        """
        accelerator, args, optimizer, scheduler = self.accelerator, self.args, self.optimizer, self.scheduler
        found = [None]
        tensors = {}
        if accelerator.is_main_process:
            try:
                folder, is_own = _find(args, self.run_folder, self.log.warn)
                if folder is not None:
                    tensors, content, saved = checkpoint_files.read(folder)
                    if is_own:
                        _compare(folder, saved, self.fingerprint(content["loop"]["epoch"]), args.allow_reshard)
                    elif saved.get("frozen weights") != self.frozen:
                        raise UsageError(
                            f"--init_from {folder}: that run and this one do not train the same weights, or its "
                            "adapters belong to another base model; name its run folder with --model_name_or_path"
                        )
                    found = [{"folder": folder, "is_own": is_own, "content": content, "fingerprint": saved}]
            except (UsageError, DamagedCheckpoint, OSError) as error:
                found = [{"error": str(error)}]
        wait_for_all()
        broadcast_object_list(found)
        if found[0] is None:
            return LoopState(), None, False, None
        if "error" in found[0]:
            raise UsageError(found[0]["error"])

        folder, is_own, content, saved = (found[0][name] for name in ("folder", "is_own", "content", "fingerprint"))
        keep_optimizer = is_own or not args.reset_optimizer
        restore_tensors(accelerator, self.model, optimizer, tensors, with_optimizer=keep_optimizer)
        if accelerator.scaler and content["scaler"]:
            accelerator.scaler.load_state_dict(content["scaler"])
        state = LoopState(**content["loop"])
        is_here = is_own and folder.resolve().parent == self.folder.resolve()
        self.saved_step = state.step if is_here else -1
        if is_own or not args.reset_lr_scheduler:
            peaks = content["scheduler"]["base_lrs"] if is_own else scheduler.base_lrs  # another run has its own
            scheduler.load_state_dict({**content["scheduler"], "base_lrs": peaks, "lr_lambdas": [None] * len(peaks)})
        set_learning_rate(optimizer, scheduler, scheduler.last_epoch)
        if not is_own:
            state.stop, state.validation_due = None, False
            if args.reset_dataloader:
                state.epoch, state.step, state.last_validation = 0, 0, 0
            if args.reset_dataloader or saved["data"] != self.fingerprint(state.epoch)["data"]:
                state.step_in_epoch, state.done_before = 0, []  # a position in an epoch of other data means nothing
                state.negatives, state.mined_in = None, 0
            if args.reset_meters:
                state.best, state.best_step, state.validations_without_improvement = None, 0, 0
                state.skipped, state.wall_seconds, state.meters = 0, 0.0, {}
        state.forget_other_metric(args)
        is_reshaped = saved["shape"] != self.fingerprint(state.epoch)["shape"]
        return state, folder, is_own, saved["shape"] if is_reshaped else None

    def load_best(self, state: LoopState) -> bool:
        """Loads the weights of the best validation unless the model has them. Called on all processes.

        Returns whether they were loaded. If that checkpoint is missing or damaged, or if no validation was judged by
        `--metric_for_best`, it warns and keeps the model.
        """
        tensors = {}
        if self.accelerator.is_main_process and state.step and not state.best_step:
            self.log.warn("the model is the last one, in spite of --load_best_model_at_end: no validation was judged "
                          f"by --metric_for_best {self.args.metric_for_best}")  # fmt: skip
        if self.accelerator.is_main_process and state.best_step not in (0, state.step):
            try:
                tensors, *_ = checkpoint_files.read((self.folder / "best").resolve())
            except (DamagedCheckpoint, OSError) as error:
                self.log.warn(f"the model is the last one, in spite of --load_best_model_at_end: {error}")
        is_found = from_main(self.accelerator, lambda: bool(tensors))
        if is_found:
            restore_tensors(self.accelerator, self.model, self.optimizer, tensors, with_optimizer=False)
            self.log.say(f"the model is that of step {state.best_step}, the best by --metric_for_best")
        return is_found


def set_learning_rate(optimizer, scheduler, step: int) -> None:
    """Gives the optimizer the learning rate of a step of the schedule; of a scheduler of another kind, its last one."""
    if isinstance(scheduler, LambdaLR):
        factors = [factor(step) for factor in scheduler.lr_lambdas]
        scheduler.last_epoch = step
        scheduler._last_lr = [peak * factor for peak, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = lr


def _find(args, run_folder: Path, warn) -> tuple[Path | None, bool]:
    """The checkpoint to start from, and whether it belongs to this run (otherwise to `--init_from`)."""
    checkpoints, folder = run_folder / "checkpoints", None
    checkpoint_files.tidy(checkpoints)
    if args.resume_from_checkpoint == "auto":
        folder = checkpoint_files.find_newest_valid(checkpoints, warn)
    elif args.resume_from_checkpoint != "none":
        folder = Path(args.resume_from_checkpoint).resolve()
        if problem := checkpoint_files.problems(folder):
            raise UsageError(f"--resume_from_checkpoint {problem}")
        newest = max(checkpoints.glob("step_*"), default=folder).resolve()
        if newest != folder:
            raise UsageError(
                f"--resume_from_checkpoint {folder}: {checkpoints} holds other checkpoints, up to {newest.name}; "
                "remove the newer ones, or resume from it in another --output_dir"
            )
    if folder:
        return folder, True
    if args.init_from:
        folder = Path(args.init_from)
        if (folder / "checkpoints").is_dir():
            folder = checkpoint_files.find_newest_valid(folder / "checkpoints", warn) or folder
        if problem := checkpoint_files.problems(folder):
            raise UsageError(f"--init_from {problem}")
        if args.resume_from_checkpoint == "none" and checkpoints.resolve() in folder.resolve().parents:
            raise UsageError(
                f"--init_from {folder}: --resume_from_checkpoint none would remove it; choose another --output_dir"
            )
    return folder, False


def _compare(folder: Path, saved: dict, current: dict, allow_reshard: bool) -> None:
    """Raises UsageError if a checkpoint cannot be resumed here, with all differences."""
    names = {name for name in (*saved, *current) if name != "shape" and saved.get(name) != current.get(name)}
    differences = [f"{name} {saved.get(name)} there, {current.get(name)} here" for name in sorted(names)]
    reshaped = [
        f"{name} {value} there, {current['shape'].get(name)} here"
        for name, value in sorted(saved["shape"].items())
        if current["shape"].get(name) != value
    ]
    if differences:
        raise UsageError(
            f"{folder} belongs to another run: {'; '.join(differences + reshaped)}. Choose another --output_dir, "
            "or start again in this one with --resume_from_checkpoint none"
        )
    if reshaped and not allow_reshard:
        raise UsageError(
            f"{folder} was saved with other batches: {'; '.join(reshaped)}. Pass --allow_reshard to resume "
            "at the same place in the epoch"
        )
