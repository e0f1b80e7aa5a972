"""Finding a user's own data: folders, lmdb folders, names of datasets.yaml, and what is said."""

import io
import struct
import zlib
from types import SimpleNamespace

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from utils.data.datasets import load_dataset
from utils.data.pixels import value_range
from utils.errors import SettingsError, UserError


class Log(list):
    """The warnings of a log."""

    warning = list.append


def settings_for(name, path=None):
    path = None if path is None else str(path)
    return SimpleNamespace(dataset=name, custom_dataset_path=path, img_size=8, n_channels=3)


def opened(path, name="custom"):
    """(dataset, warnings) of a path that --custom_dataset_path or a line for `name` gives."""
    log = Log()
    if name == "custom":
        return load_dataset(settings_for(name, path), log), log
    registry = path.parent / "datasets.yaml"
    registry.write_text(f"{name}: {path.name}\n")
    return load_dataset(settings_for(name), log, registry), log


def save(path, value=200, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8), (value,) * 3 if mode == "RGB" else value).save(path)


def png(value):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(content, "PNG")
    return content.getvalue()


def make_lmdb(folder, contents):
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 22) as environment:
        with environment.begin(write=True) as transaction:
            for number, content in enumerate(contents):
                transaction.put(f"{number:03}".encode(), content)


def levels(dataset):
    return [int(dataset.pixels(index)[0, 0, 0]) for index in range(len(dataset))]


# --- what is passed over -----------------------------------------------------------------------


