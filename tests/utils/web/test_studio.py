"""What the page computes: what the experiments give, step by step, and sentences for what is wrong.
"""

import io
import json
import shlex
import threading
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from experiments import generate_big_samples, get_samples, inpaint
from utils.data.images import Digits
from utils.data.pixels import UnreadableImage, to_uint8
from utils.errors import UserError
from utils.evaluation.inpainting import central_square
from utils.logging.images import image_grid, to_pil
from utils.runs.folder import RunFolder
from utils.web.records import as_json, as_png, as_zip
from utils.web.stepwise import Finished, Step, Work, Worker, counted_calls, stepwise
from utils.web.studio import Choice, means_of_codes, names_only, number
from utils.web.uploads import painted, read_upload, square_of, to_paint_on

CHOSEN = Choice(count=5, method="halton", steps=6, temp=0.9, seed=7)
SCRIPTS = {"get_samples": get_samples, "inpaint": inpaint,
           "generate_big_samples": generate_big_samples}


def run_command(command):
    """Run the command of a record; the folder that it wrote to."""
    python, script, *flags = shlex.split(command)
    SCRIPTS[script.removeprefix("experiments/").removesuffix(".py")].main([*flags, "--no_visdom"])
    return RunFolder(flags[flags.index("--log_dir") + 1])


def pixels_of(path):
    return np.asarray(Image.open(path))


