"""What the buttons of the page give to save: every picture, and how it came about."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="there is no gradio: `make test-page` installs it and "
                         "runs this")

DRAW = (4, "halton", 8, 0.8, 3)
SETTINGS = ("halton", 4, 0.8)
TABS = ("sample", "fill_in", "canvas", "compare", "look_inside")


@pytest.fixture
def press(studio, tmp_path, monkeypatch):
    """A function that does what the button of a tab does: (the names of the pictures that are shown
    at the end, {name: bytes} of the files to save)."""
    from utils.web.page import build_page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    page = build_page(studio)
    handlers = [function.fn for function in page.fns.values() if function.name == "handler"]

    def give(tab, *values):
        *_, last = dict(zip(TABS, handlers, strict=True))[tab](*values)
        shown = {part.label for part in last if isinstance(part, gr.Image)}
        paths = [Path(update["value"]) for part, update in last.items()
                 if isinstance(part, gr.DownloadButton)]
        return shown, {path.name: path.read_bytes() for path in paths}

    return give


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("tab, values, name", [
    ("sample", DRAW, "samples_seed3"), ("canvas", (12, 16, "windows", *DRAW), "canvas_seed3"),
])
def test_images_and_their_ids_are_saved(press, tab, values, name):
    shown, files = press(tab, *values)
    assert len(shown) == 2 and list(files) == [f"{name}.png", f"{name}_ids.png", f"{name}.json"]
    assert len(json.loads(files[f"{name}.json"])["ids"]) == 4
    images, ids = (pixels(files[f"{name}{end}.png"]) for end in ("", "_ids"))
    assert images.shape != ids.shape and images.std() > 0 and ids.std() > 0


def test_a_comparison_is_saved_with_both_records(press):
    _, files = press("compare", 2, 3, *SETTINGS, "raster", 4, 0.5)
    assert list(files) == ["comparison.png", "comparison.json"]
    record = json.loads(files["comparison.json"])
    assert [record[side]["samples"]["temp"] for side in ("A", "B")] == [0.8, 0.5]


def test_all_pictures_of_the_inside_of_an_image_are_saved(press):
    shown, files = press("look_inside", "an image of the dataset or a file", 0, 3, None)
    assert len(shown) == 5 and list(files) == ["inside.zip", "inside.json"]
    archive = zipfile.ZipFile(io.BytesIO(files["inside.zip"]))
    assert archive.read("record.json") == files["inside.json"]
    found = [pixels(archive.read(name)) for name in archive.namelist() if name.endswith(".png")]
    assert len(found) == 5 and len({picture.tobytes() for picture in found}) == 5
