"""Averaging gradients over the processes, while the backward pass of a step's last micro-batch still runs.

PyTorch's DDP does the same (Li et al., 2020, arXiv:2006.15704), but if memory runs out on one process, the others wait
for it without end. Here each process sends the same buckets in the same order, whatever happens on it.
"""

import itertools
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate.utils.memory import clear_device_cache

from utils.training.memory import is_out_of_memory
from utils.training.step import is_sharded

BUCKET = 2**25  # bytes that are sent at once, at least


class Exchange:
    """The buckets of one step after another, each a sum over all processes.

    A bucket is one tensor, and the gradients in it become views of it: there is no second copy of them. It also says
    which of its parameters have a gradient on this process. Those that had none on some process in the last step, such
    as an unused pooler's, are sent last, so that nothing waits for them. What has no gradient anywhere stays without.

    Attributes:
        is_due: whether the backward pass that comes is that of the step's last micro-batch.
    """

    def __init__(self, model):
        self.model, self.is_due, self.is_open = model, False, False
        self.hooked: set[int] = set()  # parameters are known by their id()
        self.late: set[int] = set()  # those that are sent last
        self.buckets: list[list] | None = None  # of this step; None: it has not begun
        self.sent: list[tuple] = []  # (parameters, bucket, what to wait for)

    def _plan(self) -> None:
        """Buckets in about the order in which a backward pass makes the gradients; the same on all processes."""
        if self.buckets is not None:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad][::-1]
        self.buckets, size, kind = [], 0, None
        for parameter in sorted(parameters, key=lambda p: id(p) in self.late):
            before, kind = kind, (parameter.dtype, parameter.device, id(parameter) in self.late)
            if size >= BUCKET or kind != before:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(parameter)
            size += parameter.nbytes
        self.missing = [len(bucket) for bucket in self.buckets]
        self.bucket_of = {id(p): number for number, bucket in enumerate(self.buckets) for p in bucket}

    def open(self) -> None:
        """From now on, each bucket is sent as soon as its gradients are there and those before it have been sent."""
        self._plan()
        for parameter in itertools.chain(*self.buckets):
            if id(parameter) not in self.hooked:
                self.hooked.add(id(parameter))
                parameter.register_post_accumulate_grad_hook(self._note)
        self.is_open = True

    def _note(self, parameter) -> None:
        if not self.is_open or id(parameter) in self.late:
            return
        number = self.bucket_of.pop(id(parameter), None)
        if number is None:
            raise RuntimeError("only one backward pass may run within `exchanging`, unless it gets overlaps=False")
        self.missing[number] -= 1
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self.sent)]
        has_gradient = torch.ones(len(bucket), dtype=bucket[0].dtype, device=bucket[0].device)
        for number, parameter in enumerate(bucket):
            if parameter.grad is None:
                has_gradient[number] = 0
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([*(parameter.grad.flatten() for parameter in bucket), has_gradient])
        sizes = [parameter.numel() for parameter in bucket]
        for parameter, view in zip(bucket, flat[: sum(sizes)].split(sizes), strict=True):
            parameter.grad = view.view_as(parameter)  # which frees the gradient's own memory
        self.sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))

    def complete(self, is_failed: bool = False) -> None:
        """Sends what is left. A process that `is_failed` sends zeros, with one bucket in memory; then drop the step."""
        self._plan()
        self.is_due = self.is_open = False
        if not is_failed:
            while len(self.sent) < len(self.buckets):
                self._send()
            return
        left = self.buckets[len(self.sent) :]
        for parameter in itertools.chain(*self.buckets):
            parameter.grad = None
        self._wait()
        clear_device_cache()
        for bucket in left:
            size = sum(parameter.numel() for parameter in bucket) + len(bucket)
            dist.all_reduce(bucket[0].new_zeros(size))
        self.sent, self.buckets = [], []  # complete

    def _wait(self) -> list[tuple]:
        sent, self.sent = self.sent, []
        for *_, work in sent:
            work.wait()
        return sent

    def drop(self) -> None:
        """Forgets this step's exchange, because memory ran out on some process."""
        self._wait()
        self.buckets, self.is_due, self.is_open = None, False, False

    def average(self) -> None:
        """Makes each gradient the mean over all processes."""
        self.complete()
        sent, self.buckets, shares = self._wait(), None, []
        for bucket, flat, _ in sent:
            flat /= dist.get_world_size()
            shares.append(flat[-len(bucket) :].float())
        self.late = set()
        shares = torch.cat(shares).tolist() if shares else []  # of the processes that have a gradient
        for parameter, share in zip(itertools.chain(*(bucket for bucket, *_ in sent)), shares, strict=True):
            if share < 1:
                self.late.add(id(parameter))
            if share == 0:
                parameter.grad = None


@contextmanager
def exchanging(model, overlaps: bool = True):
    """A context for the backward pass of a micro-batch. In the last one of a step, gradients are sent to all processes.

    They are sent as the pass goes on, or after it if `overlaps` is False, as several passes need it. If memory runs out
    on this process, the others do not wait for it. Without several processes, or with FSDP, nothing happens here.
    """
    exchange = getattr(model, "exchange", None)
    if exchange is None or not exchange.is_due:
        yield
        return
    if overlaps:
        exchange.open()
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            exchange.complete(is_failed=True)
        raise
    exchange.complete()


def average_gradients(accelerator, model) -> None:
    """Averages the gradients over the processes: waits for what was sent, and sends what was not."""
    if accelerator.num_processes > 1 and not is_sharded(accelerator):
        (getattr(model, "exchange", None) or Exchange(model)).average()
