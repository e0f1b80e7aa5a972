"""Model files: written whole or not at all, read without running code, refused with a sentence."""

import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import torch

from utils.errors import DiskError, UserError
from utils.runs.files import sync_folder, whole_file
from utils.runs.folder import RunFolder


class HashedFile:
    """A binary file to write, which knows the `size` and the `sha256` of what was written.

    It keeps a full disk's error for `finish`: torch's writer would hide it behind its own.
    """

    def __init__(self, file):
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.error = None

    def write(self, content):
        """Take all of `content`, whatever the disk says."""
        if self.error is None:
            try:
                self.file.write(content)
            except OSError as error:
                self.error = error
        self.digest.update(content)
        self.size += len(content)
        return len(content)

    def flush(self):
        """Nothing yet: `whole_file` waits for the disk once all is written."""

    def finish(self):
        """{"size", "sha256"} of the whole; raises the OSError that came up on the way."""
        if self.error is not None:
            raise self.error
        return {"size": self.size, "sha256": self.digest.hexdigest()}


def save_file(content, path):
    """torch.save `content` into a `whole_file`; returns its size and hash, as `HashedFile`."""
    with whole_file(path) as file:
        hashed = HashedFile(file)
        torch.save(content, hashed)
        return hashed.finish()


def load_file(path):
    """What `save_file` wrote, on the CPU; UserError where the file is missing or no such file."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file {path}{steps_there(path)}")
    try:
        # An archive's tensors are mapped: read into memory, torch believes the sizes that the
        # file claims, and what lies beyond the end of a shorter one is then anything.
        mmap = is_archive(path)
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is refused: it is no file of tensors, or holds code that would be run"
        ) from None
    except Exception as error:  # what a broken or foreign file makes the reader raise is open
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{path} cannot be read as a model file: it is cut short, or another kind of file "
            f"({type(error).__name__}: {reason})"
        ) from None


def is_archive(path):
    """Whether a file is a zip archive, as torch writes, rather than one pickle, as it once did.

    Raises ValueError where its entries would take more room in memory than the file has, or are
    not what was written, which torch itself does not look at.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if compressed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("torch does not compress, this archive does")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it is damaged")
    return True


def steps_there(path):
    """`: NAME is there at steps ...` for a path NAME_<step>.th, to help who mistyped the step."""
    name = path.stem.rpartition("_")[0]
    if path.parent.name != "saved_models":
        return ""
    if not path.parent.is_dir():
        return f": {path.parent} does not exist, check the run's name"
    run = run_of(path)
    steps = run.steps(name)
    if not steps:
        return f": the run has no {name} checkpoint"
    return f": {name} is there at steps {' '.join(map(str, steps[-8:]))}"


def run_of(path):
    """The RunFolder that a model's or a stats file lies in."""
    folder = path.parent.parent
    return RunFolder(folder.name, root=folder.parent)


def load_weights(module, state, path, optional=()):
    """Load a state dict strictly into a module; UserError naming file and key where it differs.

    Entries whose name starts with one of `optional` may be missing on either side.
    """
    own, optional = module.state_dict(), tuple(optional)
    check_state_dict(state, path)
    state = {k: v for k, v in state.items() if k in own or not k.startswith(optional)}
    missing = [k for k in own if k not in state and not k.startswith(optional)]
    surplus = [key for key in state if key not in own]
    if missing or surplus:
        what = f"lacks {missing[0]}" if missing else f"holds the unknown {surplus[0]}"
        raise UserError(f"{path} is another model's file: it {what}{flag_hint(own, state)}")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise UserError(
                f"{path} does not fit: {key} has shape {list(value.shape)} where these settings "
                f"make {list(own[key].shape)}"
            )
    try:
        module.load_state_dict(state, strict=not optional)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} holds what is no model's weight: {reason}") from None


def check_state_dict(state, path):
    """Raise UserError unless `state`, read from `path`, maps names to tensors."""
    if not isinstance(state, dict):
        raise UserError(f"{path} is no model's file: it holds no state dict")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path} is no model's file: {str(key)[:80]!r} names no tensor")


def flag_hint(own, state):
    """Which flag to change when the keys tell what the file was trained with."""
    def has(keys, part):
        return any(part in key for key in keys)

    if has(state, ".attn.key.") and has(own, ".attn.qkv."):
        return " (it was trained with --attention full)"
    if has(state, ".attn.qkv.") and has(own, ".attn.key."):
        return " (it was trained with --attention hydra)"
    for part, position in ((".rpb.", "rpb"), ("pos_emb", "absolute")):
        if has(state, part) != has(own, part):
            verb = "with" if has(state, part) else "without"
            return f" (it was trained {verb} --position {position})"
    if has(state, "quantize.proj") != has(own, "quantize.proj"):
        kind = "gumbel" if has(state, "quantize.proj") else "nearest"
        return f" (it was trained with --quantizer {kind})"
    if has(state, "_denoise_fn.") != has(own, "_denoise_fn."):
        kind = "absorbing" if has(state, "_denoise_fn.") else "autoregressive"
        return f" (it was trained with --sampler {kind})"
    return ""


