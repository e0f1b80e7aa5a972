"""What is said in the environment rather than by flags: torchrun's processes, a password."""

import ipaddress
import os

from utils.errors import SettingsError

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PASSWORD = "HYDRA_PASSWORD"  # of the page


def process_count():
    """How many processes torchrun has started, 1 without it.

    Some clusters set one of its variables themselves: only all of them together mean torchrun.
    Raises SettingsError where they make no sense.
    """
    if any(name not in os.environ for name in TORCHRUN):
        return 1
    try:
        rank, local_rank, count = (int(os.environ[name]) for name in TORCHRUN[:3])
        if 0 <= rank < count and local_rank >= 0 and 0 <= int(os.environ["MASTER_PORT"]) < 2**16:
            return count
    except ValueError:
        pass
    values = ", ".join(f"{name}={os.environ[name]}" for name in TORCHRUN)
    raise SettingsError(f"{values} in the environment are no process of torchrun's: start with "
                        f"torchrun, or unset them")


def is_first_process():
    """Whether this is the process that speaks for all of torchrun's."""
    try:
        return process_count() == 1 or int(os.environ["RANK"]) == 0
    except SettingsError:
        return True


def incomplete_launch():
    """A sentence about torchrun's variables where only some of them are set; else None."""
    given = [name for name in TORCHRUN if name in os.environ]
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing and any(name in given for name in TORCHRUN[:3]):
        return (f"{', '.join(given)} set in the environment without {', '.join(missing)}: this "
                f"runs as one process")
    return None


def is_loopback(host):
    """Whether only this machine reaches a server that listens on `host`, a name or an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
