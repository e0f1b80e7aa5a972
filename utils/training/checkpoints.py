"""Checkpoints: the models and optimisers of a run, saved and restored by name."""

import torch

from utils.errors import DiskError, UserError
from utils.files import save_file, sync_folder
from utils.runs.folder import RunFolder
from utils.runs.manifest import (
    checkpoint_file, damage, load_checkpoint, load_stats, read_manifest, write_manifest,
)


class Checkpoints:
    """Saves and restores a run's named models and optimisers as `<name>_<step>.th`.

    `models` and `optimizers` map names to objects with state_dict and load_state_dict, `scaler` is
    the gradient scaler. `keep` is how many complete checkpoints are kept, 0 all.
    """

    def __init__(self, folder, models, optimizers, scaler, keep=0):
        self.folder, self.models, self.optimizers = folder, models, optimizers
        self.scaler, self.keep = scaler, keep

    def save(self, step, stats):
        """Write all files of a step, the manifest last; `stats` is a dict of plain values.

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
        if not old or damage(self.folder, step):
            return
        for step in old:
            try:
                files = read_manifest(self.folder, step)
            except ValueError:
                continue  # damaged: which files are its own is not known
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
        folder, step = RunFolder(H.load_dir), H.load_step
        first = next(iter(self.models))
        for name, model in self.models.items():
            path = folder.model(name, step)
            if name != first and not path.exists():
                log.warning(f"{path} is not there: {name} starts from {first}")
                path = folder.model(first, step)
            load_weights(model, load_checkpoint(path), path, optional)
        for name, optimizer in self.optimizers.items() if H.load_optim else ():
            path = folder.model(name, step)
            if path.exists():
                load_optimizer(optimizer, load_checkpoint(path), path)
            else:
                log.warning(f"{path} is not there: {name} starts afresh")
        stats_path = folder.stats(step)
        if not stats_path.exists():
            log.warning(f"{stats_path} is not there: gradient scaler starts afresh")
            return {}
        stats = load_stats(folder, step)
        if stats.get("scaler"):
            try:
                self.scaler.load_state_dict(stats["scaler"])
            except (RuntimeError, KeyError, TypeError):
                raise UserError(f"{stats_path} holds no gradient scaler's state") from None
        log.info(f"restored step {step} of {folder.path}")
        return stats


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
                state[name] = value.clone()  # it was the file, mapped into memory
    except Exception as error:  # an optimiser makes anything of another's state
        raise UserError(
            f"{path} does not fit this optimiser ({error}): check --optimizer, or start it afresh "
            f"with --no_load_optim"
        ) from None
    for group, settings_of_group in zip(optimizer.param_groups, settings):
        group.update(settings_of_group)
