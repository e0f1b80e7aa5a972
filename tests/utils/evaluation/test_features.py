"""Features and measures of a stream against torch-fidelity on the same images in files."""

import json
import os
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch_fidelity
from skimage import data
from torch_fidelity import feature_extractor_inceptionv3 as inception

from helpers import Log, OneOfMany, TinyExtractor, on_processes, one_thread
from hparams import UserError
from utils.data.batches import UnreadableFiles
from utils.data.folders import scan
from utils.data.images import ImageFiles
from utils.errors import SettingsError
from utils.evaluation.experiment import Experiment
from utils.evaluation.features import Extractor, ImageStream, dataset_stream, stream_features
from utils.evaluation.measure import measure
from utils.evaluation.reference import stored_features
from utils.files import save_file
from utils.logging.images import save_images_individually
from utils.training.processes import Processes, init_processes

CPU = torch.device("cpu")


def settings(**flags):
    H = SimpleNamespace(
        feature_extractor="inception", feature_extractor_weights=None, batch_size=7,
        num_workers=0, amp=False, kid=False, isc=False, prc=False, kid_subset_size=20,
    )
    H.__dict__.update(flags)
    return H


def extractor_of(name, weights=None, metrics=("fid",)):
    return Extractor(settings(feature_extractor=name, feature_extractor_weights=weights), CPU,
                     metrics)


def random_images(seed, n, channels=3, side=10):
    rng = torch.Generator().manual_seed(seed)
    smooth = torch.rand(n, channels, 1, 1, generator=rng)
    noise = torch.rand(n, channels, side, side, generator=rng)
    return ((smooth + noise) / 2 * 255).to(torch.uint8)


def folder_of(images, folder):
    save_images_individually(images, folder)
    found = scan(folder)
    return ImageFiles("real", images.shape[-1], images.shape[1], folder, found)


def stream_of(images, size=11, name="these images"):
    """The ImageStream of images [n, C, S, S], in chunks of `size`."""
    def batches(first, n, on_unreadable):
        return images[first : first + n].split(4)

    return ImageStream(len(images), size, batches, name, "samples")


def features_of(images, extract, processes=Processes(), unreadable=None):
    """What `stream_features` gives, a list of dicts."""
    unreadable = UnreadableFiles() if unreadable is None else unreadable
    return list(stream_features(images, extract, processes, unreadable))


def figures(real, fake, **flags):
    """(what `measure` gives for images [n, C, S, S] against a dataset, the Experiment)."""
    H = settings(**flags)
    run = Experiment(H, "FID", Processes(device=CPU), Log())
    names = ["fid", *(name for name in ("kid", "isc", "prc") if getattr(H, name))]
    return measure(run, real, stream_of(fake), names), run