def file_hash(path):
    """sha256 of a file's bytes, as sha256sum prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_hash(module):
    """sha256 of a module's state: names, shapes and bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {list(value.shape)} {value.dtype}".encode())
        value = value.detach().cpu().contiguous().flatten()  # a number cannot be viewed as bytes
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def checkpoint_file(run, name):
    """Where a file lies that a manifest calls `name`: a plain name, which leaves no folder."""
    return (run.saved_stats if name.startswith("stats_") else run.models) / Path(name).name


def manifest_of(run, step):
    """{file name: {"size", "sha256"}} of a checkpoint; ValueError where the manifest is damaged."""
    try:
        files = json.loads(run.manifest(step).read_bytes())["files"]
        for name, entry in files.items():
            if not name.removesuffix(".th").endswith(f"_{step}"):
                raise ValueError(name)
            entry["size"], entry["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{run.manifest(step)} is damaged ({type(error).__name__})") from None
    return files


def file_damage(path, entry):
    """What is wrong with a file that a manifest has an `entry` on, or None."""
    if not path.is_file():
        return f"{path} is not there"
    if path.stat().st_size != entry["size"]:
        size = path.stat().st_size
        return f"{path} is damaged: it has {size} bytes, {entry['size']} were written"
    if file_hash(path) != entry["sha256"]:
        return f"{path} is damaged: its bytes are not those that were written"
    return None


def damage(run, step):
    """What is wrong with a complete checkpoint, in words that name the file, or None."""
    try:
        files = manifest_of(run, step)
    except ValueError as error:
        return str(error)
    problems = (file_damage(checkpoint_file(run, name), entry) for name, entry in files.items())
    return next(filter(None, problems), None)


def load_checkpoint(path):
    """`load_file` of one of a checkpoint's files, checked first where there is a manifest.

    Raises UserError that names a damaged file and the step before it that is whole.
    """
    run, step = run_of(path), int(path.name.removesuffix(".th").rpartition("_")[2])
    if run.manifest(step).exists():
        try:
            entry = manifest_of(run, step).get(path.name)
            problem = file_damage(path, entry) if entry else None
        except ValueError as error:
            problem = str(error)
        if problem:
            earlier = (s for s in reversed(run.complete_steps()) if s < step and not damage(run, s))
            whole = next(earlier, None)
            offer = "no earlier checkpoint is whole" if whole is None else f"step {whole} is whole"
            raise UserError(f"{problem}; {offer}")
    return load_file(path)


def load_stats(run, step):
    """The dict that was saved beside a checkpoint; UserError where the file holds another thing."""
    stats = load_checkpoint(run.stats(step))
    if not isinstance(stats, dict):
        raise UserError(f"{run.stats(step)} holds no dict of values")
    return stats


def choose_checkpoint(H, log, world):
    """With --resume, make `H.load_step` the newest checkpoint of the run that is not damaged.

    The first process chooses for all. Raises UserError where all of them are damaged. A run that
    begins without it leaves a mark until its record is there: should it be killed before, --resume
    begins it again, rather than go on with an earlier run in the same folder.
    """
    if H.resume:
        if world.is_first:
            take_newest(H, log)
        H.load_dir, H.load_step = world.told((H.load_dir, H.load_step))
    elif world.is_first and not goes_on(H):
        log.folder.begun.touch()


def goes_on(H):
    """Whether a run goes on in its own folder, rather than begin there."""
    return H.load_step > 0 and H.load_dir == H.log_dir


def take_newest(H, log):
    """What `choose_checkpoint` does in the first process."""
    run = RunFolder(H.log_dir)
    steps = run.steps_to_resume()
    for step in reversed(steps):
        problem = damage(run, step)
        if problem is None:
            log.info(f"--resume: going on from step {step} of {run.path}")
            H.load_dir, H.load_step = H.log_dir, step
            return
        log.warning(f"{problem}: --resume takes the checkpoint before step {step}")
    if steps:
        raise UserError(f"every checkpoint of {run.path} is damaged: give another --log_dir")
    log.info(f"--resume: {run.path} has no complete checkpoint, training begins")