def mask_of(size, box):
    """A mask bool [h, w] of an image of `size` (width, height): a box left, top, right, bottom."""
    mask = np.zeros(size[::-1], dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


# --- samples


@pytest.mark.parametrize("name, flags, method", [
    ("demo_absorbing", "", "halton"), ("demo_absorbing", "--amp", "diffusion"),
    ("demo_absorbing", "--remask 0.9 --sample_type remdm", "remdm"), ("free", "", "mlm"),
    ("free", "--remask 0.9 --sample_type remdm", "confidence"), ("causal", "--top_k 3", "halton"),
])
def test_samples_are_those_of_the_command_in_their_record(studio_of, name, flags, method):
    studio = studio_of(name, flags)
    *_, drawn = studio.sample(CHOSEN._replace(method=method))
    record = json.loads(as_json(drawn.record))
    folder = run_command(record["command"])
    assert torch.equal(torch.load(folder.path / "ids_2.pt"), drawn.ids.int())
    grid = np.asarray(to_pil(image_grid(drawn.images)))
    assert np.array_equal(pixels_of(folder.images / "samples_2.png"), grid)


@pytest.mark.parametrize("name", ["demo_absorbing", "causal"])
def test_ids_appear_step_by_step(studio_of, name, monkeypatch):
    monkeypatch.setattr("utils.web.stepwise.EVERY", 0)
    monkeypatch.setattr("utils.web.stepwise.PAUSE", 0)
    studio = studio_of(name)
    *steps, drawn = studio.sample(CHOSEN._replace(steps=64, method="raster"))
    assert len(steps) > 1 and all(isinstance(step, Step) for step in steps)
    assert steps[-1].done == steps[-1].total == 64 and torch.equal(steps[-1].ids, drawn.ids)
    for step in steps:
        blank = step.ids == studio.blank
        assert int(blank.sum()) == 5 * (64 - step.done)
        assert torch.equal(step.ids[~blank], drawn.ids[~blank])
        images = studio.partial(step.ids)
        assert images.shape == drawn.images.shape and images.dtype == torch.uint8
    assert torch.equal(studio.partial(drawn.ids), drawn.images)
    assert drawn.calls == 64 and drawn.record["network_calls"] == 64


def test_a_record_says_how_a_picture_came_about(studio):
    *_, drawn = studio.sample(CHOSEN)
    record = json.loads(as_json(drawn.record))
    assert record["run"] == "demo_absorbing" and record["step"] == 2
    assert len(record["checkpoints"]["sampler"]["sha256"]) == 64
    assert "trained_on" not in record["checkpoints"]["sampler"]  # it names files
    assert record["samples"]["seed"] == 7 and record["samples"]["sample_type"] == "halton"
    assert record["versions"]["torch"] and record["seconds"] > 0
    assert record["ids"] == drawn.ids.tolist()


def test_two_settings_are_compared_on_one_seed(studio):
    other = CHOSEN._replace(temp=0.3)
    seen = list(studio.compare(CHOSEN, other))
    sides = [side for side, _ in seen]
    assert sides == sorted(sides) and set(sides) == {0, 1}
    drawn = [item for _, item in seen if not isinstance(item, Step)]
    for settings, item in zip((CHOSEN, other), drawn):
        *_, alone = studio.sample(settings)
        assert torch.equal(item.ids, alone.ids)


# --- filling in


def test_completions_are_those_of_the_command_in_their_record(studio, workplace):
    photograph = studio.photograph(None, 5)
    assert photograph.size == (16, 16)  # as the model sees it
    mask = np.kron(mask_of((16, 16), (3, 8, 14, 13)), np.ones((32, 32), dtype=bool))
    Image.fromarray(mask.astype(np.uint8) * 255).save(workplace / "mask.png")
    *steps, drawn = studio.fill_in(CHOSEN, photograph, mask, {"image_index": 5})
    assert all(step.ids.shape == (5, 64) for step in steps)
    folder = run_command(drawn.record["command"] + " --save_individually")
    theirs = [pixels_of(path) for path in sorted((folder.images / "inpaint_2").iterdir())]
    assert len(theirs) == 5
    assert all(np.array_equal(mine, other) for mine, other in zip(drawn.images, theirs))


@pytest.mark.parametrize("mode, size", [
    ("RGB", (50, 40)), ("L", (16, 16)), ("RGBA", (9, 30)), ("P", (20, 20)), ("CMYK", (24, 24)),
])
def test_what_is_kept_is_untouched_and_the_size_kept(studio, workplace, mode, size):
    values = np.random.RandomState(0).randint(0, 255, (*size[::-1], 3)).astype(np.uint8)
    path = workplace / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.fromarray(values).convert(mode).save(path)
    photograph = read_upload(path)
    shown = to_paint_on(photograph)
    assert shown.mode == "RGB" and max(shown.size) <= 512
    left, top, side = central_square(*shown.size)
    box = (left + side // 4, top + side // 4, left + side // 2, top + side // 2)
    mask = mask_of(shown.size, box)
    *_, drawn = studio.fill_in(CHOSEN, photograph, mask, {"image": "image.png"})
    before = np.asarray(photograph.convert("RGB") if mode in ("P", "CMYK") else photograph)
    hidden = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    grown = np.array([[hidden[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].any()
                       for x in range(size[0])] for y in range(size[1])])
    changed = []
    for completion in drawn.images:
        after = np.asarray(completion)
        assert completion.size == size and after.shape == before.shape
        assert np.array_equal(after[~grown], before[~grown])
        changed.append((after != before).any())
    assert all(changed)


def test_completions_keep_the_profile_of_colours(studio, workplace):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (20, 20), "red").save(workplace / "image.png", icc_profile=profile)
    photograph = read_upload(workplace / "image.png")
    *_, drawn = studio.fill_in(CHOSEN, photograph, mask_of((20, 20), (4, 4, 9, 9)), {})
    for completion in drawn.images:
        saved = Image.open(io.BytesIO(as_png(completion)))
        assert saved.info["icc_profile"] == profile


def test_large_completions_are_limited(studio):
    large, mask = Image.new("RGB", (4000, 2500)), mask_of((40, 25), (15, 5, 20, 10))
    with pytest.raises(UserError, match="4 completions of 4000x2500 .* 32 megapixels .* 3 at most"):
        next(studio.fill_in(CHOSEN._replace(count=4), large, mask, {}))


# --- canvases


@pytest.mark.parametrize("name, mode", [("demo_absorbing", "windows"), ("free", "native")])
def test_canvases_are_those_of_the_command_in_their_record(studio_of, name, mode):
    studio = studio_of(name)
    *steps, drawn = studio.canvas(CHOSEN._replace(count=2), 9, 12, mode)
    assert drawn.images.shape == (2, 1, 18, 24) and steps[-1].ids.shape == (2, 108)
    assert drawn.record["ids"] == drawn.ids.tolist()
    folder = run_command(drawn.record["command"])
    grid = np.asarray(to_pil(image_grid(drawn.images)))
    assert np.array_equal(pixels_of(folder.images / "big_2.png"), grid)


def test_a_canvas_that_is_done_early_has_all_its_ids(studio):
    choice = CHOSEN._replace(count=1, method="confidence", steps=64)
    *steps, drawn = studio.canvas(choice, 9, 12, "windows")
    assert drawn.ids.shape == (1, 108) and int(drawn.ids.max()) < studio.blank


def test_progress_goes_on_over_batches(studio_of, monkeypatch):
    monkeypatch.setattr("utils.web.stepwise.EVERY", 0)
    monkeypatch.setattr("utils.web.stepwise.PAUSE", 0)
    studio = studio_of("demo_absorbing", "--batch_size 2")
    mask = mask_of((16, 16), (0, 0, 8, 8))
    works = {studio.fill_in(CHOSEN, studio.photograph(None, 5), mask, {}): 64,
             studio.canvas(CHOSEN._replace(count=4), 8, 9, "windows"): 72}
    for work, tokens in works.items():
        *steps, drawn = work
        assert len(drawn.images) == (5 if tokens == 64 else 4)
        made = [step.done for step in steps]
        assert made == sorted(set(made)) and made[-1] == steps[-1].total
        assert len({step.total for step in steps}) == 1
        assert all(step.ids.shape == (len(drawn.images), tokens) for step in steps)
        assert (steps[0].ids[-1] == studio.blank).any()
        assert (steps[-1].ids != studio.blank).all()


# --- the inside of an image


def test_the_inside_of_an_image(studio):
    photograph = studio.photograph(None, 8)
    *_, (view, record) = studio.look(photograph, {"image_index": 8})
    image = Digits("digits", 16, 1).pixels(8)
    assert torch.equal(view.image, image)
    with torch.no_grad():
        expected, *_, ids = studio.run.autoencoder(image[None].float() / 255)
    assert torch.equal(view.ids, ids[0]) and torch.equal(view.reconstruction, to_uint8(expected[0]))
    assert record["image_index"] == 8 and len(record["ids"]) == 8 and "samples" not in record
    learned = {int(index) for index in studio.learned.indices}
    assert set(view.numbers) <= learned
    assert view.distances == sorted(view.distances)
    everything = torch.stack([Digits("digits", 16, 1).load(index) for index in view.numbers])
    distances = (everything - image / 255).flatten(1).norm(dim=1)
    torch.testing.assert_close(torch.tensor(view.distances).float(), distances, atol=1e-4, rtol=0)
    assert (view.numbers[0] == 8) == (8 in learned)


def test_the_inside_of_a_sample(studio):
    *_, (view, record) = studio.look_at_sample(CHOSEN._replace(count=1))
    *_, drawn = studio.sample(CHOSEN._replace(count=1))
    assert torch.equal(view.image, drawn.images[0])
    assert record["command of the sample"] == drawn.record["command"]
    assert record["samples"] == drawn.record["samples"] and record["samples"]["seed"] == 7


def test_the_mean_of_the_pixels_of_a_code():
    ids = torch.tensor([[0, 1], [1, 1]])
    image = torch.tensor([[[1, 2, 10, 20], [3, 4, 30, 40],
                           [10, 20, 40, 50], [30, 40, 60, 70]]], dtype=torch.uint8)
    means = means_of_codes(image, ids)
    assert means[0].tolist() == [[[1, 2], [3, 4]]] and means[1].tolist() == [[[20, 30], [40, 50]]]


# --- one piece of work at a time, which ends with its viewer


def test_work_ends_when_nobody_follows_it(studio):
    steps = studio.sample(CHOSEN._replace(count=64, method="remdm", steps=1024))
    with counted_calls(studio.network) as calls:
        next(steps)
        steps.close()
        *_, drawn = studio.sample(CHOSEN._replace(steps=6))
    assert len(drawn.images) == 5 and 6 < len(calls) < 900


def test_work_that_nobody_waits_for_any_more_does_not_begin():
    worker, hold, began = Worker(), threading.Event(), []
    worker.do(hold.wait)
    work = Work(lambda progress: began.append(1), torch.nn.Identity())
    worker.do(work.run)
    work.given_up.set()
    hold.set()
    assert list(stepwise(lambda progress: 3, torch.nn.Identity(), worker))[-1].result == 3
    assert began == []


def test_two_visitors_are_served_in_turn():
    network, worker, running, most = torch.nn.Identity(), Worker(), [], []

    def work(progress):
        running.append(None)
        for step in range(5):
            most.append(len(running))
            network(torch.zeros(1))
            time.sleep(0.01)
            progress(step + 1, 5)
        running.pop()
        return "result"

    found = []
    threads = [threading.Thread(target=lambda: found.append(list(stepwise(work, network, worker))),
                                daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert max(most) == 1
    assert [(items[-1].result, items[-1].calls) for items in found] == [("result", 5)] * 4
    assert all(isinstance(items[-1], Finished) for items in found)


def test_errors_of_the_work_reach_its_viewer():
    def work(progress):
        raise UserError("a sentence")

    worker = Worker()
    with pytest.raises(UserError, match="a sentence"):
        list(stepwise(work, torch.nn.Identity(), worker))
    assert list(stepwise(lambda progress: 3, torch.nn.Identity(), worker))[-1].result == 3


# --- what is wrong gets a sentence


@pytest.mark.parametrize("value", [0, 65, -1, 2.5, 1e400, float("nan"), None, "many", [3], {}])
def test_numbers_are_checked(studio, value):
    with pytest.raises(UserError, match="the number of images must be a whole number from 1 to 64"):
        next(studio.sample(CHOSEN._replace(count=value)))


@pytest.mark.parametrize("changes, says", [
    (dict(steps=10**9), "the number of steps must be"),
    (dict(temp=0), "the temperature must be"),
    (dict(temp="hot"), "the temperature must be"),
    (dict(seed=-1), "the seed must be"),
    (dict(method="magic"), "sample_type must be one of"),
    (dict(method=None), "sample_type must be"),
])
def test_settings_are_checked(studio, changes, says):
    with pytest.raises(UserError, match=says):
        next(studio.sample(CHOSEN._replace(**changes)))


def test_canvases_are_limited(studio):
    for sides, says in (((7, 8), "height in ids"), ((8, 33), "width in ids")):
        with pytest.raises(UserError, match=says):
            next(studio.canvas(CHOSEN._replace(count=1), *sides, "windows"))
    for mode in ("native", "upside down"):
        with pytest.raises(UserError, match="absolute positions"):
            next(studio.canvas(CHOSEN._replace(count=1), 9, 9, mode))
    with pytest.raises(UserError, match="the number of images must be a whole number from 1 to 4"):
        next(studio.canvas(CHOSEN, 9, 9, "windows"))


def test_a_sampler_in_one_order_neither_fills_in_nor_draws_canvases(studio_of):
    studio = studio_of("causal")
    with pytest.raises(UserError, match="needs an absorbing sampler"):
        next(studio.canvas(CHOSEN, 9, 9, "windows"))
    with pytest.raises(UserError, match="needs an absorbing sampler"):
        next(studio.fill_in(CHOSEN, Image.new("L", (16, 16)), np.ones((16, 16), bool), {}))


def test_wrong_uploads(workplace):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3)).astype(np.uint8))
    files = {"text.txt": b"no image", "empty.png": b"", "large.png": b"0" * 10_000_001,
             "cut.png": as_png(image)[:2000]}
    for name, content in files.items():
        (workplace / name).write_bytes(content)
    Image.new("1", (5000, 4000)).save(workplace / "wide.png")
    for name, says in (("text.txt", "no image of a known format"), ("empty.png", "empty"),
                       ("large.png", "larger than 10 MB"), ("cut.png", "cannot read the image"),
                       ("wide.png", "16 megapixels"), ("none.png", "gone")):
        with pytest.raises(UserError, match=says) as error:
            read_upload(workplace / name)
        assert str(workplace) not in str(error.value)  # not where the server keeps its files