@pytest.mark.parametrize("channels", [1, 3])
def test_measures_equal_torch_fidelitys_on_png_files(tiny, tmp_path, channels):
    real_images, fake = random_images(0, 60, channels), random_images(1, 50, channels) // 2
    real = folder_of(real_images, tmp_path / "real")
    save_images_individually(fake, tmp_path / "fake")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "fake"), input2=str(tmp_path / "real"), feature_extractor="tiny",
        fid=True, isc=True, cuda=False, verbose=False, cache=False, save_cpu_ram=True,
    )
    for batch_size in (1, 7, 64):
        ours, _ = figures(real, fake, batch_size=batch_size, isc=True)
        assert ours["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
        assert ours["IS"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
        assert (ours["images"], ours["real images"]) == (50, 60)


def test_fid_warns_of_fewer_images_than_features(tiny, tmp_path):
    real = folder_of(random_images(0, 30), tmp_path / "real")
    for count, few in ((16, True), (17, False)):
        lines = figures(real, random_images(1, count))[1].log.lines
        assert any(f"{count} images are few for 16 features" in line for line in lines) == few


def test_kid_and_precision_equal_torch_fidelitys(tiny, tmp_path):
    real_images, fake = random_images(0, 50), random_images(1, 50) // 2 + 60
    real = folder_of(real_images, tmp_path / "real")
    save_images_individually(fake, tmp_path / "fake")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "fake"), input2=str(tmp_path / "real"), feature_extractor="tiny",
        kid=True, prc=True, kid_subset_size=20, cuda=False, verbose=False, cache=False,
        save_cpu_ram=True,
    )
    ours, _ = figures(real, fake, kid=True, prc=True)
    assert ours["KID"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours["precision"] == pytest.approx(theirs["precision"])
    assert ours["recall"] == pytest.approx(theirs["recall"])
    with pytest.raises(UserError, match="--kid_subset_size 51"):
        figures(real, fake, kid=True, kid_subset_size=51)


def test_reference_statistics_are_cached_and_never_stale(tiny, tmp_path, monkeypatch):
    images, fake = random_images(0, 30), random_images(1, 20)
    folder = tmp_path / "real"

    def fid(img_size=10):
        real = ImageFiles("real", img_size, 3, folder, scan(folder))
        result, run = figures(real, fake)
        return result["FID"], sorted(path.name for path in (tmp_path / "statistics").iterdir())

    folder_of(images, folder)
    first, names = fid()
    assert fid() == (first, names) and len(names) == 1
    save_images_individually(images[:1] // 2, folder)
    second, names = fid()
    assert second != first and len(names) == 2
    assert fid(img_size=12)[0] != second
    assert len(fid(img_size=12)[1]) == 3
    monkeypatch.setattr(TinyExtractor, "seed", 1)
    third, names = fid()
    assert third != second and len(names) == 4
    for path in (tmp_path / "statistics").iterdir():  # broken files are made again
        path.write_bytes(path.read_bytes()[:50])
    assert fid()[0] == third


def test_the_key_names_data_extractor_weights_and_layer(tiny, monkeypatch):
    def key(data, metric="fid", name="inception"):
        return extractor_of(name, metrics=["fid", "isc"]).key(data, metric)

    keys = [key("a"), key("b"), key("a", "isc"), key("a", name="efficientnet_lite0")]
    monkeypatch.setattr(TinyExtractor, "seed", 1)
    keys.append(key("a"))
    assert len(set(keys)) == 5


def test_stored_features_are_computed_again_where_their_record_differs(tiny, tmp_path):
    extractor, path, calls = extractor_of("inception"), tmp_path / "f.npy", []
    run = Experiment(settings(), "PRDC", Processes(device=CPU), Log())

    def features_by(key, images):
        def extract(batch):
            if not calls or calls[-1] != key:
                calls.append(key)
            return extractor(batch)

        return stored_features(run, stream_of(images, 4), extract, "fid", key, path)

    a, b = random_images(0, 10), random_images(1, 10)
    first = features_by("a", a)
    assert torch.allclose(first, extractor(a)["fid"])
    assert {file.name for file in tmp_path.iterdir()} == {"f.npy", "f.npy.json"}
    assert torch.equal(features_by("a", a), first) and calls == ["a"]
    second = features_by("b", b)
    assert not torch.equal(second, first) and calls == ["a", "b"]
    np.save(path, first.numpy())  # the array changed behind its record's back
    calls.append("again")
    assert torch.equal(features_by("b", b), second) and calls == ["a", "b", "again", "b"]
    calls.append("fewer")
    assert torch.equal(features_by("b", b[:8]), second[:8]) and calls[-2:] == ["fewer", "b"]
    calls.append("all")
    assert torch.equal(features_by("b", b), second) and calls[-2:] == ["all", "b"]
    (tmp_path / "f.npy.json").unlink()
    np.save(path, first.numpy())
    before = [*calls]
    assert torch.equal(features_by("b", b), first) and calls == before
    assert "taken as it is" in run.log.lines[-1]
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="f.npy"):
        features_by("b", b)
    for content in (b"PK\3\4 and no archive", b"\x93NUMPY\1\0\x10\0{'descr': '(((", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match="f.npy is no .npy file"):
            features_by("b", b)
    np.save(path, np.array([[0.0, np.nan]]))
    with pytest.raises(UserError, match="f.npy holds features that are not finite"):
        features_by("b", b)
    np.save(path, np.zeros(3))
    with pytest.raises(UserError, match=r"not features \[n, D\]"):
        features_by("b", b)


def test_chunks_of_unreadable_images_are_passed_over(tiny, tmp_path, monkeypatch):
    """A chunk of them, at either end, is no reason to stop; a dataset of them is."""
    monkeypatch.setattr("utils.evaluation.features.PART", 4)
    images = random_images(0, 21)
    real = folder_of(images, tmp_path / "real")
    broken = [0, 1, 2, 3, 9, 20]
    for index in broken:
        (tmp_path / "real" / f"{index:06d}.png").write_bytes(b"no image")
    ours, run = figures(real, random_images(1, 20))
    assert ours["real images"] == 15
    for index in broken:
        said = [line for line in run.log.lines if f"{index:06d}.png: it is no image" in line]
        assert len(said) == 1
    again = figures(real, random_images(1, 20))[1].log.lines  # from the cached statistics
    assert any("000009.png: it is no image" in line for line in again)
    for lines in (run.log.lines, again):
        assert any("6 of 21 real images could not be read; they are tried" in x for x in lines)
    for path in (tmp_path / "real").iterdir():
        path.write_bytes(b"no image")
    real = ImageFiles("real", 10, 3, tmp_path / "real", scan(tmp_path / "real"))
    with pytest.raises(UserError, match="none of the 21 real images can be read.*000000.png"):
        figures(real, random_images(1, 20))


def broken_folder(folder, readable, broken):
    """A dataset whose first images cannot be read."""
    folder_of(random_images(0, readable + broken), folder)
    for index in range(broken):
        (folder / f"{index:06d}.png").write_bytes(b"no image")
    return ImageFiles("real", 10, 3, folder, scan(folder))


@pytest.mark.parametrize("readable, flags, says", [
    (1, {}, "FID needs 2 real images or more, not 1"),
    (3, {"prc": True}, "--prc, with 3 neighbours .* needs 4 real images or more, not 3"),
    (5, {"kid": True, "kid_subset_size": 6}, "--kid_subset_size 6 needs 6 real images .* not 5"),
])
def test_counts_are_checked_again_without_unreadable_images(tiny, tmp_path, readable, flags, says):
    """Before anything is drawn, and from the cache of a second command as well."""
    real = broken_folder(tmp_path / "real", readable, 20)
    run = Experiment(settings(**flags), "FID", Processes(device=CPU), Log())
    names = ["fid", *(name for name in flags if name in ("kid", "prc"))]
    drawn = []
    stream = ImageStream(21 + readable, 11, lambda *span: drawn.append(span), "samples", "samples")
    for _ in range(2):
        with pytest.raises(UserError, match=says):
            measure(run, real, stream, names)
    assert not drawn


def test_generated_images_that_cannot_be_read_are_not_counted(tiny, tmp_path):
    real = folder_of(random_images(1, 30), tmp_path / "real")
    run = Experiment(settings(isc=True), "FID", Processes(device=CPU), Log())
    fake = dataset_stream(broken_folder(tmp_path / "fake", 9, 20), run.H, CPU)
    with pytest.raises(UserError, match="needs 10 generated images or more, not 9"):
        measure(run, real, fake, ["fid", "isc"])


# --- several processes ---------------------------------------------------------------------------


def test_rank_0_gets_the_features_of_one_process_in_the_same_order(tiny, tmp_path, monkeypatch):
    """From three real processes, which divide six chunks; those who read an image name it."""
    monkeypatch.setattr("utils.evaluation.features.PART", 4)
    real = folder_of(random_images(0, 22), tmp_path / "real")
    broken = [0, 1, 2, 3, 6, 21]
    for index in broken:
        (tmp_path / "real" / f"{index:06d}.png").write_bytes(b"no image")
    extractor = extractor_of("inception", metrics=["fid", "isc"])

    def collect(argv):
        processes, extracted, unreadable = init_processes("cpu"), [], UnreadableFiles()

        def extract(batch):
            extracted.append(len(batch))
            return extractor(batch)

        images = dataset_stream(real, settings(batch_size=3), CPU)
        found = features_of(images, extract, processes, unreadable)
        content = {"found": found, "extracted": extracted, "reasons": dict(unreadable)}
        torch.save(content, tmp_path / f"{processes.size}_{processes.rank}.pt")

    with one_thread():
        collect([])
    assert on_processes(3, collect) == [0, 0, 0]
    one, first, *others = (
        torch.load(tmp_path / name) for name in ("1_0.pt", "3_0.pt", "3_1.pt", "3_2.pt")
    )
    assert len(one["found"]) == len(first["found"]) == 5  # nothing of the first chunk
    for expected, found in zip(one["found"], first["found"]):
        assert expected.keys() == found.keys() == {"fid", "isc"}
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert sum(len(chunk["fid"]) for chunk in first["found"]) == 16
    assert list(first["reasons"]) == list(one["reasons"]) == [real.path(i) for i in broken]
    for other in others:
        assert other["found"] == [] and not other["reasons"]
    # chunks 0 and 3, 1 and 4, 2 and 5: no image is looked at twice
    assert [sum(rank["extracted"]) for rank in (first, *others)] == [4, 7, 5]
    assert sum(one["extracted"]) == 16


@pytest.mark.parametrize("size", [2, 3, 5, 9])
def test_each_rank_computes_its_chunks_and_no_more(size, tiny):
    images, extractor, done = random_images(0, 50), extractor_of("inception"), []
    for rank in range(size):
        mine = []

        def extract(batch):
            mine.append(batch)
            return extractor(batch)

        features_of(stream_of(images, 8), extract, OneOfMany(rank, size))
        assert sum(map(len, mine)) <= 8 * -(-7 // size)
        done += mine
    assert sorted(torch.cat(done).flatten(1).tolist()) == sorted(images.flatten(1).tolist())


def test_ranks_with_different_images_end_with_an_error(tiny, capfd):
    extractor = extractor_of("inception")

    def collect(argv):
        processes = init_processes("cpu")
        images = stream_of(random_images(0, 20), name=f"images of rank {processes.rank}")
        features_of(images, extractor, processes)

    statuses = on_processes(2, collect)
    assert statuses == [1, 1] or statuses == [0, 1]
    assert "the processes found different samples" in capfd.readouterr().err


def test_all_ranks_compute_statistics_that_another_command_stores_meanwhile(
    tiny, tmp_path, monkeypatch
):
    """The first rank may find them where it has just told the others that they are not there."""
    real, fake = folder_of(random_images(0, 40), tmp_path / "real"), random_images(1, 30)
    expected, _ = figures(real, fake)
    monkeypatch.setattr("utils.evaluation.features.PART", 16)
    monkeypatch.setattr("utils.evaluation.reference.read_cached", lambda *arguments: None)

    def fid(argv):
        run = Experiment(settings(), "FID", init_processes("cpu"), Log())
        run.continue_on_rank_0 = lambda: run.processes.is_first or os._exit(0)
        assert measure(run, real, stream_of(fake), ["fid"]) == expected

    assert on_processes(2, fid) == [0, 0]


# --- extractors ----------------------------------------------------------------------------------


def test_efficientnet_recognises_a_cat_and_a_cup():
    extractor = extractor_of("efficientnet_lite0", metrics=["fid", "isc"])
    for picture, classes in ((data.chelsea(), {281, 282, 285}), (data.coffee(), {504, 967, 968})):
        side = min(picture.shape[:2])
        left = (picture.shape[1] - side) // 2
        image = torch.from_numpy(picture[:side, left : left + side].copy()).permute(2, 0, 1)
        outputs = extractor(image[None])
        assert outputs["fid"].shape == (1, 1280)
        assert int(outputs["isc"].argmax()) in classes


@pytest.fixture
def inception_weights(monkeypatch, tmp_path):
    """A file of random weights of torch-fidelity's Inception."""
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: None)
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None)
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    save_file(network.state_dict(), tmp_path / "inception.pth")
    return str(tmp_path / "inception.pth")


def test_an_extractor_takes_weights_from_a_file_and_refuses_others(inception_weights, tmp_path):
    extractor = extractor_of("inception", inception_weights, ["fid", "isc"])
    outputs = extractor(random_images(0, 2, channels=1))
    assert outputs["fid"].shape == (2, 2048) and outputs["isc"].shape == (2, 1008)
    assert extractor.facts["extractor"] == "inception-v3-compat"
    json.dumps(extractor.facts)
    with pytest.raises(UserError, match="--feature_extractor_weights .* is no file of vgg16"):
        extractor_of("vgg16", inception_weights)
    with pytest.raises(UserError, match="no file"):
        extractor_of("clip", "nowhere.pt")
    with pytest.raises(SettingsError, match="leave --feature_extractor_weights out"):
        extractor_of("dinov2", inception_weights)
    torch.save(Log(), tmp_path / "code.pth")
    with pytest.raises(UserError, match="code.pth is refused"):
        extractor_of("inception", str(tmp_path / "code.pth"))


def test_weights_that_do_not_download_name_the_flag_and_the_alternative(monkeypatch):
    def refuse(*arguments, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(inception, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match="--feature_extractor_weights.*efficientnet_lite0"):
        extractor_of("inception")
