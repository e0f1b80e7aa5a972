"""From declared settings to the flags of a script, and from flags to its hyperparameters.

Later sources win: the declared default, the dataset's defaults, the architecture of a run that is
loaded (its `hparams.yaml`), the command line.
"""

import argparse
import dataclasses
import inspect
import json
import os
import re
import shlex
import sys
from pathlib import Path

import yaml

from hparams.defaults import DECIDED, INTERVALS, follow_steps, recipe_of
from hparams.environment import is_first_process
from hparams.settings import ALL_NAMES, check_setting, did_you_mean, show, value_type
from utils.errors import SettingsError

LOGS = Path("logs")  # the folder of all runs, in the working directory
SETTINGS_FILE = "hparams.yaml"  # in the folder of a run
BEST_FILE = "saved_stats/best.json"  # there too: which step had the best validation
# What older files do not hold of a model: it has the declared defaults.
NEWER = {"norm_groups", "disc_input"}
LONGEST = 1 << 20  # bytes of a settings file
CHOSEN_ONCE = {"recipe", "preset"}  # a run that goes on cannot change what followed from them
GROWING = {*INTERVALS, "ema_beta"}  # what follows a --train_steps that a run goes on to
OF_DATASET = {"custom_dataset_path", "crops", "crop_side"}  # what means nothing for another dataset
RUN_NAMES = ("log_dir", "load_dir", "ae_load_dir")  # the settings that name runs


def run_name(text):
    """The name of a run below logs/, of what people type: NAME, NAME/, logs/NAME, an absolute path.

    Raises SettingsError where that lies outside logs/.
    """
    path = Path(os.path.normpath(text))
    if path.is_absolute() or not (LOGS / path).exists():
        for root in (LOGS, LOGS.absolute(), LOGS.resolve()):
            if path.is_relative_to(root):
                path = path.relative_to(root)
    name = path.as_posix()
    if "\0" in name or path.is_absolute() or name == "." or path.parts[0] == "..":
        raise SettingsError(f"the run folder {text!r} lies outside {LOGS}/: use a plain name")
    return name


# --- flags ---------------------------------------------------------------------------------------


class Toggle(argparse.Action):
    """`--name` sets True; its twin `--no_name` sets False."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, said by the first process, without the usage."""

    def error(self, message):
        flag = re.fullmatch(r"unrecognized arguments: (--\w+).*", message)
        if flag:
            message += did_you_mean(flag[1], self._option_string_actions)
        sentence = f"{self.prog}: error: {message} (--help explains the flags)\n"
        self.exit(2, sentence if is_first_process() else None)


def step_or_best(text):
    """The value of a flag that is a step or `best`."""
    if text == "best" or re.fullmatch(r"[-+]?\d+", text):
        return text if text == "best" else int(text)
    raise argparse.ArgumentTypeError(f"it must be a step or best, not {text!r}")


def best_step(run):
    """The step of the best validation of a run; SettingsError where none is recorded."""
    path = LOGS / run / BEST_FILE
    if not (LOGS / run).is_dir():
        raise SettingsError(f"there is no run folder {LOGS / run}")
    try:
        step = json.loads(path.read_bytes())["step"]
        if type(step) is not int or step < 1:
            raise ValueError("it holds no step")
    except FileNotFoundError:
        raise SettingsError(f"{LOGS / run} has no best checkpoint, as runs without validation "
                            f"(--steps_per_eval 0) have none: give a step") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SettingsError(f"cannot read {path} ({error}): give a step") from None
    return step


def step_for_best(settings_class, given, sources, name):
    """The step that `best` means for the setting `name`: that of a sampler's autoencoder is the one
    whose ids the sampler has learned, and else that of the best validation."""
    setting = settings_class.__dataclass_fields__[name].metadata["step_of"]
    others = {key: value for key, value in given.items() if key != name}
    learned = loaded_settings(settings_class, others, sources)[0]
    run = given.get(setting) or learned.get(setting) or getattr(settings_class, setting)
    return (learned.get(setting) == run and learned.get(name)) or best_step(run)


