"""What keeps a device from waiting for images: batches read early, and kept in memory."""

import contextlib
import gc
import itertools
import multiprocessing
from types import SimpleNamespace

import pytest
import torch

from utils.data import batches as loading
from utils.data import device
from utils.data.batches import RepeatedBatches, TrainingBatches, UnreadableFiles, evaluation_batches
from utils.data.images import ImageDataset
from utils.data.part_reader import PartReader
from utils.data.pixels import UnreadableImage
from utils.errors import UserError
from utils.training.processes import Processes

CPU = torch.device("cpu")


class Fake(ImageDataset):
    """Images whose grey is their index."""

    embedded = True

    def __init__(self, n, broken=()):
        super().__init__("fake", 4, 1)
        self.n, self.broken = n, broken

    def __len__(self):
        return self.n

    def pixels(self, index):
        if index in self.broken:
            raise UnreadableImage(f"file {index}", "broken")
        image = torch.full((1, 4, 4), index, dtype=torch.uint8)
        image[0, 0, 0] = 200  # which a mirrored image has elsewhere
        return image


def fail_on_unreadable(path, reason):
    raise AssertionError(f"{path}: {reason}")


def loading_of(workers=0, batch_size=4, flip=False):
    return SimpleNamespace(batch_size=batch_size, seed=0, horizontal_flip=flip, num_workers=workers)


def worker_processes():
    gc.collect()
    return set(multiprocessing.active_children())


@pytest.mark.parametrize("workers", [0, 2])
def test_measuring_the_loader_changes_no_batch(workers):
    H = loading_of(workers, flip=True)
    batches = TrainingBatches(Fake(7), H, 3, Processes(), fail_on_unreadable)
    assert batches.images_per_second() > 0
    found = [next(batches) for _ in range(20)]
    batches.close()
    undisturbed = TrainingBatches(
        Fake(7), loading_of(0, flip=True), 3, Processes(), fail_on_unreadable
    )
    expected = list(itertools.islice(undisturbed, 20))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Slow(Fake):
    """Images that take 10 ms each to be read, by a clock of their own."""

    reads = 0

    def pixels(self, index):
        self.reads += 1
        return super().pixels(index)

    def perf_counter(self):
        return self.reads * 0.01


def test_the_loader_is_measured_and_waiting_for_it_is_counted(monkeypatch):
    dataset, H = Slow(7), loading_of(0, batch_size=2)
    monkeypatch.setattr(loading, "time", dataset)
    batches = TrainingBatches(dataset, H, 0, Processes(), fail_on_unreadable)
    assert batches.images_per_second(seconds=0.03) == pytest.approx(100) and dataset.reads <= 8
    assert batches.seconds_waited == 0
    for _ in range(dataset.reads // 2):  # those that were read
        next(batches)
    assert batches.seconds_waited == 0
    for _ in range(3):
        next(batches)
    assert batches.seconds_waited == pytest.approx(0.06)


@pytest.mark.parametrize("workers", [0, 2])
def test_repeated_batches_are_read_once(workers):
    dataset = Fake(10, broken=[4])
    report = UnreadableFiles()
    repeated = RepeatedBatches(dataset, 4, workers, CPU, report)
    expected = list(evaluation_batches(dataset, 4, 0, CPU, UnreadableFiles()))
    for batch in repeated:
        break  # a first round that is not finished is not kept
    before = worker_processes()
    for _ in range(2):
        assert_same(list(repeated), expected)
    dataset.pixels = None
    iterator = iter(repeated)
    next(iterator)
    assert worker_processes() == before and len(report) == 1
    assert_same(list(repeated), expected)


def assert_same(batches, others):
    for (images, indices), (expected, places) in zip(batches, others, strict=True):
        assert torch.equal(images, expected) and torch.equal(indices, places)


def test_repeated_batches_of_too_many_images_are_read_each_time():
    dataset = Slow(5)
    repeated = RepeatedBatches(dataset, 2, 0, CPU, fail_on_unreadable, limit=5 * 16 - 1)
    assert len(list(repeated)) == len(list(repeated)) == 3 and dataset.reads == 10
    whole = RepeatedBatches(dataset, 2, 0, CPU, fail_on_unreadable, limit=5 * 16)
    assert len(list(whole)) == len(list(whole)) == 3 and dataset.reads == 15


def test_repeated_batches_without_a_readable_image_are_a_user_error():
    repeated = RepeatedBatches(Fake(3, broken=range(3)), 2, 0, CPU, UnreadableFiles())
    for _ in range(2):
        with pytest.raises(UserError, match="none of the 3"):
            list(repeated)


def part_of(reader, first, n, report=fail_on_unreadable):
    """What a PartReader gives of a part: the images' levels, batch by batch."""
    return [pixels[:, 0, 1, 1].tolist() for pixels in reader.read(first, n, CPU, report)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_part_reader_goes_on_from_part_to_part(workers):
    reader = PartReader(Fake(10), 4, 3, workers)
    assert part_of(reader, 0, 4) == [[0, 1, 2], [3]]
    before = worker_processes()
    assert part_of(reader, 4, 4) == [[4, 5, 6], [7]]
    assert worker_processes() == before and len(before) >= workers
    assert part_of(reader, 8, 2) == [[8, 9]]
    assert reader.batches is None and not worker_processes() & before
    assert part_of(reader, 0, 4) == [[0, 1, 2], [3]]  # once more from the start


def test_a_part_reader_follows_a_rank_and_any_other_order():
    reader, started = PartReader(Fake(30), 4, 4, 0), []
    for first in (4, 12, 20, 28):  # rank 1 of 2
        n = min(4, 30 - first)
        assert part_of(reader, first, n) == [[*range(first, first + n)]]
        started.append(reader.batches)
    assert started[1] is started[2] and started[3] is None
    for first in (24, 0, 16, 4, 4):
        assert part_of(reader, first, 4) == [[*range(first, first + 4)]]
    abandoned = reader.read(8, 4, CPU, fail_on_unreadable)
    next(abandoned)
    assert part_of(reader, 12, 4) == [[12, 13, 14, 15]]


def test_a_part_reader_tells_of_unreadable_images():
    reader, report = PartReader(Fake(12, broken=[1, 4, 5, 6, 7]), 4, 4, 0), UnreadableFiles()
    assert part_of(reader, 0, 4, report) == [[0, 2, 3]] and len(report) == 1
    assert part_of(reader, 4, 4, report) == [] and len(report) == 5
    assert part_of(reader, 8, 4, report) == [[8, 9, 10, 11]]


def test_batches_that_are_copied_ahead_all_arrive_in_order(monkeypatch):
    """Without a card: its streams and events do nothing here."""
    events = []

    class Stream:
        def record_event(self):
            events.append("copied")
            return len(events)

        def wait_event(self, event):
            assert event <= len(events)

    monkeypatch.setattr(device, "to_device", lambda array, where: torch.from_numpy(array))
    monkeypatch.setattr(torch.cuda, "Stream", lambda where: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: Stream())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    batches = (torch.full((2,), n) for n in range(3))
    copies = device.copied_ahead(batches, torch.device("cuda"))
    assert next(copies)[0] == 0 and len(events) == 2  # the next one is on its way
    assert [int(batch[0]) for batch in copies] == [1, 2]
