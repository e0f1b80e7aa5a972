"""What takes long is made once and kept: whole, or in parts, after the last of which an interrupted
run goes on, and which several processes divide among them.

What is kept carries a key of all that it depends on, and is made again under another one.
"""

import contextlib
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError
from utils.runs.files import remove_leftovers
from utils.training.checkpoints import load_file, save_file
from utils.data.batches import UnreadableFiles


def cached(path, key, make, log, check=None):
    """The dict that `make()` gives, from the file at `path` where that was made under `key`.

    It is kept there with its key. A file that is broken, or of another key, is made again.
    `check`: see `read_cached`.
    """
    path = Path(path)
    if path.exists():
        try:
            return read_cached(path, key, check)
        except UserError as error:
            log.warning(f"{path} is made again: {error}")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"key": key, **make()}
    save_file(content, path)
    return content


def read_cached(path, key, check=None):
    """The dict that `cached` has kept; UserError where there is none, or one of another key.

    `check(content)` raises where the content is of another kind.
    """
    content = load_file(path)
    try:
        if content["key"] != key:
            raise UserError("it belongs to other data")
        if check is not None:
            check(content)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"it holds something else ({type(error).__name__}: {error})") from None
    return content


class Parts:
    """`count` things, made `size` at a time: iterating gives the dict of each part, in order.

    `make(first, n, progress)` makes the dict of n things from number `first` on; it may call
    `progress(k)` as it gets on. Each is `cached` under `key` at `path_of(first, n)`, so that after
    an interruption or a `share` what is there is read; None keeps nothing. `description` is what
    the progress bar says; `check`: see `read_cached`.

    Where a dict has an entry `unreadable`, {path: reason}, the log names those files, and
    `unreadable` collects them.
    """

    def __init__(self, count, size, make, path_of, key, log, description, check=None):
        self.count = count
        self.spans = [(first, min(size, count - first)) for first in range(0, count, size)]
        self.paths = {span: Path(path_of(*span)) for span in self.spans} if path_of else {}
        self.make, self.key, self.log = make, key, log
        self.description, self.check = description, check
        self.begin = None  # called once, before the first part is made or read
        # Not `passed_over`: the first process reads all parts, and names those of the others' too.
        self.unreadable = UnreadableFiles(
            lambda path, reason: log.warning(f"passed over {path}: {reason}")
        )

    def part(self, first, n, progress=lambda done: None):
        """The dict of the `n` things from number `first` on, which must be one of the parts."""
        def make():
            return self.make(first, n, progress)

        if not self.paths:
            return make()
        return cached(self.paths[first, n], self.key, make, self.log, self.check)

    def run_through(self, spans, shown=True):
        """Iterator of the dicts of some parts, with a progress bar where it is to be `shown`."""
        begin, self.begin = self.begin, None
        if begin:
            begin()
        for folder in self.folders():
            remove_leftovers(folder)  # of a killed process
        there = sum(n for (_, n), path in self.paths.items() if path.exists())
        if 0 < there < self.count:
            self.log.info(f"{self.description}: {there} of {self.count} are there already")
        total, done = sum(n for _, n in spans), 0
        with tqdm(
            total=total, desc=self.description, unit="image", dynamic_ncols=True,
            disable=not shown,
        ) as bar:
            for first, n in spans:
                part, done = self.part(first, n, bar.update), done + n
                bar.update(done - bar.n)
                for path, reason in part.get("unreadable", {}).items():
                    self.unreadable(path, reason)
                yield part

    def __iter__(self):
        return self.run_through(self.spans)

    def share(self, world):
        """Where the world has several processes: make this one's share, and wait for the others.

        From then on all parts are there, and iterating reads them.
        """
        world.agree(self.key, self.description)
        if world.size > 1 and self.paths:
            for _ in self.run_through(world.share(self.spans), world.is_first):
                pass
            world.wait()

    def nothing_readable(self):
        """The UserError that none of the things can be read."""
        path, reason = next(iter(self.unreadable.reasons.items()))
        return UserError(f"none of the {self.count} {self.description} can be read: check the "
                         f"path of the dataset (the first is {path}: {reason})")

    def remove(self):
        """Remove what is kept, and the folder that it lies in where nothing else does."""
        for path in self.paths.values():
            path.unlink(missing_ok=True)
        for folder in self.folders():
            with contextlib.suppress(OSError):
                folder.rmdir()

    def folders(self):
        """Where the parts are kept."""
        return {path.parent for path in self.paths.values()}


class Whole:
    """`join(parts)`, a dict, kept in one file: `cached` at `path` under the key of the parts.

    `parts` are Parts, which go once the file is there. Where the dict has an entry `unreadable`,
    {path: reason}, the log names those files each time.
    """

    def __init__(self, path, parts, join, check=None):
        self.path, self.parts, self.join, self.check = Path(path), parts, join, check

    def is_kept(self):
        """Whether the file is there, sound and of the key."""
        try:
            read_cached(self.path, self.parts.key, self.check)
            return True
        except UserError:
            return False

    def share(self, world):
        """Make this process's share of the parts where the whole is still to be made."""
        world.agree(self.parts.key, self.parts.description)
        if world.size > 1 and not world.told(world.is_first and self.is_kept()):
            self.parts.share(world)

    def get(self):
        """The dict, from its file or made of the parts."""
        parts = self.parts
        content = cached(self.path, parts.key, lambda: self.join(parts), parts.log, self.check)
        parts.remove()
        unreadable = content.get("unreadable", {})
        for path, reason in unreadable.items():
            parts.unreadable(path, reason)
        if unreadable:
            parts.log.warning(
                f"{len(unreadable)} of {parts.count} {parts.description} could not be read; they "
                f"are tried again once {self.path} is removed"
            )
        return content
