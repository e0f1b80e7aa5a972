"""Cached results are computed once, and again where their key or their file has changed."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers import OneOfMany
from hparams import UserError
from utils.data import latents
from utils.data.batches import stream_positions
from utils.data.cache import Parts, cached, read_cached
from utils.data.images import ImageDataset
from utils.data.latents import load_latents
from utils.data.pixels import UnreadableImage
from utils.files import HOST
from utils.training.processes import Processes


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
        return {"numbers": torch.arange(first, first + n)}

    def all(self):
        return torch.cat([part["numbers"] for part in self.parts]).tolist()


def test_parts_are_made_once(tmp_path):
    first = Numbers(tmp_path / "there")
    assert first.all() == first.all() == [*range(10)] and first.made == [0, 4, 8]
    assert not first.log.warnings and not first.log.infos
    second = Numbers(tmp_path / "there")
    assert second.all() == [*range(10)] and not second.made
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
    (tmp_path / f".4_4.pt.{HOST}.{process.pid}.tmp").write_bytes(b"half of it")
    second = Numbers(tmp_path)
    assert second.all() == [*range(10)] and second.made == [4, 8]
    assert second.log.infos == ["numbers: 4 of 10 are there already"]
    assert {p.name for p in tmp_path.iterdir()} == {"0_4.pt", "4_4.pt", "8_2.pt"}
    path.write_bytes(path.read_bytes()[:-20])
    third = Numbers(tmp_path)
    assert third.all() == [*range(10)] and third.made == [0]


def test_parts_without_files_are_made_each_time(tmp_path):
    numbers = Numbers(tmp_path)
    parts = Parts(10, 4, numbers.make, None, None, numbers.log, "numbers")
    parts.divide(OneOfMany(0, 2))  # nothing to divide, nobody to wait for
    assert len([*parts]) == len([*parts]) == 3 and numbers.made == 2 * [0, 4, 8]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [2, 3, 5])
def test_each_rank_makes_its_parts_and_no_more(size, tmp_path):
    made = []
    for rank in range(size):
        numbers = Numbers(tmp_path)
        numbers.parts.divide(OneOfMany(rank, size))
        assert len(numbers.made) <= -(-3 // size)
        made += numbers.made
    assert sorted(made) == [0, 4, 8]
    last = Numbers(tmp_path)
    assert last.all() == [*range(10)] and not last.made


def test_divide_computes_nothing_in_one_process(tmp_path):
    numbers = Numbers(tmp_path / "parts")
    numbers.parts.divide(Processes())
    assert not numbers.made and not list(tmp_path.iterdir())


def test_a_failure_while_computing_leaves_no_file(tmp_path):
    def fail():
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        cached(tmp_path / "folder" / "a.pt", "key", fail, Log())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_read_cached_wants_a_whole_file_of_the_key_and_the_kind(tmp_path):
    path, log = tmp_path / "a.pt", Log()
    assert read_cached(path, "key", log) is None and not log.warnings
    content = cached(path, "key", lambda: {"a": 1}, log)
    assert content == read_cached(path, "key", log) == {"key": "key", "a": 1}
    assert read_cached(path, "key", log, lambda content: content["a"]) == content
    assert not log.warnings
    assert read_cached(path, "another key", log) is None
    assert read_cached(path, "key", log, lambda content: content["b"]) is None
    path.write_bytes(path.read_bytes()[:-20])
    assert read_cached(path, "key", log) is None
    assert [warning.partition(": ")[0] for warning in log.warnings] == 3 * [f"{path} is not used"]


# --- ids -----------------------------------------------------------------------------------------


class Images(ImageDataset):
    """Images whose grey is their index, but for one corner."""

    embedded = True

    def __init__(self, n, broken=()):
        super().__init__("images", img_size=2, n_channels=1)
        self.n, self.broken = n, broken

    def __len__(self):
        return self.n

    def pixels(self, index):
        if index in self.broken:
            raise UnreadableImage(f"file {index}", "it is bad")
        image = torch.full((1, 2, 2), index, dtype=torch.uint8)
        image[0, 0, 0] = 200  # what a mirror image has on the right
        return image

    def identity(self):
        yield bytes(self.n)


class Encoder:
    """An autoencoder whose ids are the pixels, and how many images it has encoded."""

    def __init__(self, weights="weights"):
        self.weights_hash, self.encoded = weights, 0

    def encode(self, images):
        self.encoded += len(images)
        return None, (images.flatten(1) * 255).round().long()


def ids_of(images, encoder, flip=False, processes=Processes(), log=None):
    H = SimpleNamespace(num_workers=0)
    return load_latents(images, encoder, H, flip, processes, log or Log())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of latents of this test, four images to a part."""
    monkeypatch.setattr(latents, "PART", 4)
    monkeypatch.setattr(latents, "LATENTS", tmp_path / "latents")
    return tmp_path / "latents"


def test_ids_replace_their_parts_and_are_encoded_once(folder):
    encoder, images = Encoder(), Images(10)
    folder.mkdir()
    (folder / "other.pt").write_bytes(b"")  # of another dataset: it stays
    ids = ids_of(images, encoder)
    (folder / "other.pt").unlink()
    assert ids.shape == (10, 1, 4) and ids.dtype == torch.int32
    assert ids[:, 0, 1].tolist() == [*range(10)] and encoder.encoded == 10
    [path] = folder.iterdir()
    assert path.name.startswith("images_") and path.suffix == ".pt"
    again = Encoder()
    assert torch.equal(ids_of(images, again), ids) and again.encoded == 0
    log = Log()
    path.write_bytes(path.read_bytes()[:-20])
    assert torch.equal(ids_of(images, again, log=log), ids) and again.encoded == 10
    assert "is not used" in log.warnings[0]


