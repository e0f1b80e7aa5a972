"""What visitors send past the page's own buttons: paintings that are none, and addresses."""

import asyncio
import struct
import zlib
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from utils.errors import UserError
from utils.web.records import as_png
from utils.web.uploads import read_layers, read_upload

gr = pytest.importorskip("gradio", reason="there is no gradio: `make test-page` installs it and "
                         "runs this")
META = {"_type": "gradio.FileData"}


def bomb(side):
    """A PNG of side x side grey pixels that has a header and no more."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.fixture
def editor():
    from utils.web.guards import MaskEditor

    return MaskEditor()


@pytest.fixture
def loaded(monkeypatch):
    """The sizes of the images that were decoded."""
    from PIL import ImageFile

    sizes, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: (
        sizes.append(image.size), load(image))[1])
    return sizes


def blob(index, name, content, kind="layer"):
    """What a browser sends before an event."""
    return SimpleNamespace(data={"type": kind, "index": index, "id": name},
                           files=[("blob", content)])


def test_what_is_painted_is_looked_at_before_it_is_decoded(editor, loaded, tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb(5000))
    given = {"path": str(tmp_path / "bomb.png"), "meta": META}
    payload = editor.data_model(background=given, layers=[given], composite=given)
    layers = editor.preprocess(payload)
    with pytest.raises(UserError, match="5000x5000 pixels, and 0.524 megapixels are allowed"):
        read_layers(layers)
    with pytest.raises(UserError, match="5000x5000 pixels, and 16 megapixels are allowed"):
        read_upload(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="5 layers, and 4 are allowed"):
        read_layers(layers * 5)
    (tmp_path / "bomb.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UserError, match="no image of a known format"):
        read_layers(layers)
    assert loaded == []


def test_paintings_that_are_sent_in_advance_are_limited(editor):
    layer = as_png(Image.new("RGBA", (8, 8)))
    for index in ("4", "1000000000", "-1", "null", "", "x", "9" * 5000):
        with pytest.raises(Exception, match="4 layers at most"):
            editor.accept_blobs(blob(index, "a", layer))
    with pytest.raises(Exception, match="larger"):
        editor.accept_blobs(blob("0", "a", b"0" * 3_000_000))
    assert not editor.blob_storage
    for number in range(100):
        editor.accept_blobs(blob("1", f"visitor {number}", layer))
        editor.accept_blobs(blob("null", f"visitor {number}", layer, "composite"))
    assert list(editor.blob_storage) == [f"visitor {number}" for number in range(68, 100)]
    kept = editor.preprocess(editor.data_model(id="visitor 99"))
    assert [image.size for image in read_layers(kept)] == [(8, 8)]
    assert editor.preprocess(editor.data_model(id="visitor 99")) == []
    assert editor.preprocess(None) == []


def test_the_browser_takes_the_editor_for_gradios(editor):
    assert editor.get_block_name() == "imageeditor"
    assert editor.get_config()["server_fns"] == ["accept_blobs"]


def test_no_address_is_fetched(studio, monkeypatch):
    from utils.web.page import build_page

    asked = []

    async def get(address, **options):
        asked.append(address)
        raise OSError("no connection")

    utils = gr.processing_utils
    for name in ("async_ssrf_protected_get", "async_ssrf_protected_download"):
        monkeypatch.setattr(utils, name, getattr(utils, name))  # put back after the test
    monkeypatch.setattr(utils.sh, "get", get)
    page = build_page(studio)
    blocks = [block for block in page.blocks.values() if isinstance(block, gr.components.Component)]
    assert any(isinstance(block, gr.File) for block in blocks)
    for block in blocks:
        for address in ("http://example.org/a.png", "https://example.org/a.png"):
            value = {"layers": [{"path": address, "meta": META}]}
            with pytest.raises(gr.Error, match="not fetched"):
                asyncio.run(utils.async_move_files_to_cache(
                    value, block, check_in_upload_folder=True))
    assert asked == []


def test_a_visitors_state_does_not_grow(studio):
    """However often images follow updates that have none."""
    from utils.web.page import build_page

    page = build_page(studio)
    [draw, *_] = [function for function in page.fns.values() if function.name == "handler"]
    status, image = (next(block for block in draw.outputs if isinstance(block, kind))
                     for kind in (gr.HTML, gr.Image))
    state, sizes = gr.state_holder.SessionState(page), []
    for shade in range(4):
        picture = Image.new("L", (4, 4), shade)
        for shown in ({status: "waiting"}, {status: "done", image: picture}):
            asyncio.run(page.postprocess_data(draw, shown, state))
        sizes.append(len(state.blocks_config.blocks))
    assert len(set(sizes)) == 1
    assert set(state.blocks_config.blocks) == set(page.blocks)


def test_images_are_shown_in_turn(studio):
    from utils.web.page import build_page

    events = [function for function in build_page(studio).fns.values() if function.name == "show"]
    assert len(events) == 3
    assert all(event.concurrency_id == "model" for event in events)


@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "not enough memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
    (ZeroDivisionError("of /srv/secret"), "This failed, and not by your fault: the log.txt"),
])
def test_an_error_of_the_program_is_told_and_written_down(studio, monkeypatch, error, says):
    from utils.web.page import build_page

    def fail(*arguments):
        raise error

    page = build_page(studio)
    monkeypatch.setattr(studio, "draw", fail)
    monkeypatch.setattr(studio, "photograph", fail)
    handlers = {function.name: function.fn for function in page.fns.values()}
    [draw, *_] = [f.fn for f in page.fns.values() if f.name == "handler"]
    for shown in (list(draw(4, "halton", 8, 0.8, 3)), list(handlers["show"](3, None))):
        [(status, line)] = [(part, value) for part, value in shown[-1].items() if value]
        assert "told wrong" in line and says in line and "secret" not in line
        assert isinstance(status, gr.HTML)
    assert None in shown[-1].values()  # the editor
    log = studio.run.log.folder.log.read_text()
    assert log.count(f"ERROR unexpected {type(error).__name__}\n") == 2
    assert log.count("Traceback") == 2 and str(error) in log


def test_stop_leaves_what_is_finished():
    from utils.web.parts import WAITING, done, running, stopped, wrong
    from utils.web.stepwise import Step

    for told in (WAITING, running(Step(3, 8, 0.5))):
        assert stopped(told) == done("Stopped.")
    for told in (done("4 images in 0.5 s"), wrong("a sentence"), None):
        assert stopped(told) == gr.skip()


def test_no_folder_of_the_server_is_told():
    from utils.web.parts import wrong

    assert wrong("there is no image in /srv/faces") == \
        '<div class="told wrong">There is no image in faces</div>'


def test_times_are_compared_in_words():
    from utils.web.tabs import comparison

    took = [SimpleNamespace(seconds=seconds) for seconds in (2.0, 2.05, 3.0)]
    assert comparison(took[0], took[1]).endswith("they are equally fast.")
    assert comparison(took[0], took[2]).endswith("A is 1.5 times as fast.")
