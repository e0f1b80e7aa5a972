"""What is made once is made once, and again where anything says that it must be."""

import subprocess
import sys

import pytest
import torch

from helpers import OneOfMany
from hparams import UserError
from utils.data.cache import Parts, Whole, cached


class Log:
    def __init__(self):
        self.infos, self.warnings = [], []
        self.info, self.warning = self.infos.append, self.warnings.append


class Numbers:
    """Parts of the numbers 0..9, four at a time, and which of them were made."""

    def __init__(self, folder, key="key"):
        self.made, self.log = [], Log()
        self.parts = Parts(
            10, 4, self.make, lambda first, n: folder / f"{first}_{n}.pt", key, self.log, "numbers"
        )

    def make(self, first, n, progress):
        self.made.append(first)
        progress(n)
        return {"numbers": torch.arange(first, first + n), "unreadable": {"a": "it is bad"}}

    def all(self):
        return torch.cat([part["numbers"] for part in self.parts]).tolist()


def test_parts_are_made_once(tmp_path):
    first = Numbers(tmp_path / "there")
    assert first.all() == first.all() == [*range(10)] and first.made == [0, 4, 8]
    assert first.log.warnings == ["passed over a: it is bad"] and not first.log.infos
    second = Numbers(tmp_path / "there")
    assert second.all() == [*range(10)] and not second.made
    assert second.log.warnings == first.log.warnings  # a later run is told as well
    other = Numbers(tmp_path / "there", "another key")
    assert other.all() == [*range(10)] and other.made == [0, 4, 8]
    assert len([line for line in other.log.warnings if "it belongs to other data" in line]) == 3


def test_an_interrupted_loop_goes_on_after_the_last_part(tmp_path):
    first, path = Numbers(tmp_path), tmp_path / "0_4.pt"
    for part in first.parts:
        break
    assert first.made == [0] and [p.name for p in tmp_path.iterdir()] == [path.name]
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    (tmp_path / f".4_4.pt.{process.pid}.tmp").write_bytes(b"half of it")
    second = Numbers(tmp_path)
    assert second.all() == [*range(10)] and second.made == [4, 8]
    assert second.log.infos == ["numbers: 4 of 10 are there already"]
    assert {p.name for p in tmp_path.iterdir()} == {"0_4.pt", "4_4.pt", "8_2.pt"}
    path.write_bytes(path.read_bytes()[:-20])
    third = Numbers(tmp_path)
    assert third.all() == [*range(10)] and third.made == [0]


def test_parts_that_are_kept_nowhere_are_made_each_time(tmp_path):
    numbers = Numbers(tmp_path)
    parts = Parts(10, 4, numbers.make, None, None, numbers.log, "numbers")
    parts.share(OneOfMany(0, 2))  # nothing to share, nobody to wait for
    assert len([*parts]) == len([*parts]) == 3 and numbers.made == 2 * [0, 4, 8]
    assert not list(tmp_path.iterdir())


def test_a_whole_takes_the_place_of_its_parts(tmp_path):
    def whole(numbers):
        return Whole(tmp_path / "all.pt", numbers.parts, lambda parts: {"all": numbers.all()})

    numbers = Numbers(tmp_path / "parts")
    assert not whole(numbers).is_kept()
    assert whole(numbers).get()["all"] == [*range(10)] and whole(numbers).is_kept()
    assert [path.name for path in tmp_path.iterdir()] == ["all.pt"]
    again = Numbers(tmp_path / "parts")
    whole(again).share(OneOfMany(0, 2))  # whose look decides
    assert whole(again).get()["all"] == [*range(10)] and not again.made
    other = Numbers(tmp_path / "parts", "another key")
    assert not whole(other).is_kept()
    assert whole(other).get()["all"] == [*range(10)] and other.made == [0, 4, 8]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_each_process_makes_its_share_and_no_more(size, tmp_path):
    made = []
    for rank in range(size):
        numbers = Numbers(tmp_path)
        numbers.parts.share(OneOfMany(rank, size))
        assert len(numbers.made) <= -(-3 // size)
        made += numbers.made
    assert sorted(made) == [0, 4, 8]
    last = Numbers(tmp_path)
    assert last.all() == [*range(10)] and not last.made


def test_what_fails_while_it_is_made_leaves_nothing(tmp_path):
    def fail():
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        cached(tmp_path / "folder" / "a.pt", "key", fail, Log())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_nothing_readable_names_the_first(tmp_path):
    numbers = Numbers(tmp_path)
    numbers.all()
    with pytest.raises(UserError, match=r"none of the 10 numbers .* \(the first is a: it is bad"):
        raise numbers.parts.nothing_readable()