def test_other_weights_images_and_orientations_have_ids_of_their_own(folder):
    first = ids_of(Images(10), Encoder())
    others = [
        ids_of(Images(10), encoder := Encoder("other weights")),
        ids_of(Images(9), Encoder()),
        flipped := ids_of(Images(10), Encoder(), flip=True),
    ]
    assert encoder.encoded == 10 and [len(ids) for ids in others] == [10, 9, 10]
    assert flipped.shape == (10, 2, 4) and torch.equal(flipped[:, :1], first)
    assert torch.equal(flipped[:, 1], first[:, 0, [1, 0, 3, 2]])
    assert len(list(folder.iterdir())) == 4


def test_interrupted_encoding_goes_on_after_the_last_part(folder, monkeypatch):
    class Interrupted(Encoder):
        def encode(self, images):
            if self.encoded == 8:
                raise KeyboardInterrupt
            return super().encode(images)

    with pytest.raises(KeyboardInterrupt):
        ids_of(Images(10), Interrupted())
    assert len(list(folder.iterdir())) == 2
    encoder, log = Encoder(), Log()
    assert ids_of(Images(10), encoder, log=log)[:, 0, 1].tolist() == [*range(10)]
    assert encoder.encoded == 2 and len(list(folder.iterdir())) == 1
    assert "images to encode: 8 of 10 are there already" in log.infos


def test_the_first_rank_encodes_nothing_where_all_is_cached(folder):
    ids, encoder = ids_of(Images(10), Encoder()), Encoder()
    again = ids_of(Images(10), encoder, processes=OneOfMany(0, 2))
    assert torch.equal(again, ids) and encoder.encoded == 0


def test_unreadable_images_are_named_each_time_and_left_out(folder):
    for _ in range(2):
        log = Log()
        ids = ids_of(Images(10, broken=[0, 5, 8, 9]), Encoder(), log=log)
        assert ids[:, 0, 1].tolist() == [1, 2, 3, 4, 6, 7]
        named = [line for line in log.warnings if line.startswith("passed over")]
        assert named == [f"passed over file {index}: it is bad" for index in (0, 5, 8, 9)]
        assert "4 of 10 images to encode could not be read; they are tried" in log.warnings[-1]


def test_encoding_no_readable_image_is_an_error_that_names_the_first(folder):
    with pytest.raises(UserError, match=r"none of the 10 images .* \(the first is file 0: it is b"):
        ids_of(Images(10, broken=range(10)), Encoder())
    assert not list(folder.glob("*.pt"))


def several_at_once(folder, together=2):
    """Numbers whose missing parts are made together, and which spans were made at once."""
    numbers, calls = Numbers(folder), []

    def make_several(spans):
        calls.append(spans)
        return [{"numbers": torch.arange(first, first + n)} for first, n in spans]

    numbers.parts = Parts(
        10, 4, numbers.make, lambda first, n: folder / f"{first}_{n}.pt", "key", numbers.log,
        "numbers", make_several=make_several, together=together,
    )
    return numbers, calls


def test_missing_parts_are_made_several_at_once(tmp_path):
    numbers, calls = several_at_once(tmp_path)
    for part in numbers.parts:
        break
    assert calls == [[(0, 4), (4, 4)]] and not numbers.made
    assert {path.name for path in tmp_path.iterdir()} == {"0_4.pt", "4_4.pt"}
    assert numbers.all() == [*range(10)] and len(calls) == 1 and numbers.made == [8]
    (tmp_path / "0_4.pt").unlink()
    path = tmp_path / "4_4.pt"
    path.write_bytes(path.read_bytes()[:-20])  # damaged: it is made when its turn comes
    (tmp_path / "8_2.pt").unlink()
    numbers, calls = several_at_once(tmp_path, together=3)
    assert numbers.all() == [*range(10)] and calls == [[(0, 4), (8, 2)]] and numbers.made == [4]


def test_a_rank_makes_its_own_parts_at_once(tmp_path):
    numbers, calls = several_at_once(tmp_path, together=4)
    numbers.parts.divide(OneOfMany(0, 2))
    assert calls == [[(0, 4), (8, 2)]] and not numbers.made
    assert numbers.parts.after(0, 4, 2) == [(8, 2)] and numbers.parts.after(4, 4) == [(8, 2)]


@pytest.mark.parametrize("orientations", [1, 2])
def test_batches_of_ids_follow_the_stream(orientations):
    ids = torch.arange(9 * orientations * 4, dtype=torch.int32).view(9, orientations, 4)
    H = SimpleNamespace(batch_size=3, seed=5)
    for rank in (0, 1):
        batches = latents.latent_batches(ids, H, 2, Processes(rank, 2))
        for number in range(2, 12):
            indices, flips = stream_positions(9, 6, 5, number)
            mine = slice(3 * rank, 3 * rank + 3)
            expected = [ids[index, int(flip) if orientations > 1 else 0]
                        for index, flip in zip(indices[mine], flips[mine])]
            batch = next(batches)
            assert batch.dtype == torch.int64 and torch.equal(batch, torch.stack(expected).long())
