"""Several processes, one training: what `torchrun --nproc_per_node=N` starts, usually one a GPU.

Every process holds the model and its share of each batch, `--batch_size` images: N processes do
what one process does with N times the batch. The first one alone logs, validates, keeps the EMA
and saves. Without torchrun there is a world of one process, in which all this is nothing.
"""

import datetime
import inspect
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from utils.errors import SettingsError, UserError
from utils.runs.folder import process_count
from utils.training.loop import resolve_device

# The first process may encode a dataset for hours while the others wait. One that ends is noticed
# at once all the same: its connections close, and torchrun ends the others.
PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is, and the device it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    parent: int = 0  # the process that started this one, where that is torchrun

    @property
    def is_first(self):
        """Whether this process is the one that logs and saves."""
        return self.rank == 0

    @property
    def purpose(self):
        """What to seed the noise of training with that each process draws for itself."""
        return "train" if self.size == 1 else f"train, process {self.rank} of {self.size}"

    def share(self, items):
        """This process's part of a sequence that all processes divide among them."""
        return items[self.rank :: self.size]

    def wrap(self, model, find_unused_parameters=False):
        """The model as its forward pass is called in training: backward averages the gradients.

        The state dict to save is that of `model` itself.
        """
        if self.size == 1:
            return model
        options = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        return DistributedDataParallel(
            model, find_unused_parameters=find_unused_parameters, **{sync: False}
        )

    def all(self, flags):
        """Which of `flags` bool [n] are true in all processes."""
        if self.size == 1:
            return flags
        flags = flags.to(torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        return flags.bool()

    def any(self, flag):
        """Whether a bool is true in any process."""
        if self.size == 1:
            return flag
        return not bool(self.all(torch.tensor([not flag], device=self.device)))

    def mean(self, values):
        """The dict of numbers `values` as means over the processes."""
        if self.size == 1:
            return values
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return dict(zip(values, (sums / self.size).tolist()))

    def told(self, value):
        """What the first process gives as `value`: a decision that all must take alike."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def agree(self, value, on):
        """Raise UserError where the processes have different values, `on` whatever that is."""
        if self.told(value) != value:
            raise UserError(f"the processes found different {on}: it changed while they started")

    @property
    def is_orphan(self):
        """Whether torchrun is gone, killed before it could end the processes that it started."""
        return self.size > 1 and os.getppid() != self.parent

    def wait(self):
        """Until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def first(self, function):
        """What `function()` gives: called by the first process, and then by the others, which
        find what it left on the disk."""
        if self.is_first:
            result = function()
        self.wait()
        return result if self.is_first else function()


def join(name):
    """The World of this process; `name` is the --device, as in `resolve_device`.

    torchrun's processes find each other, by nccl on GPUs, of which each takes its own, and by gloo
    on CPUs.
    """
    size = process_count()
    if size == 1:
        return World(device=resolve_device(name))
    if (name or "cuda").startswith("cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = resolve_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return World(dist.get_rank(), size, device, os.getppid())


def alone(name):
    """The device of a script that runs in one process, `name` as in `resolve_device`.

    Raises SettingsError where torchrun has started several.
    """
    if process_count() > 1:
        raise SettingsError("this script runs in one process: start it without torchrun")
    return resolve_device(name)


def leave():
    """Take leave of the other processes at the end of a script, should there be any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_peer(error):
    """Whether an error says that another process of the world has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
