"""Checkpoints: the models and optimisers of a run, saved and restored by name."""

import json
import math

import torch

from hparams.parser import agrees
from hparams.settings import show
from utils.errors import DiskError, UserError
from utils.files import save_file, sync_folder, whole_file
from utils.runs.folder import RunFolder, steps_built_on
from utils.runs.manifest import (
    checkpoint_file, damage, is_saved, load_checkpoint, read_best, read_manifest, read_stats,
    write_manifest,
)


class Checkpoints:
    """Saves and restores a run's named models and optimisers as `<name>_<step>.th`.

    `models` and `optimizers` map names to objects with state_dict and load_state_dict, `scaler` is
    the gradient scaler. `keep` is how many complete checkpoints are kept, 0 all.
    """

    def __init__(self, folder, models, optimizers, scaler, keep=0):
        self.folder, self.models, self.optimizers = folder, models, optimizers
        self.scaler, self.keep = scaler, keep
        self.best = {}  # {"step", "figure", "value", "extra"}, as in its file

    def better(self, step, figures, *names):
        """The record of the best step if it is this one, by the first of the figures `names` that
        there is, of which less is better; else None."""
        name = next(name for name in names if name in figures)
        before = self.best.get("value", math.inf) if self.best.get("figure") == name else math.inf
        if figures[name] < before:
            return {"step": step, "figure": name, "value": figures[name]}

    def save(self, step, stats, best=None, extra=False):
        """Write all files of a step, the manifest last; `stats` is a dict of plain values, `best`
        the record of the best step if it is this one, `extra` whether it is saved only for that,
        and so removed once there is a better one.

        Raises DiskError, having removed what it has written, and UserError for weights that are
        not finite.
        """
        self.check_finite(step)
        self.clear(step)
        files = {}
        try:
            for name, thing in {**self.models, **self.optimizers}.items():
                path = self.folder.model(name, step)
                files[path.name] = save_file(thing.state_dict(), path)
            path = self.folder.stats(step)
            stats = {"step": step, "scaler": self.scaler.state_dict(), **stats}
            files[path.name] = save_file(stats, path)
            write_manifest(self.folder, step, files)
        except DiskError:
            for name in files:
                checkpoint_file(self.folder, name).unlink()
            raise
        if best:
            before, self.best = self.best, {**best, "extra": extra}
            with whole_file(self.folder.best) as file:
                file.write(json.dumps(self.best).encode())
            if before.get("extra"):
                self.remove([before["step"]])
        if self.keep:
            self.remove_old(step)

    def check_finite(self, step):
        """Raise UserError where a model holds weights that are not finite."""
        for name, model in self.models.items():
            if not all(value.isfinite().all() for value in model.state_dict().values()):
                raise UserError(
                    f"{name} holds weights at step {step} that are not finite, which are not "
                    f"saved: lower the learning rate, or clip gradients "
                    f"({self.folder.last_saved()})"
                )

    def clear(self, step):
        """Remove another run's files of a step: a kill while saving must not mix both runs."""
        self.folder.manifest(step).unlink(missing_ok=True)  # first: it promises the others
        names = [*self.models, *self.optimizers, f"{next(iter(self.models))}_ema"]
        for path in (*(self.folder.model(name, step) for name in names), self.folder.stats(step)):
            path.unlink(missing_ok=True)

    def remove_old(self, step):
        """Remove all but the last `keep` checkpoints up to `step`, if that one is whole."""
        old = [s for s in self.folder.complete_steps() if s <= step][: -self.keep]
        old = [s for s in old if s != self.best.get("step")]
        if old and not damage(self.folder, step):
            self.remove(old)

    def remove(self, steps):
        """Remove checkpoints, but for those that samplers have as autoencoder, and those whose
        manifest is damaged: which files are theirs is then not known."""
        for step in sorted(set(steps) - steps_built_on(self.folder)):
            try:
                files = read_manifest(self.folder, step)
            except ValueError:
                continue
            self.folder.manifest(step).unlink()  # first, or it would promise what is not there
            sync_folder(self.folder.saved_stats)
            for name in files:
                checkpoint_file(self.folder, name).unlink(missing_ok=True)

    def restore(self, H, log, optional=()):
        """Load step `H.load_step` (0: none) of the run `H.load_dir`; returns its stats, {} without.

        The first model must be there; what else published checkpoints lack is named in the log: an
        EMA starts from the model, an optimiser afresh. `optional`: see `load_weights`.
        """
        if not H.load_step:
            return {}
        if H.load_dir == H.log_dir:
            self.best = read_best(self.folder, H.load_step)
        folder, step = RunFolder(H.load_dir), H.load_step
        first = next(iter(self.models))
        for name, model in self.models.items():
            path = folder.model(name, step)
            if name != first and not is_saved(path):
                log.warning(f"{path} is not there: {name} starts from {first}")
                path = folder.model(first, step)
            load_weights(model, unwrapped(load_checkpoint(path), path, log), path, optional)
        for name, optimizer in self.optimizers.items() if H.load_optim else ():
            path = folder.model(name, step)
            if is_saved(path):
                load_optimizer(optimizer, load_checkpoint(path), path)
            else:
                log.warning(f"{path} is not there: {name} starts afresh")
        stats_path = folder.stats(step)
        if not is_saved(stats_path):
            log.warning(f"{stats_path} is not there: gradient scaler starts afresh")
            return {}
        stats = read_stats(folder, step, log)
        check_architecture(H, stats, stats_path)
        if stats.get("scaler"):
            try:
                self.scaler.load_state_dict(stats["scaler"])
            except (RuntimeError, KeyError, TypeError):
                raise UserError(f"{stats_path} holds no gradient scaler's state") from None
        log.info(f"restored step {step} of {folder.path}")
        return stats


