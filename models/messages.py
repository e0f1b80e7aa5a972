"""Words of error messages, in which names of arguments and settings stand in backquotes."""

import re


def listed(values):
    """Values separated by spaces: [1, 8, 8] -> "1 8 8"."""
    return " ".join(map(str, values))


def renamed(error, names):
    """The ValueError with the same message but for `names`, a dict of old to new phrases."""
    return ValueError(re.sub(r"`\w+`", lambda name: names.get(name[0], name[0]), str(error)))
