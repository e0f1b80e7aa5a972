"""The machinery of hyperparameters: declared once, from which argparse and YAML are derived.

A group of settings is a dataclass whose fields are made by `setting`. A script's hyperparameters
`H` are an object of a class that inherits its groups, so that reading or writing a misspelt name
raises. `parse` fills H, later sources winning: the declared default, the dataset's defaults, the
architecture of a run that is loaded (its `hparams.yaml`), the command line.
"""

import argparse
import dataclasses
import difflib
import os
import re
import types
import typing

import yaml

from utils.errors import SettingsError
from utils.runs.files import whole_file


def setting(default, help, *, choices=None, minimum=None, above=None, maximum=None, below=None,
            architecture=None, required=False, one_for_all=False, only_with=None):
    """A field of a settings class.

    `minimum`/`maximum` include their bound, `above`/`below` do not. `architecture` names the model
    whose shape the setting decides ("autoencoder" or "sampler"): loading that model's run sets it.
    `one_for_all`: of a list, a single value stands for as many as are needed. `only_with`, (name,
    value): the flag is an error where that other setting has another value.
    """
    limits = {"at least": minimum, "more than": above, "at most": maximum, "less than": below}
    metadata = dict(
        help=help, choices=choices, architecture=architecture, required=required,
        one_for_all=one_for_all, only_with=only_with,
        limits={words: bound for words, bound in limits.items() if bound is not None},
    )
    if isinstance(default, (list, tuple)):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


LARGEST = 2**53  # what no number of any setting can mean
LONGEST = 1 << 20  # bytes of a settings file

HOLDS = {
    "at least": lambda value, bound: value >= bound,
    "more than": lambda value, bound: value > bound,
    "at most": lambda value, bound: value <= bound,
    "less than": lambda value, bound: value < bound,
}


@dataclasses.dataclass
class Settings:
    """Base of all hyperparameter objects: unknown names raise, values can be checked and saved.

    `without_flag` names settings that a script's models are built with and that nothing it does
    depends on: they keep their defaults.
    """

    without_flag = frozenset()

    def __setattr__(self, name, value):
        if name not in self.__dataclass_fields__:
            raise AttributeError(f"unknown hyperparameter {name!r}{did_you_mean(name, self)}")
        super().__setattr__(name, value)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"unknown hyperparameter {name!r}{did_you_mean(name, self)}")

    def validate(self):
        """Check every value against its declaration; raises SettingsError with one sentence."""
        for field in dataclasses.fields(self):
            check_setting(field, getattr(self, field.name))

    def save(self, path):
        """Write all settings to a YAML file, one `name: value` a line."""
        text = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, default_flow_style=None)
        with whole_file(path) as file:
            file.write(text.encode())