def test_masks_are_checked():
    blank, dot = Image.new("RGBA", (40, 20)), Image.new("RGBA", (40, 20))
    dot.putpixel((1, 1), (255, 0, 0, 255))
    for layers in ([], [blank]):
        with pytest.raises(UserError, match="paint over"):
            painted(layers, (40, 20))
    with pytest.raises(UserError, match="another image"):
        painted([dot], (20, 40))
    mask = painted([blank, dot], (40, 20))
    assert mask.sum() == 1 and mask[1, 1]
    with pytest.raises(UserError, match="outside the central square"):
        square_of(mask)
    assert square_of(mask[:, :20]).shape == (20, 20)


def test_images_of_a_dataset_that_is_not_there(studio, monkeypatch):
    with pytest.raises(UserError, match="the number of the image must be a whole number from 0"):
        studio.photograph(None, 1797)
    error = UnreadableImage("/home/me/private/a.png", "it is cut")
    monkeypatch.setattr(studio.dataset, "open", Mock(side_effect=error))
    with pytest.raises(UserError, match="^cannot read the image a.png: it is cut$"):
        studio.photograph(None, 0)
    studio.dataset, studio.no_dataset = None, "it is gone"
    with pytest.raises(UserError, match="there is no dataset to take an image of .it is gone."):
        studio.photograph(None, 0)


def test_folders_of_the_server_are_not_told():
    assert names_only("there is no folder /home/me/faces: see https://example.org/a/b or and/or") \
        == "there is no folder faces: see https://example.org/a/b or and/or"
    assert names_only("cannot read (/a/b c/d.png)") == "cannot read (b c/d.png)"


def test_numbers_keep_their_kind():
    assert number("n", 3.0, 1, 5) == 3 and isinstance(number("n", 3.0, 1, 5), int)
    assert number("t", 0.5, 0, 1, whole=False) == 0.5


def test_archives_hold_their_files():
    import zipfile

    archive = zipfile.ZipFile(io.BytesIO(as_zip({"a.txt": b"1", "b.txt": b"2"})))
    assert {name: archive.read(name) for name in archive.namelist()} == {
        "a.txt": b"1", "b.txt": b"2"}