def describe_default(field, declared, defaults):
    """`default X; modern Y; digits Z`, of the `declared` default and the Defaults `defaults`."""
    if field.name in DECIDED:
        return DECIDED[field.name]
    texts = [f"default {show(defaults.everywhere.get(field.name, declared))}"]
    for layer, values in defaults.layers():
        if field.name in values:
            texts.append(f"{layer} {show(values[field.name]) or 'none'}")
    return "; ".join(texts)


def add_argument(group, field, default, hidden):
    """Add a field's flag to an argparse group; nothing is stored for a flag that is not given.

    Help says its `default`, unless it is `hidden`.
    """
    kind, is_list = value_type(field)
    help = f"{field.metadata['help']} [{default}]".replace("%", "%%")
    help = argparse.SUPPRESS if hidden else help
    options = dict(dest=field.name, default=argparse.SUPPRESS, help=help)
    if kind is bool:
        twin = [] if field.name.startswith("no_") else [f"--no_{field.name}"]
        group.add_argument(f"--{field.name}", *twin, action=Toggle, nargs=0, **options)
        return
    options["choices"] = field.metadata["choices"]
    if not options["choices"]:
        options["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
    if field.metadata["step_of"]:
        kind, options["metavar"] = step_or_best, "N"
    group.add_argument(f"--{field.name}", type=kind, nargs="+" if is_list else None, **options)


def build_parser(settings_class, defaults, sources=(), must_load=False, everything=False):
    """The argparse parser of a settings class: one argument group for each group of settings.

    The arguments are those of `get_hparams`. Help shows the defaults, and hides what the models of
    loaded runs decide unless it is to show `everything`. A setting that two groups declare is the
    first one's.
    """
    decided, shown = set(), set()  # by loaded runs; of these what a flag may override
    for source in sources:
        if must_load or source.run == "ae_load_dir":
            decided |= source.adopt | source.borrow
            shown |= source.borrow if must_load else set()
    declared, done = settings_class(), set(settings_class.without_flag)
    required = {name for name, field in settings_class.__dataclass_fields__.items()
                if field.metadata["required"]} - decided - done
    required |= {"load_dir", "load_step"} if must_load else set()
    parser = Parser(
        usage=" ".join(["%(prog)s", *(f"--{name} ..." for name in sorted(required)), "[flags]"]),
        description=settings_class.__doc__.partition(": ")[2], allow_abbrev=False, add_help=False,
    )
    help = parser.add_argument_group("Help")
    help.add_argument("-h", "--help", action="help", help="what this script decides")
    help.add_argument("--help_all", action="help", help="every flag, also those of loaded models")
    for group_class in settings_class.__mro__:
        names = [name for name in inspect.get_annotations(group_class) if name not in done]
        done.update(names)
        if names:
            group = parser.add_argument_group(group_class.__doc__.rstrip("."))
        for name in names:
            field = settings_class.__dataclass_fields__[name]
            default = describe_default(field, getattr(declared, name), defaults)
            if name in decided:
                default = "that of the loaded run"
            elif name in required:
                default = "required"
            hidden = name in decided - shown and not everything
            add_argument(group, field, default, hidden)
    return parser


# --- settings files ------------------------------------------------------------------------------


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases, with which a short file can stand for endless values."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses aliases, which settings do not need")
        return super().compose_node(parent, index)


def read_settings(path):
    """The settings in a run's file, a dict; SettingsError where it holds anything else."""
    try:
        with open(path, "rb") as file:
            content = file.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise ValueError(f"it has more than {LONGEST} bytes")
        values = yaml.load(content, PlainLoader)
    # Besides yaml's own errors: no text, a date that is none, lists in lists in lists.
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SettingsError(f"cannot read {path}: {reason}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path} does not hold settings (name: value, one a line)")
    for name in values:
        if name not in ALL_NAMES:
            hint = did_you_mean(str(name), ALL_NAMES)
            raise SettingsError(f"{path} holds the unknown setting {name!r}{hint}")
    return values