# What other programs lay around a state dict: a dict that holds it, a prefix of all its names.
STATE_KEYS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, of torch.compile
LAYERS = 4  # at most, as a file may hold a dict that holds itself


def unwrapped(state, path, log=None):
    """The state dict in the content `state` of a model's file, without what is laid around it,
    which the log says; anything else is given back as it is, for `check_state_dict` to judge."""
    removed = []
    while len(removed) < LAYERS and (layer := outer_layer(state)):
        state, how = layer
        removed.append(how)
    if removed and log is not None:
        log.info(f"{path} was wrapped by another program: it is read {', '.join(removed)}")
    return state


def outer_layer(state):
    """(what the outermost layer around a state dict holds, how that is read), or None."""
    if not isinstance(state, dict):
        return None
    keys = [key for key in STATE_KEYS if isinstance(state.get(key), dict)]
    if len(keys) == 1:
        return state[keys[0]], f"from below the key {keys[0]!r}"
    for prefix in PREFIXES:
        if state and all(isinstance(key, str) and key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            return state, f"without the prefix {prefix!r}"
    return None


def load_weights(module, state, path, optional=()):
    """Load a state dict into a module; UserError naming file and key where it does not fit.

    Entries whose name starts with one of `optional` may be missing on either side.
    """
    check_state_dict(state, path)
    own, optional = module.state_dict(), tuple(optional)
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
    """`state`, read from `path`; UserError where it does not map names to tensors."""
    if not isinstance(state, dict):
        raise UserError(f"{path} is no model's file: it holds no state dict")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path} is no model's file: {str(key)[:80]!r} names no tensor")
    return state


# (part of a key, what the file was trained with where it has the part, what where it has not)
KEY_HINTS = (
    (".attn.key.", "with --attention full", "with --attention hydra"),
    (".rpb.", "with --position rpb", "without --position rpb"),
    ("pos_emb", "with --position absolute", "without --position absolute"),
    ("quantize.proj", "with --quantizer gumbel", "with --quantizer nearest"),
    ("_denoise_fn.", "with --sampler absorbing", "with --sampler autoregressive"),
)


def flag_hint(own, state):
    """What flag the file was trained with, where the keys of the file and the model tell."""
    def have(part):
        return [any(part in key for key in keys) for keys in (state, own)]

    for part, there, absent in KEY_HINTS:
        in_file, in_model = have(part)
        if in_file != in_model and (part != ".attn.key." or all(have(".attn."))):
            return f" (it was trained {there if in_file else absent})"
    return ""


def architecture_of(H, names):
    """The settings called `names`, kept with a checkpoint: its shapes do not show all of them."""
    return {name: getattr(H, name) for name in sorted(names)}


def check_architecture(H, stats, path):
    """Raise UserError where the checkpoint of `path` was trained with another architecture than H
    has, which a hparams.yaml that somebody has changed may give."""
    kept = stats.get("architecture")
    for name, value in kept.items() if isinstance(kept, dict) else ():
        if name in H.__dataclass_fields__ and not agrees(
            H.__dataclass_fields__[name], getattr(H, name), value
        ):
            raise UserError(f"{path} was trained with {name} {show(value)}, not "
                            f"{show(getattr(H, name))}: give --{name}, or mend its hparams.yaml")


def load_optimizer(optimizer, content, path):
    """Restore the state in an optimiser's file, not its settings, such as the learning rate;
    UserError where it is another optimiser's."""
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(content)
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {list(value.shape)}")
                # it was the file, mapped into memory; and a fused optimiser's step is on the device
                state[name] = value.to(parameter.device, copy=True)
    except Exception as error:  # an optimiser makes anything of another's state
        raise UserError(
            f"{path} does not fit this optimiser ({error}): check --optimizer, or start it afresh "
            f"with --no_load_optim"
        ) from None
    for group, settings_of_group in zip(optimizer.param_groups, settings):
        group.update(settings_of_group)
