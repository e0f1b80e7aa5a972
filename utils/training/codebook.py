"""A codebook that is alive: it begins as centres of the encoder's vectors, and entries that are not
used become such vectors. Rank 0 decides, and the others get its codebook."""

import torch

from utils.data.batches import evaluation_batches
from utils.data.split import sample_of
from utils.training.loop import due
from utils.training.precision import step_seed

VECTORS_PER_ENTRY = 32  # of which k-means makes the codebook
LAST = 0.9  # of train_steps; an entry that is revived later would not be learned


class CodebookCare:
    """Starts and revives the codebook of a `vqgan` at the steps that H says, and of its EMA
    `average` (None: there is none). `images` are the training images."""

    def __init__(self, H, vqgan, average, images, processes, on_unreadable):
        self.H, self.ae, self.images, self.processes = H, vqgan.ae, images, processes
        self.on_unreadable = on_unreadable
        self.quantizers = [vqgan.ae.quantize] + ([average.ae.quantize] if average else [])
        self.takes_part = H.quantizer == "nearest" and bool(
            H.codebook_start_step or H.codebook_revival
        )

    def restored(self):
        """A checkpoint, if there is one, has been loaded: what it has counted is rank 0's."""
        counts = self.takes_part and self.H.codebook_revival
        if counts and not self.processes.is_first:
            self.quantizers[0].uses.zero_()

    def gather_uses(self):
        """Let rank 0 have what all processes have counted since the last call."""
        if self.takes_part and self.H.codebook_revival:
            self.processes.sum(self.quantizers[0].uses)
            self.restored()

    def before(self, step):
        """What is due before a step: without quantization, or with the codebook that begins."""
        if not self.takes_part:
            return
        start = self.H.codebook_start_step
        if start and step == start:
            self.start(step)
        for quantizer in self.quantizers:
            quantizer.bypass = step < start

    @torch.no_grad()
    def after(self, step, loop):
        """What is due after a step that the `loop` has counted: entries that were not used are
        revived, unless the step was bad."""
        H = self.H
        if not self.takes_part or step <= H.codebook_start_step or step > LAST * H.train_steps:
            return
        if not due(step - H.codebook_start_step, H.codebook_revival):
            return
        loop.settle()
        if loop.bad_steps:
            return
        self.gather_uses()
        if self.processes.is_first:
            dead = self.quantizers[0].revive(self.rng(step))
            for average in self.quantizers[1:]:
                average.codebook[dead] = self.quantizers[0].codebook[dead]
        self.processes.copy_from_first(self.quantizers[0].codebook)

    @torch.no_grad()
    def start(self, step):
        """Make the codebook of the vectors of some training images, always the same ones."""
        if self.processes.is_first:
            ids = self.H.latent_shape[1] * self.H.latent_shape[2]
            n = -(-VECTORS_PER_ENTRY * self.H.codebook_size // ids)
            vectors = []
            for images, _ in evaluation_batches(
                sample_of(self.images, n), 32, 0, self.processes.device, self.on_unreadable
            ):
                vectors.append(self.ae.encoder(images).flatten(2).transpose(1, 2).flatten(0, 1))
            self.quantizers[0].initialize(torch.cat(vectors), self.rng(step))
            for quantizer in self.quantizers[1:]:
                quantizer.codebook.copy_(self.quantizers[0].codebook)
        self.processes.wait()
        self.processes.copy_from_first(self.quantizers[0].codebook)

    def rng(self, step):
        """The random generator, on the CPU, of a step."""
        return torch.Generator().manual_seed(step_seed(self.H.seed, step, "codebook"))
