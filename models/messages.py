"""Words of error messages, in which names of arguments and settings stand in backquotes."""


def listed(values):
    """Values separated by spaces: [1, 8, 8] -> "1 8 8"."""
    return " ".join(map(str, values))
