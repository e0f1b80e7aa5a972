"""Model files: written whole or not at all, read without running code, refused with a sentence."""

import hashlib
import os
import pickle
from pathlib import Path

import torch

from hparams.errors import UserError
from hparams.runs import RunFolder


def save_file(content, path):
    """torch.save `content` so that `path` holds the old file or the whole new one, never a part."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def cached(path, key, make, log):
    """The dict that `make()` gives, from the file at `path` where that was made under `key`.

    It is kept there with its key. A file that is broken, or of another key, is made again.
    """
    path = Path(path)
    if path.exists():
        try:
            content = load_file(path)
            if content["key"] == key:
                return content
            problem = "it belongs to other data"
        except (UserError, KeyError, TypeError) as error:
            problem = str(error)
        log.warning(f"{path} is made again: {problem}")
    content = {"key": key, **make()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(content, path)
    return content


def load_file(path):
    """What `save_file` wrote, on the CPU; UserError where the file is missing or no such file."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file {path}{steps_there(path)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
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


def steps_there(path):
    """`: NAME is there at steps ...` for a path NAME_<step>.th, to help who mistyped the step."""
    name = path.stem.rpartition("_")[0]
    if path.parent.name != "saved_models":
        return ""
    if not path.parent.is_dir():
        return f": {path.parent} does not exist, check the run's name"
    run = RunFolder(path.parent.parent.name, root=path.parent.parent.parent)
    steps = run.steps(name)
    if not steps:
        return f": the run has no {name} checkpoint"
    return f": {name} is there at steps {' '.join(map(str, steps[-8:]))}"


def load_weights(module, state, path, optional=()):
    """Load a state dict strictly into a module; UserError naming file and key where it differs.

    Entries whose name starts with one of `optional` may be missing on either side.
    """
    own, optional = module.state_dict(), tuple(optional)
    if not isinstance(state, dict):
        raise UserError(f"{path} is no model's file: it holds no state dict")
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
    module.load_state_dict(state, strict=not optional)


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


class Checkpoints:
    """Saves and restores a run's named models and optimisers as `<name>_<step>.th`.

    `models` and `optimizers` map names to objects with state_dict / load_state_dict; `scaler` is
    the gradient scaler. `stats_<step>` is written last: a step that has it is complete.
    """

    def __init__(self, folder, models, optimizers, scaler):
        self.folder = folder
        self.models = models
        self.optimizers = optimizers
        self.scaler = scaler

    def save(self, step, stats):
        """Write all files of a step; `stats` is a dict of plain values to keep beside them."""
        for name, thing in {**self.models, **self.optimizers}.items():
            save_file(thing.state_dict(), self.folder.model(name, step))
        save_file(
            {"step": step, "scaler": self.scaler.state_dict(), **stats}, self.folder.stats(step)
        )

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
            load_weights(model, load_file(path), path, optional)
        for name, optimizer in self.optimizers.items() if optimizers else ():
            path = run.model(name, step)
            if path.exists():
                load_optimizer(optimizer, path)
            else:
                log.warning(f"{path} is not there: {name} starts afresh")
        if not run.stats(step).exists():
            log.warning(f"{run.stats(step)} is not there: gradient scaler starts afresh")
            return {}
        stats = load_file(run.stats(step))
        if stats.get("scaler"):
            self.scaler.load_state_dict(stats["scaler"])
        log.info(f"restored step {step} of {run.path}")
        return stats


def load_optimizer(optimizer, path):
    """Restore an optimiser's state; its settings, the learning rate among them, stay as they are.

    Raises UserError where the file is another optimiser's.
    """
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(load_file(path))
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {list(value.shape)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit this optimiser ({error}): check --optimizer, or start it afresh "
            f"with --no_load_optim"
        ) from None
    for group, kept in zip(optimizer.param_groups, settings):
        group.update(kept)