def did_you_mean(name, names):
    """`: did you mean 'x'?` where one of the names is near, else nothing."""
    if dataclasses.is_dataclass(names):
        names = [field.name for field in dataclasses.fields(names)]
    near = difflib.get_close_matches(name, list(names), n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def check_setting(field, value):
    """Raise SettingsError where a value, or one in a list of them, breaks its declaration."""
    if value is None and isinstance(field.type, types.UnionType):
        return
    if isinstance(value, list) != value_type(field)[1]:
        raise SettingsError(f"{field.name} cannot be {value!r}")
    for item in value if isinstance(value, list) else [value]:
        check_value(field, item)


def check_value(field, value):
    """Raise SettingsError where a single value breaks its field's type, choices or limits."""
    kind, _ = value_type(field)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = is_number if kind is float else type(value) is kind
    if not fits:
        raise SettingsError(f"{field.name} must be of type {kind.__name__}, not {value!r}")
    if is_number and not abs(value) < LARGEST:  # neither does infinity, nor what is no number
        raise SettingsError(f"{field.name} must be a number, and below {LARGEST}")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise SettingsError(f"{field.name} must be one of {', '.join(choices)}, not {value!r}")
    for words, bound in field.metadata["limits"].items():
        if not HOLDS[words](value, bound):
            raise SettingsError(f"{field.name} must be {words} {bound}, not {value}")


def value_type(field):
    """(type of one value, whether the field holds a list), from its annotation.

    Annotations are a type, list[type], or either of them `| None`.
    """
    kind = field.type
    if isinstance(kind, types.UnionType):
        kind = next(option for option in typing.get_args(kind) if option is not types.NoneType)
    if typing.get_origin(kind) is list:
        return typing.get_args(kind)[0], True
    return kind, False


class Toggle(argparse.Action):
    """`--name` sets True; its twin `--no_name` sets False."""

    def __init__(self, option_strings, dest, default=None, required=False, help=None):
        super().__init__(option_strings, dest, nargs=0, default=default, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class Parser(argparse.ArgumentParser):
    """Errors are one sentence, without the usage of sixty flags before it.

    All of torchrun's processes are given the same flags: the first one says what is wrong.
    """

    def error(self, message):
        flag = re.fullmatch(r"unrecognized arguments: (--\w+).*", message)
        if flag:
            message += did_you_mean(flag[1], self._option_string_actions)
        sentence = f"{self.prog}: error: {message} (--help lists every flag)\n"
        self.exit(2, sentence if os.environ.get("RANK", "0") == "0" else None)


def show(value):
    """A value as one would type it on the command line."""
    if value is None:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def describe_default(field, defaults):
    """`default X, digits Y` from the declaration and the datasets' `defaults` tables."""
    if field.metadata["required"]:
        return "required"
    declared = field.default
    if declared is dataclasses.MISSING:
        declared = field.default_factory()
    texts = [f"default {show(defaults['*'].get(field.name, declared))}"]
    for dataset, values in defaults.items():
        if dataset != "*" and field.name in values:
            texts.append(f"{dataset} {show(values[field.name])}")
    return "; ".join(texts)


def add_argument(group, field, defaults):
    """Add a field's flag to an argparse group; nothing is stored for a flag that is not given."""
    kind, is_list = value_type(field)
    help = f"{field.metadata['help']} [{describe_default(field, defaults)}]"
    options = dict(dest=field.name, default=argparse.SUPPRESS, help=help.replace("%", "%%"))
    if kind is bool:
        twin = [] if field.name.startswith("no_") else [f"--no_{field.name}"]
        group.add_argument(f"--{field.name}", *twin, action=Toggle, **options)
        return
    options["choices"] = field.metadata["choices"]
    if not field.metadata["choices"]:
        options["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
    group.add_argument(f"--{field.name}", type=kind, nargs="+" if is_list else None, **options)


def build_parser(settings_class, defaults, description):
    """The argparse parser of a settings class: one argument group per group of settings.

    `defaults` maps datasets to the defaults they change, "*" standing for all; help shows them.
    A setting that two groups declare is the first one's.
    """
    parser = Parser(description=description, allow_abbrev=False)
    done = set(settings_class.without_flag)
    for group_class in settings_class.__mro__:
        declared = vars(group_class).get("__annotations__", {})
        names = [name for name in declared if name not in done]
        done.update(names)
        if names:
            group = parser.add_argument_group(group_class.__doc__.rstrip("."))
        for name in names:
            add_argument(group, settings_class.__dataclass_fields__[name], defaults)
    return parser


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases, by which a short file can stand for values without end."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses aliases, which settings do not need")
        return super().compose_node(parent, index)


def read_yaml(path):
    """The mapping in a settings file; SettingsError where it is not one."""
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
    return values


ALL_NAMES = set()
"""Every setting that any script declares; filled as the classes are registered."""


def register(settings_class):
    """Class decorator: make a dataclass of a script's settings and note its names."""
    settings_class = dataclasses.dataclass(settings_class)
    ALL_NAMES.update(settings_class.__dataclass_fields__)
    return settings_class


def read_settings(path):
    """The settings in a run's file, a dict; SettingsError for a name that no script declares."""
    values = read_yaml(path)
    for name in values:
        if name not in ALL_NAMES:
            hint = did_you_mean(str(name), ALL_NAMES)
            raise SettingsError(f"{path} holds the unknown setting {name!r}{hint}")
    return values


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run whose settings a script takes over, where it has a settings file.

    `run` and `step` name the settings that say which; step 0 loads nothing. `adopt` are the names
    taken over, which a flag must not contradict; `borrow` those that a flag may override.
    """

    run: str
    step: str
    adopt: frozenset
    borrow: frozenset = frozenset()


def agrees(field, given, loaded):
    """Whether a flag's value says the same as a run's: the order of names does not matter."""
    if isinstance(given, list) and isinstance(loaded, list):
        if field.metadata["choices"]:
            return set(given) == set(loaded)
        if field.metadata["one_for_all"] and len(given) == 1:
            return all(value == given[0] for value in loaded)
    return given == loaded


def resolve(settings_class, given, defaults_of, loaded_runs, settings_file):
    """The settings object that the flags `given` (a dict) ask for, checked.

    `defaults_of(dataset)` are the dataset's defaults, `loaded_runs` LoadedRuns in the order in
    which they are read, `settings_file(run)` the path of a run's settings.
    Raises SettingsError with one sentence.
    """
    loaded, absent, found = {}, "", []
    for source in loaded_runs:
        run = {**loaded, **given}.get(source.run)
        step = {**loaded, **given}.get(source.step)
        path = settings_file(run) if run and step else None
        if path is None:
            continue
        if not path.exists():
            absent = absent or f" ({path} is not there to tell)"
            continue
        found.append(str(path))
        for name, value in read_settings(path).items():
            if name not in source.adopt | source.borrow:
                continue
            try:
                check_setting(settings_class.__dataclass_fields__[name], value)
            except SettingsError as error:
                raise SettingsError(f"{path}: {error}") from None
            loaded[name] = value
            if name in source.borrow or name not in given:
                continue
            if not agrees(settings_class.__dataclass_fields__[name], given[name], value):
                raise SettingsError(
                    f"--{name} {show(given[name])} contradicts {name} {show(value)} of {path}: "
                    f"leave the flag out, or load another run with --{source.run}"
                )
    chosen = {**loaded, **given}
    for field in dataclasses.fields(settings_class):
        if field.metadata["required"] and field.name not in chosen:
            if found and not absent:
                absent = f" (not in {' or '.join(found)}: is it a run of another kind?)"
            raise SettingsError(
                f"--{field.name} is required{absent}: {field.metadata['help']}"
            )
    H = settings_class()
    for name, value in {**defaults_of(chosen["dataset"]), **chosen}.items():
        if name in settings_class.__dataclass_fields__:
            setattr(H, name, value)
    H.validate()
    for name in given:
        if only_with := settings_class.__dataclass_fields__[name].metadata["only_with"]:
            other, value = only_with
            if getattr(H, other) != value:
                raise SettingsError(
                    f"--{name} would do nothing: it is for --{other} {value}, not "
                    f"{show(getattr(H, other))}"
                )
    return H
