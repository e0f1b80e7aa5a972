"""The page of an experiment's results."""

import base64
import re
from html.parser import HTMLParser

import pytest
import torch

from helpers import with_small_files
from utils.errors import DiskError
from utils.evaluation.report import add_result
from utils.logging.images import save_image

MANIFEST = {"command": "python x.py --a '<b>'", "time": "2026-01-02T03:04:05Z", "seconds": 1.5,
            "device": "cpu", "versions": {"torch": "2"}}
# elements without an end
VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """What a page shows: its headings, texts and pictures; every element must be closed."""

    def __init__(self, path):
        super().__init__()
        self.open, self.headings, self.texts, self.pictures, self.addresses = [], [], [], [], []
        self.feed(path.read_text())
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag != "script"
        attributes = dict(attributes)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.pictures.append(base64.b64decode(attributes["src"].partition(",")[2]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "report.html"


@pytest.fixture
def picture(tmp_path):
    save_image(torch.rand(3, 5, 7), tmp_path / "picture.png")
    return tmp_path / "picture.png"


def add(path, key, name, figures, pictures=()):
    warnings = []
    add_result(path, key, name, figures, list(pictures), MANIFEST, warnings.append)
    return warnings


def test_the_newest_result_comes_first_and_the_older_stay(path, picture):
    add(path, "aa", "FID", {"FID": "9.5"}, [("Samples", picture)])
    first = picture.read_bytes()
    save_image(torch.rand(3, 5, 7), picture)  # another experiment writes the same file
    add(path, "bb", "samples", {}, [("Samples", picture), ("Again", picture)])
    page = Page(path)
    assert page.headings == ["samples", "FID"] and "9.5" in page.texts
    assert page.pictures == [picture.read_bytes()] * 2 + [first]
    add(path, "aa", "FID", {"FID": "8.5"})
    page = Page(path)
    assert page.headings == ["FID", "samples"]
    assert "8.5" in page.texts and "9.5" not in page.texts and len(page.pictures) == 2


def test_the_page_needs_no_other_file(path, picture):
    add(path, "aa", "FID", {"FID": "9.5"}, [("Samples", picture)])
    assert all(address.startswith("data:image/png;base64,") for address in Page(path).addresses)
    assert not re.search(r"@import|url\(", path.read_text())


def test_words_are_no_markup(path, picture):
    words = "<script>alert('1')</script> & <!-- end of the result -->"
    add(path, "aa", words, {words: words}, [(words, picture)])
    add(path, "bb", "other", {})
    page = Page(path)
    assert page.headings == ["other", words] and page.texts.count(words) == 4
    assert MANIFEST["command"] in page.texts


def test_a_full_disk_leaves_the_page_as_it_was(path):
    add(path, "aa", "FID", {"FID": "9.5"})
    before = path.read_bytes()
    with pytest.raises(DiskError, match="report.html"):
        with_small_files(1000, lambda: add(path, "bb", "FID", {"FID": "8.5"}))
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_of_somebody_else_is_moved_aside(path):
    path.write_bytes(b"\xff my notes")
    [warning] = add(path, "aa", "FID", {"FID": "9.5"})
    assert "report_old.html" in warning
    assert path.with_name("report_old.html").read_bytes() == b"\xff my notes"
    assert Page(path).headings == ["FID"]
