"""Features and FID of a stream against torch-fidelity on the same images in files."""

import json
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch_fidelity
from skimage import data
from torch_fidelity import feature_extractor_inceptionv3 as inception

from helpers import OneOfMany, TinyExtractor
from hparams import UserError
from utils.training.checkpoints import save_file
from utils.data.datasets import ImageFiles, scan
from utils.training.processes import World
from utils.evaluation.features import (
    Extractor, KeptFeatures, features_in_parts, features_key, features_of, real_subset, rebatch,
)
from utils.evaluation.fidelity import fid_extractor, fid_figures
from utils.logging.images import save_images_individually

CPU = torch.device("cpu")


class Log:
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def info(self, message):
        self.lines.append(message)

    warning = info


def random_images(seed, n, channels=3, side=10):
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(n, channels, 1, 1, generator=generator)
    noise = torch.rand(n, channels, side, side, generator=generator)
    return ((smooth + noise) / 2 * 255).to(torch.uint8)


def folder_of(images, folder):
    save_images_individually(images, folder)
    found = scan(folder)
    return ImageFiles("real", images.shape[-1], images.shape[1], folder, found)


def figures(real, fake, batch_size=7, **flags):
    H = SimpleNamespace(
        feature_extractor="inception", feature_extractor_weights=None, batch_size=batch_size,
        num_workers=0, kid=False, isc=False, prc=False, kid_subset_size=20,
    )
    H.__dict__.update(flags)
    run = SimpleNamespace(H=H, device=CPU, log=Log(), facts={}, divide=lambda *things: None)
    extractor = fid_extractor(run)
    return fid_figures(run, real, extractor, parts_of(fake, extractor, run.log)), run