# --- from flags to H -----------------------------------------------------------------------------


@dataclasses.dataclass
class LoadedRun:
    """A run whose settings a script takes over, where it has a settings file.

    `run` is the setting that holds the run's name, `when` the one that says whether it is loaded.
    `adopt` are the settings taken over, which a flag must not contradict; `borrow` are those, more
    or among them, that a flag may override; `own` are more of these where the run goes on, which
    is where it is that of --log_dir.
    """

    run: str
    when: str
    adopt: set
    borrow: set = frozenset()
    own: set = frozenset()

    def path(self, settings_class, chosen):
        """The settings file of the run that the values `chosen` load; None where they load none."""
        name = chosen.get(self.run, getattr(settings_class, self.run))
        if not name or not chosen.get(self.when):
            return None
        folder = LOGS / name
        if self.when == "resume" and not (
            (folder / SETTINGS_FILE).exists() and any(folder.glob("saved_stats/[!.]*_*"))
        ):
            return None  # there is nothing to resume: training begins
        return folder / SETTINGS_FILE

    def overridable(self, settings_class, chosen):
        """The settings that a flag may override."""
        names = [chosen.get(name, getattr(settings_class, name)) for name in (self.run, "log_dir")]
        return (self.borrow | self.own) - CHOSEN_ONCE if names[0] == names[1] else self.borrow


def agrees(field, given, loaded):
    """Whether a flag's value says the same as a run's: the order of names does not matter."""
    if isinstance(given, list) and isinstance(loaded, list):
        if field.metadata["choices"]:
            return set(given) == set(loaded)
        if field.metadata["one_for_all"] and len(given) == 1:
            return all(value == given[0] for value in loaded)
    return given == loaded


def loaded_settings(settings_class, given, sources):
    """(settings that the runs in `sources` give, paths of their files, which may be missing).

    Raises SettingsError where a file holds a wrong value or a flag in `given` contradicts it.
    """
    loaded, paths = {}, []
    for source in sources:
        path = source.path(settings_class, {**loaded, **given})
        if path is None:
            continue
        paths.append(path)
        if "recipe" in source.borrow:  # a file without one is of before there were any
            loaded |= {"recipe": "published", "preset": "published"}
        free = source.overridable(settings_class, given)
        values = read_settings(path) if path.exists() else {}
        if values:
            for name in NEWER & source.adopt:
                values.setdefault(name, settings_class.__dataclass_fields__[name].default)
            for name in CHOSEN_ONCE & source.borrow:
                values.setdefault(name, "published")
        same_data = given.get("dataset", values.get("dataset")) == values.get("dataset")
        for name, value in values.items():
            taken = source.adopt | source.borrow | free
            if name not in taken or name in OF_DATASET and not same_data:
                continue
            field = settings_class.__dataclass_fields__[name]
            try:
                check_setting(field, value)
            except SettingsError as error:
                raise SettingsError(f"{path}: {error}") from None
            loaded[name] = value
            if name in free or name not in given:
                continue
            if not agrees(field, given[name], value):
                raise SettingsError(
                    f"--{name} {show(given[name])} contradicts {name} {show(value)} of {path}: "
                    f"leave the flag out, or load another run with --{source.run}"
                )
    return loaded, paths


def outgrown(settings_class, defaults, loaded, given):
    """The GROWING settings, a set, of a run that goes on to another --train_steps that followed
    from the one before."""
    steps = loaded.get("train_steps")
    if steps is None or given.get("train_steps", steps) == steps:
        return set()
    usual = defaults.of(loaded, False)
    follow = {name for name in GROWING & loaded.keys() if usual.get(name, 0) is None}
    before = settings_class()
    for name, value in {**usual, **loaded, **dict.fromkeys(follow)}.items():
        setattr(before, name, value)
    follow_steps(before)
    return {name for name in follow if loaded[name] == getattr(before, name)}


