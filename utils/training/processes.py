"""The processes (ranks) that `torchrun --nproc_per_node=N` starts, one a GPU.

Each holds the model and `--batch_size` images of each batch: N processes do what one does with N
times the batch. Rank 0 alone logs, validates, keeps the EMA and saves. With one process everything
here is a no-op.
"""

import contextlib
import datetime
import inspect
import os
import sys
import threading
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hparams.environment import process_count
from utils.errors import SettingsError, UserError
from utils.signals import default_signals

# In a step all ranks come together within moments: one that hangs is noticed after TIMEOUT. Rank 0
# may prepare data, validate or save for hours while the others wait, for which there is a group of
# its own. A rank that ends is noticed at once all the same: its connections close, and torchrun
# ends the others.
TIMEOUT = datetime.timedelta(minutes=15)
PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is, and the device it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    launcher: int = 0  # the process id of torchrun
    patient: object = None  # the group of all processes that waits for PATIENCE, on the CPU
    hosts: object = None  # that which waits for TIMEOUT, on the CPU; None: the default group is it

    @property
    def is_first(self):
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def noise_purpose(self):
        """The `purpose` in `seed_step` of noise that each rank draws for itself."""
        return "train" if self.size == 1 else f"train, process {self.rank} of {self.size}"

    @property
    def is_orphan(self):
        """Whether torchrun was killed and has left this process behind."""
        return self.size > 1 and os.getppid() != self.launcher

    def wrap(self, model, without_gradient=()):
        """`model`, with a backward pass that averages the gradients over all processes.

        Parameters whose names are in `without_gradient` have no part in any loss.
        """
        if self.size == 1:
            return model
        # Else every step would find out again, and tell all, which parameters took part.
        model._ddp_params_and_buffers_to_ignore = list(without_gradient)
        options = inspect.signature(DistributedDataParallel).parameters  # torch renamed one
        sync = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **{sync: False})

    def adds_up(self, wrapped, averages):
        """Context of a forward and backward pass of a `wrapped` model: gradients add up, and are
        averaged over the processes where this is the pass that `averages`."""
        if self.size == 1 or averages:
            return contextlib.nullcontext()
        return wrapped.no_sync()

    def sum(self, tensor):
        """The sum of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all(self, flags):
        """Which of `flags` bool [n] are true in all processes."""
        if self.size == 1:
            return flags
        flags = flags.to(torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        return flags.bool()

    def any(self, flag):
        """Whether a bool is true in any process. No device is waited for."""
        if self.size == 1:
            return flag
        number = torch.tensor(int(flag))
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.hosts)
        return bool(number)

    def mean(self, values):
        """The dict of numbers `values` as means over the processes."""
        if self.size == 1:
            return values
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, (self.sum(sums) / self.size).tolist()))

    def broadcast(self, value):
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.patient)
        return values[0]

    def copy_from_first(self, tensor):
        """Make a tensor what it is on rank 0, in place."""
        if self.size > 1:
            dist.broadcast(tensor.detach(), 0)

    def gather(self, value):
        """The values of all ranks, in their order, on rank 0; None on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_first else None
        dist.gather_object(value, values, group=self.patient)
        return values

    def check_equal(self, value, what):
        """Raise UserError where ranks have different values of `what`."""
        if self.broadcast(value) != value:
            raise UserError(f"the processes found different {what}: it changed while they started")

    def wait(self):
        """Wait until all processes have come here, however long it takes."""
        if self.size > 1:
            dist.barrier(self.patient)


def resolve_device(name):
    """The torch.device called `name`, None for a GPU where there is one; UserError where this
    machine or this torch lacks it."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not usable here: {reason}") from None
    return device


def init_processes(name):
    """The Processes of this script on the device `name`, as in `resolve_device`.

    torchrun's take one GPU each and communicate through nccl, on CPUs through gloo.
    """
    if process_count() == 1:
        return Processes(device=resolve_device(name))
    if (name or "cuda").startswith("cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = resolve_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    message = (f"waiting for {process_count()} processes at {place}, as RANK and WORLD_SIZE in the "
               f"environment say: without torchrun, unset them")
    waiting = threading.Timer(10, print, [message], {"file": sys.stderr, "flush": True})
    waiting.daemon = True
    waiting.start()
    hosts = None
    try:
        with default_signals():  # torch waits without letting Python handle any
            if device.type == "cuda":
                dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
                hosts = dist.new_group(backend="gloo", timeout=TIMEOUT)
            else:
                dist.init_process_group("gloo", timeout=TIMEOUT)
            patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    finally:
        waiting.cancel()
    return Processes(dist.get_rank(), dist.get_world_size(), device, os.getppid(), patient, hosts)


def single_process(name):
    """The Processes of a script that runs in one; SettingsError where torchrun started several."""
    if process_count() > 1:
        raise SettingsError("this script runs in one process: start it without torchrun")
    return Processes(device=resolve_device(name))