def parts_of(images, extractor, log, size=11, path_of=None, key=None):
    """Parts of the features of images [n, C, S, S]; they are kept nowhere by default."""
    def batches(first, n, on_unreadable):
        return images[first : first + n].split(4)

    return features_in_parts(
        batches, extractor, len(images), size, path_of, key, log, "samples"
    )


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
        ours, _ = figures(real, fake, batch_size, isc=True)
        assert ours["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
        assert ours["IS"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
        assert (ours["images"], ours["real images"]) == (50, 60)


def test_few_images_are_said_to_be_few(tiny, tmp_path):
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

    def measure(img_size=10):
        real = ImageFiles("real", img_size, 3, folder, scan(folder))
        result, run = figures(real, fake)
        return result["FID"], sorted(path.name for path in (tmp_path / "statistics").iterdir())

    folder_of(images, folder)
    first, names = measure()
    assert measure() == (first, names) and len(names) == 1
    save_images_individually(images[:1] // 2, folder)
    second, names = measure()
    assert second != first and len(names) == 2
    assert measure(img_size=12)[0] != second
    assert len(measure(img_size=12)[1]) == 3
    monkeypatch.setattr(TinyExtractor, "seed", 1)
    third, names = measure()
    assert third != second and len(names) == 4
    for path in (tmp_path / "statistics").iterdir():  # broken files are made again
        path.write_bytes(path.read_bytes()[:50])
    assert measure()[0] == third


def test_the_key_names_data_extractor_weights_and_layer(tiny, monkeypatch):
    def key(data, metric="fid", name="inception"):
        return features_key(data, Extractor(name, None, CPU, ["fid", "isc"]), metric)

    keys = [key("a"), key("b"), key("a", "isc"), key("a", name="efficientnet_lite0")]
    monkeypatch.setattr(TinyExtractor, "seed", 1)
    keys.append(key("a"))
    assert len(set(keys)) == 5


def test_kept_features(tiny, tmp_path):
    extractor, path, log, calls = Extractor("inception", None, CPU), tmp_path / "f.npy", Log(), []

    def features_by(key, images):
        def extract(batch):
            if not calls or calls[-1] != key:
                calls.append(key)
            return extractor(batch)

        def path_of(first, n):
            return tmp_path / f"part_{first}"

        return KeptFeatures(path, parts_of(images, extract, log, 4, path_of, key), "fid").get()

    a, b = random_images(0, 10), random_images(1, 10)
    first = features_by("a", a)
    assert torch.allclose(first, extractor(a)["fid"])
    assert not list(tmp_path.glob("part_*"))
    assert torch.equal(features_by("a", a), first) and calls == ["a"]
    second = features_by("b", b)
    assert not torch.equal(second, first) and calls == ["a", "b"]
    np.save(path, first.numpy())  # the array changed behind its record's back
    calls.append("again")
    assert torch.equal(features_by("b", b), second) and calls == ["a", "b", "again", "b"]
    (tmp_path / "f.npy.json").unlink()
    np.save(path, first.numpy())
    assert torch.equal(features_by("b", b), first) and calls == ["a", "b", "again", "b"]
    assert "taken as it is" in log.lines[-1]
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="f.npy"):
        features_by("b", b)
    for content in (b"PK\3\4 and no archive", b"\x93NUMPY\1\0\x10\0{'descr': '(((", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match="f.npy is no .npy file"):
            features_by("b", b)
    np.save(path, np.zeros(3))
    with pytest.raises(UserError, match=r"not features \[n, D\]"):
        features_by("b", b)


def test_parts_of_unreadable_images_are_passed_over(tiny, tmp_path, monkeypatch):
    """A part of them, at either end, is no reason to stop; a dataset of them is."""
    monkeypatch.setattr("utils.evaluation.features.PART", 4)
    images = random_images(0, 21)
    real, log = folder_of(images, tmp_path / "real"), Log()
    broken = [0, 1, 2, 3, 9, 20]
    for index in broken:
        (tmp_path / "real" / f"{index:06d}.png").write_bytes(b"no image")
    ours, run = figures(real, random_images(1, 20))
    assert ours["real images"] == 15
    for index in broken:
        said = [line for line in run.log.lines if f"{index:06d}.png: it is no image" in line]
        assert len(said) == 1
    again = figures(real, random_images(1, 20))[1].log.lines  # from the kept statistics
    assert any("000009.png: it is no image" in line for line in again)
    assert any("6 of 21 real images could not be read; they are tried" in line for line in again)
    for path in (tmp_path / "real").iterdir():
        path.write_bytes(b"no image")
    real = ImageFiles("real", 10, 3, tmp_path / "real", scan(tmp_path / "real"))
    with pytest.raises(UserError, match="none of the 21 real images can be read.*000000.png"):
        figures(real, random_images(1, 20))


def test_each_process_makes_its_share_of_the_parts(tiny, tmp_path):
    images, extractor, made = random_images(0, 50), Extractor("inception", None, CPU), []
    folder = tmp_path / "parts"

    def parts():
        def extract(batch):
            made.append(len(batch))
            return extractor(batch)

        return parts_of(images, extract, Log(), 8, lambda first, n: folder / f"{first}", "key")

    parts().share(World())
    assert not made and not list(tmp_path.iterdir())
    for rank in range(3):
        parts().share(OneOfMany(rank, 3))
    assert sum(made) == 50 and len(list(folder.iterdir())) == 7
    found = torch.cat(list(features_of(parts(), "fid")))
    assert sum(made) == 50  # they were read
    whole = torch.cat(list(features_of(parts_of(images, extractor, Log(), 8), "fid")))
    assert torch.equal(found, whole)
    parts().remove()
    assert not list(tmp_path.iterdir())


def test_rebatch():
    stream = [torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1) for n in (3, 5, 1, 6)]
    for size in (1, 4, 5, 100):
        batches = list(rebatch(stream, size))
        assert torch.equal(torch.cat(batches), torch.cat(stream))
        assert all(len(batch) == size for batch in batches[:-1]) and 0 < len(batches[-1]) <= size


def test_a_subset_is_always_the_same(tmp_path):
    dataset = folder_of(random_images(0, 9), tmp_path / "real")
    assert real_subset(dataset, 9) is dataset
    subset = real_subset(dataset, 4)
    assert len(set(subset.indices.tolist())) == 4
    assert (real_subset(dataset, 4).indices == subset.indices).all()


def test_efficientnet_has_its_real_weights():
    """It knows a cat and a cup of coffee."""
    extractor = Extractor("efficientnet_lite0", None, CPU, ["fid", "isc"])
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


def test_weights_from_a_file(inception_weights, tmp_path):
    extractor = Extractor("inception", inception_weights, CPU, ["fid", "isc"])
    outputs = extractor(random_images(0, 2, channels=1))
    assert outputs["fid"].shape == (2, 2048) and outputs["isc"].shape == (2, 1008)
    assert extractor.facts["extractor"] == "inception-v3-compat"
    json.dumps(extractor.facts)
    with pytest.raises(UserError, match="--feature_extractor_weights .* is no file of vgg16"):
        Extractor("vgg16", inception_weights, CPU)
    with pytest.raises(UserError, match="no file"):
        Extractor("clip", "nowhere.pt", CPU)
    torch.save(Log(), tmp_path / "code.pth")
    with pytest.raises(UserError, match="code.pth is refused"):
        Extractor("inception", str(tmp_path / "code.pth"), CPU)


def test_without_a_connection(monkeypatch):
    def refuse(*arguments, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(inception, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match="--feature_extractor_weights.*efficientnet_lite0"):
        Extractor("inception", None, CPU)