def preset_of_autoencoder(settings_class, chosen):
    """{"preset"} of the run that a sampler is to be trained on, where it has the recipe that the
    settings `chosen` mean; else an empty dict."""
    path = LOGS / chosen.get("ae_load_dir", "") / SETTINGS_FILE
    if "preset" in chosen or not chosen.get("ae_load_dir") or not path.exists():
        return {}
    values = read_settings(path)
    if "preset" not in values or values.get("recipe") != recipe_of(chosen):
        return {}
    try:
        check_setting(settings_class.__dataclass_fields__["preset"], values["preset"])
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    return {"preset": values["preset"]}


def check_required(settings_class, chosen, paths, must_load):
    """Raise SettingsError for a required setting that neither a flag nor a run gives."""
    own = LOGS / chosen.get("log_dir", settings_class.log_dir)
    for field in dataclasses.fields(settings_class):
        if field.metadata["required"] and field.name not in chosen:
            hint, missing = "", [path for path in paths if not path.exists()]
            if chosen.get("resume") and not must_load and own / SETTINGS_FILE not in paths:
                hint = f" ({own} holds no run to go on with)"
            elif missing:
                hint = f" ({missing[0]} is not there to tell)"
            elif paths and must_load and field.name == "sampler":
                raise SettingsError(f"{paths[0]} names no sampler, as that of an autoencoder: give "
                                    f"the run of a sampler, as train_sampler.py makes it")
            elif paths:
                files = " or ".join(map(str, paths))
                hint = f" (not in {files}: is it a run of another kind?)"
            raise SettingsError(f"--{field.name} is required{hint}: {field.metadata['help']}")


def get_hparams(settings_class, defaults, sources, argv=None, must_load=False):
    """The hyperparameters that `argv` (None: the command line) asks for; a wrong setting ends the
    program with status 2.

    `defaults` are as in `build_parser`, `sources` LoadedRuns in the order in which they are read.
    `must_load`: the script does nothing without a checkpoint.
    """
    everything = "--help_all" in (sys.argv if argv is None else argv)
    parser = build_parser(settings_class, defaults, sources, must_load, everything)
    given = vars(parser.parse_args(argv))
    try:
        given |= {name: run_name(given[name]) for name in RUN_NAMES if given.get(name)}
        for name in ("load_step", "ae_load_step"):
            if given.get(name) == "best":
                given[name] = step_for_best(settings_class, given, sources, name)
    except SettingsError as error:
        parser.error(str(error))
    if must_load:
        if not (given.get("load_dir") and given.get("load_step")):
            parser.error("--load_dir and --load_step must name the checkpoint to load")
        if not (LOGS / given["load_dir"]).is_dir():
            parser.error(f"there is no run folder {LOGS / given['load_dir']}: --load_dir is the "
                         f"name of a run below {LOGS}/ of the folder you are in")
    try:
        loaded, paths = loaded_settings(settings_class, given, sources)
        for name in outgrown(settings_class, defaults, loaded, given):
            del loaded[name]
        chosen = {**loaded, **given}
        check_required(settings_class, chosen, paths, must_load)
        H = settings_class()
        if "recipe" in settings_class.without_flag:  # nothing is trained: what no file says
            chosen["recipe"] = chosen["preset"] = "published"
        alike = preset_of_autoencoder(settings_class, chosen)
        sizes = defaults.of(chosen | alike, "preset" in given or bool(alike))
        for name, value in {**sizes, **chosen}.items():
            if name in settings_class.__dataclass_fields__:
                setattr(H, name, value)
        H.validate()
        H.check_flags(given)
        H.command = shlex.join(sys.argv if argv is None else [settings_class.script(), *argv])
    except SettingsError as error:
        parser.error(str(error))
    return H
