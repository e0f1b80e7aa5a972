"""Results that take long are computed once and stored: as one file, or in parts.

Every file carries a key of all that its content depends on, and is made again under another key.
"""

import functools
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError
from utils.files import load_file, make_folder, remove_leftovers, save_file


def cached(path, key, make, log, check=None):
    """The dict that `make()` gives, from the file at `path` where `read_cached` takes it."""
    content = read_cached(path, key, log, check)
    if content is None:
        make_folder(Path(path).parent)
        content = {"key": key, **make()}
        save_file(content, path)
    return content


def read_cached(path, key, log, check=None):
    """The dict that `cached` has stored; None, said in the log, where the file is damaged, has
    another key, or `check(content)` raises because it is of another kind."""
    if not Path(path).exists():
        return None
    try:
        content = load_file(path)
        if content["key"] != key:
            raise UserError("it belongs to other data")
        if check is not None:
            check(content)
        return content
    except UserError as error:
        reason = error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"it holds something else ({type(error).__name__}: {error})"
    log.warning(f"{path} is not used: {reason}")
    return None


class Parts:
    """`count` results, computed `size` at a time: iterating gives the dict of each part, in order.

    `make(first, n, progress)` computes the dict of n results from number `first` on; it may call
    `progress(k)` on its way. Each is `cached` under `key` at `path_of(first, n)`, so that an
    interrupted run computes only what is missing; None stores nothing. `make_several(spans)` gives
    the dicts of several parts, which are computed `together` where so many are missing.
    """

    def __init__(self, count, size, make, path_of, key, log, description, check=None,
                 make_several=None, together=1):
        self.count = count
        self.spans = [(first, min(size, count - first)) for first in range(0, count, size)]
        self.paths = {span: path_of(*span) for span in self.spans} if path_of else {}
        self.make, self.key, self.log = make, key, log
        self.description, self.check = description, check
        self.make_several, self.together = make_several, together

    def part(self, first, n, progress=lambda done: None, following=()):
        """The dict of the `n` results from number `first` on, which must be one of the parts.

        Where it is missing, `following` spans are computed with it, as far as they are missing too.
        """
        make = functools.partial(self.make, first, n, progress)
        if not self.paths:
            return make()
        missing = [span for span in ((first, n), *following) if not self.paths[span].exists()]
        if self.together > 1 and len(missing) > 1 and missing[0] == (first, n):
            spans = missing[: self.together]
            for span, content in zip(spans, self.make_several(spans)):
                self.store(span, content)
        return cached(self.paths[first, n], self.key, make, self.log, self.check)

    def store(self, span, content):
        """Store the dict of a part."""
        make_folder(self.paths[span].parent)
        save_file({"key": self.key, **content}, self.paths[span])

    def after(self, first, n, stride=1):
        """Every `stride`-th span after that of a part: what a rank of so many computes next."""
        return self.spans[self.spans.index((first, n)) + stride :: stride]

    def run_through(self, spans, shown=True):
        """Iterator of the dicts of some parts, with a progress bar where it is to be `shown`."""
        self.prepare()
        with tqdm(
            total=sum(n for _, n in spans), desc=self.description, unit="image",
            dynamic_ncols=True, disable=not shown,
        ) as bar:
            done = 0
            for number, (first, n) in enumerate(spans, 1):
                part = self.part(first, n, bar.update, spans[number : number + self.together])
                done += n
                bar.update(done - bar.n)
                yield part

    def prepare(self):
        """Remove files that a killed process left half-written, and log how much is there."""
        for folder in {path.parent for path in self.paths.values()}:
            remove_leftovers(folder)
        there = sum(n for (_, n), path in self.paths.items() if path.exists())
        if 0 < there < self.count:
            self.log.info(f"{self.description}: {there} of {self.count} are there already")

    def __iter__(self):
        return self.run_through(self.spans)

    def divide(self, processes):
        """Let the ranks compute the parts in turn; then all parts are there to be read."""
        processes.check_equal(self.key, self.description)
        if processes.size > 1 and self.paths:
            mine = self.spans[processes.rank :: processes.size]
            for _ in self.run_through(mine, processes.is_first):
                pass
            processes.wait()