class Checkpoints:
    """Saves and restores a run's named models and optimisers as `<name>_<step>.th`.

    `models` and `optimizers` map names to objects with state_dict / load_state_dict; `scaler` is
    the gradient scaler. The manifest of a step, with the size and hash of its files, is written
    last: a step that has it is complete. `keep` is how many complete checkpoints are kept, 0 all.
    """

    def __init__(self, folder, models, optimizers, scaler, keep=0):
        self.folder = folder
        self.models = models
        self.optimizers = optimizers
        self.scaler = scaler
        self.keep = keep

    def save(self, step, stats):
        """Write all files of a step; `stats` is a dict of plain values to keep beside them.

        Raises DiskError; the checkpoints of other steps are then as they were, and nothing of
        this one takes room.
        """
        for name, model in self.models.items():
            if not all(value.isfinite().all() for value in model.state_dict().values()):
                raise UserError(
                    f"{name} holds weights at step {step} that are not finite, which are not "
                    f"saved: lower the learning rate, or clip gradients ({self.folder.last_kept()})"
                )
        self.clear(step)
        files = {}
        try:
            for name, thing in {**self.models, **self.optimizers}.items():
                path = self.folder.model(name, step)
                files[path.name] = save_file(thing.state_dict(), path)
            path = self.folder.stats(step)
            stats = {"step": step, "scaler": self.scaler.state_dict(), **stats}
            files[path.name] = save_file(stats, path)
            with whole_file(self.folder.manifest(step)) as file:
                file.write(json.dumps({"files": files}, indent=1).encode())
        except DiskError:
            for name in files:
                checkpoint_file(self.folder, name).unlink()
            raise
        if self.keep:
            self.remove_old(step)

    def clear(self, step):
        """Remove the files of a step, which another run may have left in this folder: whatever a
        kill leaves of the new ones, they are never taken together with those."""
        self.folder.manifest(step).unlink(missing_ok=True)  # first: it promises the others
        names = [*self.models, *self.optimizers, f"{next(iter(self.models))}_ema"]
        for path in (*(self.folder.model(name, step) for name in names), self.folder.stats(step)):
            path.unlink(missing_ok=True)

    def remove_old(self, step):
        """Remove all but the last `keep` complete checkpoints up to `step`, if that one is good."""
        old = [s for s in self.folder.complete_steps() if s <= step][: -self.keep]
        if not old or damage(self.folder, step):
            return
        for step in old:
            try:
                files = manifest_of(self.folder, step)
            except ValueError:
                continue  # damaged: which files are its own is not known
            self.folder.manifest(step).unlink()  # first, or it would promise what is not there
            sync_folder(self.folder.saved_stats)
            for name in files:
                checkpoint_file(self.folder, name).unlink(missing_ok=True)

    def restore(self, run, step, log, *, optimizers=True, optional=()):
        """Load a step of `run`, a RunFolder; returns its stats ({} for published checkpoints).

        The first model must be there; what else is missing (an EMA starts from the model, an
        optimiser afresh) is named in the log. `optional`: see `load_weights`.
        """
        first = next(iter(self.models))
        for name, model in self.models.items():
            path = run.model(name, step)
            if name != first and not path.exists():
                log.warning(f"{path} is not there: {name} starts from {first}")
                path = run.model(first, step)
            load_weights(model, load_checkpoint(path), path, optional)
        for name, optimizer in self.optimizers.items() if optimizers else ():
            path = run.model(name, step)
            if path.exists():
                load_optimizer(optimizer, load_checkpoint(path), path)
            else:
                log.warning(f"{path} is not there: {name} starts afresh")
        if not run.stats(step).exists():
            log.warning(f"{run.stats(step)} is not there: gradient scaler starts afresh")
            return {}
        stats = load_stats(run, step)
        if stats.get("scaler"):
            try:
                self.scaler.load_state_dict(stats["scaler"])
            except (RuntimeError, KeyError, TypeError):
                raise UserError(f"{run.stats(step)} holds no gradient scaler's state") from None
        log.info(f"restored step {step} of {run.path}")
        return stats


def load_optimizer(optimizer, content, path):
    """Restore the state in an optimiser's file; its settings, such as the rate, stay as they are.

    Raises UserError where the file is another optimiser's.
    """
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(content)
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {list(value.shape)}")
                state[name] = value.clone()  # it was the file, mapped into memory
    except Exception as error:  # what an optimiser makes of another's state is open
        raise UserError(
            f"{path} does not fit this optimiser ({error}): check --optimizer, or start it afresh "
            f"with --no_load_optim"
        ) from None
    for group, kept in zip(optimizer.param_groups, settings):
        group.update(kept)