def test_files_that_are_passed_over_are_counted_by_extension(tmp_path):
    root = tmp_path / "photos"
    for name in [*(f"{n}.tif" for n in range(30)), *(f"deep/{n}.GIF" for n in range(10)),
                 "README", "dot.", "notes.txt", ".hidden.tif", "__MACOSX/x.tif", ".git/x.tif"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name in ("a.PNG", "b.PNG"):
        save(root / name)
    dataset, warnings = opened(root)
    assert len(dataset) == 2
    assert warnings == dataset.remarks == [
        f"passed over 30 .tif, 10 .gif, 2 with no extension, 1 .txt in {root}: images are .jpg, "
        f".jpeg, .png, .webp, .bmp"
    ]


def test_a_folder_of_images_alone_is_opened_without_a_word(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / ".DS_Store").touch()
    assert opened(tmp_path)[1] == []


def test_of_many_kinds_of_files_the_most_frequent_are_named(tmp_path):
    save(tmp_path / "a.png")
    for number in range(100):
        (tmp_path / f"scan.{number:03}").touch()
    (tmp_path / "scan2.007").touch()
    (remark,) = opened(tmp_path)[1]
    assert remark.startswith("passed over 2 .007, 1 .") and ", 92 of other kinds in " in remark


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.tif").touch()
    with pytest.raises(UserError, match=r"no image \(.jpg.*\) but 3 .tif in .*--custom_dataset"):
        opened(tmp_path)


def test_tables_belong_to_real_fake_faces_and_not_to_other_folders(tmp_path):
    root = tmp_path / "faces"
    save(root / "real" / "a.png")
    save(root / "fake" / "b.png")
    (root / "train.csv").write_text("path,label\nreal/a.png,1\n")
    assert opened(root, "real_fake_faces")[1] == []
    (root / "more.csv").touch()
    assert "passed over 1 .csv in" in opened(root, "real_fake_faces")[1][0]
    assert "passed over 2 .csv in" in opened(root, "ffhq")[1][0]


# --- paths that are no folder ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["photos.zip", "photos.TAR.gz", "p.tgz", "p.tar", "p.7z", "p.rar"])
@pytest.mark.parametrize("dataset, setting", [
    ("custom", "--custom_dataset_path"), ("ffhq", "its path in .*datasets.yaml"),
    ("churches", "its path in .*datasets.yaml"), ("mine", "its path in .*datasets.yaml"),
])
def test_an_archive_is_to_be_unpacked(tmp_path, name, dataset, setting):
    (tmp_path / name).write_bytes(b"PK")
    match = f"{name} is an archive: unpack it, and change {setting} to the folder"
    with pytest.raises(UserError, match=match):
        opened(tmp_path / name, dataset)


@pytest.mark.parametrize("dataset", ["custom", "ffhq", "bedrooms", "mine"])
def test_a_file_is_no_folder(tmp_path, dataset):
    save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png is a file: change .* to the folder of the images"):
        opened(tmp_path / "a.png", dataset)


def test_a_folder_may_be_called_like_an_archive(tmp_path):
    save(tmp_path / "photos.zip" / "a.png", 7)
    assert levels(opened(tmp_path / "photos.zip")[0]) == [7]


# --- lmdb folders, names of datasets.yaml ------------------------------------------------------


@pytest.mark.parametrize("name", ["custom", "mine"])
@pytest.mark.parametrize("below", ["", "cats_train_lmdb"])
def test_any_lmdb_folder_is_a_dataset(tmp_path, name, below):
    make_lmdb(tmp_path / "data" / below, map(png, [5, 6, 200]))
    (tmp_path / "data" / "README.txt").touch()
    dataset, _ = opened(tmp_path / "data", name)
    assert dataset.name == name and levels(dataset) == [5, 6, 200]


def test_of_several_lmdb_folders_one_is_to_be_named(tmp_path):
    for part in ("train", "val"):
        make_lmdb(tmp_path / f"{part}_lmdb", [png(1)])
    with pytest.raises(UserError, match=r"several lmdb folders \(train_lmdb, val_lmdb\)"):
        opened(tmp_path)
    assert len(opened(tmp_path / "val_lmdb")[0]) == 1


def test_images_beside_an_lmdb_folder_are_what_is_learned_from(tmp_path):
    make_lmdb(tmp_path / "cache", [png(1)])
    save(tmp_path / "a.png", 200)
    dataset, warnings = opened(tmp_path)
    assert levels(dataset) == [200] and "passed over 2 .mdb in" in warnings[0]


def test_an_empty_lmdb_folder_is_one_sentence(tmp_path):
    make_lmdb(tmp_path / "data", [])
    with pytest.raises(UserError, match="no image in .*data: .*--custom_dataset_path"):
        opened(tmp_path / "data")


@pytest.mark.parametrize("name", ["mine", "Cats_2.v-3", "2024", "yes", "null"])
def test_a_name_that_datasets_yaml_adds_is_a_dataset(tmp_path, name):
    save(tmp_path / "photos" / "a.png", 9)
    dataset, _ = opened(tmp_path / "photos", name)
    assert dataset.name == name and levels(dataset) == [9]


@pytest.mark.parametrize("name", ["my photos", "../x", "a/b", ".hidden", "-x", "x" * 65, "größe"])
def test_a_name_that_is_not_plain_is_refused_when_it_is_used(tmp_path, name):
    save(tmp_path / "photos" / "a.png", 9)
    with pytest.raises(SettingsError, match="names of files: write it in .* letters, digits"):
        opened(tmp_path / "photos", name)
    registry = tmp_path / "datasets.yaml"  # other names of the file work
    registry.write_text(registry.read_text() + "ffhq: photos\n")
    assert levels(load_dataset(settings_for("ffhq"), registry=registry)) == [9]


def test_paths_of_datasets_yaml_for_names_without_a_path_are_not_used_and_named(tmp_path):
    save(tmp_path / "photos" / "a.png")
    registry, log = tmp_path / "datasets.yaml", Log()
    registry.write_text("digits: photos\ncustom: elsewhere\n")
    assert len(load_dataset(settings_for("digits"), log, registry)) == 1797
    dataset = load_dataset(settings_for("custom", tmp_path / "photos"), log, registry)
    assert len(dataset) == 1 and len(log) == 2
    for name, warning in zip(("digits", "custom"), log):
        assert f"gives for {name} is not used" in warning and str(registry) in warning
    registry.write_text("a: [")  # which is no concern of theirs
    log.clear()
    load_dataset(settings_for("digits"), log, registry)
    assert log == []


# --- nearly black images -----------------------------------------------------------------------


def save_16_bits(path, values):
    """16-bit grey [H, W] or RGB [H, W, 3], which PIL reads but does not write."""
    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("largest, shape, found", [
    (4095, (8, 8), "from 3 to 4095 of 65535"), (16383, (8, 8), "from 3 to 16383 of 65535"),
    (16384, (8, 8), None), (65535, (8, 8), None),
    (4095, (8, 8, 3), "from 0 to 15 of 255"), (65535, (8, 8, 3), None),
])
def test_16_bit_images_that_use_less_than_a_quarter_of_their_range_are_named(
    tmp_path, largest, shape, found
):
    values = np.full(shape, 3)
    values[0, 0] = largest
    save_16_bits(tmp_path / "a.png", values)
    warnings = opened(tmp_path)[1]
    if found is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert f"values {found} (such as {tmp_path / 'a.png'})" in warning and "scale" in warning


@pytest.mark.parametrize("dark, warned", [(500, False), (560, True)])
def test_sixteen_images_spread_evenly_are_looked_at_and_most_must_be_dark(
    dark, warned, tmp_path, monkeypatch
):
    """The first and the last among them, and no others than the sixteen are read."""
    make_lmdb(tmp_path / "data", [png(3)] * 1000)
    dataset, _ = opened(tmp_path / "data")
    seen = []

    def look(self, index):
        seen.append(index)
        return Image.new("L", (4, 4), 19 if index < dark else 255)

    monkeypatch.setattr(type(dataset), "open", look)
    remarks = opened(tmp_path / "data")[1]
    assert len(seen) == 16 and seen[0] == 0 and seen[-1] == 999
    assert set(np.diff(seen)) <= {66, 67}
    assert [remark.partition(":")[0] for remark in remarks] == (
        ["9 of 16 images that were looked at are nearly black"] if warned else []
    )


def test_unreadable_images_are_no_reason_for_a_word_about_values(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    assert opened(tmp_path)[1] == []
    save(tmp_path / "3.png", 10)
    assert "from 10 to 10 of 255" in opened(tmp_path)[1][0]


@pytest.mark.parametrize("kind", ["files", "lmdb"])
def test_nearly_black_images_are_named_in_folders_and_lmdb(tmp_path, kind):
    if kind == "files":
        save(tmp_path / "data" / "a.png", 19)
    else:
        make_lmdb(tmp_path / "data", [png(19)] * 3)
    assert "nearly black" in opened(tmp_path / "data")[1][0]


def test_the_range_is_that_of_what_is_seen():
    """Colours of a palette, not their indices; transparency is white; a mask is black and white."""
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 250, 10, 20])
    assert value_range(palette) == (10, 250, 255)
    assert value_range(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) == (255, 255, 255)
    assert value_range(Image.new("1", (4, 4), 1)) == (255, 255, 255)
    assert value_range(Image.new("CMYK", (4, 4), (0, 0, 0, 255)))[:2] == (0, 0)
    grey = Image.fromarray(np.array([[300, 7]], np.uint16))
    assert value_range(grey) == (7, 300, 65535)
    grey.info["transparency"] = 300
    assert value_range(grey) == (7, 65535, 65535)


def test_what_is_said_changes_nothing_in_the_data(tmp_path):
    save(tmp_path / "a.png", 3)
    quiet = load_dataset(settings_for("custom", tmp_path))
    said, warnings = opened(tmp_path)
    assert warnings and quiet.fingerprint() == said.fingerprint()
    assert torch.equal(quiet.load(0), said.load(0))
