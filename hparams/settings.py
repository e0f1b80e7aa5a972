"""How a setting is declared and checked: once, with its default, help and limits.

A group of settings is a class whose fields are made by `setting`. The hyperparameters `H` of a
script are an object of a class that inherits its groups; reading or writing a misspelt name raises.
`hparams/parser.py` derives the flags from these declarations.
"""

import dataclasses
import difflib
import operator
import types
import typing

import yaml

from utils.errors import SettingsError

LARGEST = 2**53  # no setting can mean a larger number
ALL_NAMES = set()  # of the settings of all groups


def setting(default, help, *, choices=None, minimum=None, above=None, maximum=None, below=None,
            required=False, one_for_all=False, only_with=None, step_of=None):
    """A field of a settings class.

    `minimum` and `maximum` include their bound, `above` and `below` do not. `one_for_all`: in a
    list, a single value stands for as many as are needed. `only_with` (name, value, ...): the
    flag is an error where that other setting has none of these values. `step_of`: the setting that
    names the run of which this is a step, so that the flag may also be `best`.
    """
    limits = [
        ("at least", operator.ge, minimum), ("more than", operator.gt, above),
        ("at most", operator.le, maximum), ("less than", operator.lt, below),
    ]
    metadata = dict(
        help=help, choices=choices, required=required, one_for_all=one_for_all,
        only_with=only_with, step_of=step_of,
        limits=[limit for limit in limits if limit[-1] is not None],
    )
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Settings:
    """Base of all hyperparameter objects; every class below it is a dataclass.

    `without_flag` names the settings that a script's models are built with but that the script
    itself does not use: they keep their defaults.
    """

    without_flag = frozenset()
    command = ""  # the command line that asked for these settings

    def __init_subclass__(cls):
        dataclasses.dataclass(cls)
        ALL_NAMES.update(cls.__dataclass_fields__)

    def __setattr__(self, name, value):
        if name not in self.__dataclass_fields__ and name != "command":
            self.__getattr__(name)
        super().__setattr__(name, value)

    def __getattr__(self, name):  # Python calls it for unknown names only
        hint = did_you_mean(name, self.__dataclass_fields__)
        raise AttributeError(f"unknown hyperparameter {name!r}{hint}")

    def validate(self):
        """Check every value against its declaration, and derive what follows from others.

        Raises SettingsError with one sentence.
        """
        for field in dataclasses.fields(self):
            check_setting(field, getattr(self, field.name))

    def check_flags(self, given):
        """Raise SettingsError where one of the flags `given` does nothing beside the others."""
        for name in given:
            only_with = self.__dataclass_fields__[name].metadata["only_with"]
            off = given[name] is False  # which is no wish for anything
            if only_with and not off and getattr(self, only_with[0]) not in only_with[1:]:
                other, *values = only_with
                if values != [True]:
                    other += f" {' or '.join(values)}, not {show(getattr(self, other))}"
                raise SettingsError(f"--{name} would do nothing: it is for --{other}")

    @classmethod
    def script(cls):
        """The script that these are the hyperparameters of, as its docstring says."""
        return cls.__doc__.partition(":")[0]

    def as_yaml(self):
        """All settings as YAML text, one `name: value` a line."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, default_flow_style=None)


def names_of(group):
    """The names of a group's settings."""
    return set(group.__dataclass_fields__)


def did_you_mean(name, names):
    """`: did you mean 'x'?` where one of the names is near, else nothing."""
    near = difflib.get_close_matches(name, names, n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def check_setting(field, value):
    """Raise SettingsError where a value, or one in a list of them, breaks its declaration."""
    kind, is_list = value_type(field)
    if value is None and isinstance(field.type, types.UnionType):
        return
    if isinstance(value, list) != is_list:
        raise SettingsError(f"{field.name} cannot be {value!r}")
    for item in value if is_list else [value]:
        check_value(field, kind, item)


def check_value(field, kind, value):
    """Raise SettingsError where a single value breaks its field's type, choices or limits."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = is_number if kind is float else type(value) is kind
    if not fits:
        raise SettingsError(f"{field.name} must be of type {kind.__name__}, not {value!r}")
    if is_number and not abs(value) < LARGEST:  # neither infinity nor NaN is below it
        raise SettingsError(f"{field.name} must be a number, and below {LARGEST}")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise SettingsError(f"{field.name} must be one of {show(choices, ', ')}, not {value!r}")
    for words, holds, bound in field.metadata["limits"]:
        if not holds(value, bound):
            raise SettingsError(f"{field.name} must be {words} {bound}, not {value}")


def value_type(field):
    """(type of one value, whether the field holds a list), from its annotation: a type,
    list[type], or either of them `| None`."""
    kind = field.type
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is list:
        return typing.get_args(kind)[0], True
    return kind, False


def show(value, separator=" "):
    """A value as one would type it on the command line."""
    if value is None:
        return "none"
    return separator.join(map(str, value)) if isinstance(value, list) else str(value)
