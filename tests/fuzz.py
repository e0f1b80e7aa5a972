"""Feed broken and hostile files to all that reads files, and see that only sentences come out.

    PYTHONPATH=. python tests/fuzz.py --files 2000

Every file is one of the programs' own (models, an optimiser, stats, cached ids, features, results,
settings, a manifest) or an image, with bits flipped, parts cut out, overwritten, repeated or taken
from another file; to these come some that are made by hand to run code or to fill the memory.
Reading one must succeed or raise a UserError of one line, within SECONDS; no code in a file may
run, and the memory of the whole must not grow by more than MEMORY. A crash of the interpreter ends
it all.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from helpers import ON_DIGITS
from hparams import UserError, get_sampler_hparams, get_vqgan_hparams
from models import VQGAN, AbsorbingDiffusion, Transformer
from utils.data.cache import read_cached
from utils.data.images import ImageFiles
from utils.data.latents import check_ids
from utils.data.pixels import UnreadableImage
from utils.evaluation.experiment import read_results
from utils.evaluation.reference import read_array
from utils.files import load_file, save_file
from utils.runs.folder import RunFolder
from utils.runs.manifest import damage, load_stats
from utils.training.checkpoints import Checkpoints, load_optimizer, load_weights, unwrapped

SECONDS = 20
MEMORY = 1 << 30  # bytes
AUTOENCODER = (
    f"{ON_DIGITS} --img_size 16 --ch_mult 1 1 --attn_resolutions 8 --emb_dim 8 "
    "--codebook_size 16 --ndf 8 --disc_layers 1 --batch_size 4"
).split()
SAMPLER = (
    f"--sampler absorbing {ON_DIGITS} --ae_load_dir ae --ae_load_step 1 --bert_n_emb 32 "
    "--bert_n_head 4 --bert_n_layers 1 --total_steps 16"
).split()
CANARY = "code was run"
LIE = "short tensors"  # may be read: what follows them in the file is then taken for them


# --- what is read, and how ---------------------------------------------------------------------


class Strict:
    """A log to which a warning is an error."""

    @staticmethod
    def warning(message):
        raise UserError(message)


class Scaler:
    def state_dict(self):
        return {}


def specimens():
    """{name: (bytes of a sound file, function that reads such a file at a path)}."""
    torch.manual_seed(0)
    H = get_vqgan_hparams(AUTOENCODER)
    run = RunFolder("ae").create()
    run.hparams.write_text(H.as_yaml())
    H = get_sampler_hparams(SAMPLER)
    vqgan = VQGAN(H)
    prior = AbsorbingDiffusion(H, Transformer(H), H.codebook_size, torch.zeros(16, 8))
    optimizer = torch.optim.Adam(prior.parameters())
    prior(torch.randint(16, (4, 64)))["loss"].backward()
    optimizer.step()
    Checkpoints(run, {"vqgan": vqgan, "prior": prior}, {"optim": optimizer}, Scaler()).save(1, {})

    def into(model):
        def read(path):
            load_weights(model, unwrapped(load_file(path), path), path)
            sum(value.double().sum() for value in model.state_dict().values())  # touches all bytes
        return read

    def optimizer_state(path):
        load_optimizer(optimizer, load_file(path), path)

    def stats(path):
        run.manifest(1).unlink(missing_ok=True)
        run.stats(1).write_bytes(path.read_bytes())
        load_stats(run, 1)

    def manifest(path):
        run.manifest(1).write_bytes(path.read_bytes())
        if problem := damage(run, 1):
            raise UserError(problem)

    def settings(path):
        run.hparams.write_bytes(path.read_bytes())
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                get_sampler_hparams(SAMPLER)
        except SystemExit:
            raise UserError(errors.getvalue().strip()) from None

    def image(path):
        dataset = ImageFiles("custom", 16, 3, path.parent, [(path.name, 0, 0)])
        dataset.load(0)

    array = io.BytesIO()
    np.save(array, np.zeros((50, 16), dtype=np.float32))
    results = json.dumps({"FID 1": {"figures": {"FID": 1.5}, "manifest": {"seed": 0}}})
    ids = Path("ids.pt")
    save_file({"key": "k", "ids": torch.zeros(50, 2, 64, dtype=torch.int32), "unreadable": {}}, ids)
    legacy = io.BytesIO()
    torch.save(prior.state_dict(), legacy, _use_new_zipfile_serialization=False)
    found = {
        "autoencoder": (run.model("vqgan", 1).read_bytes(), into(vqgan)),
        "sampler": (run.model("prior", 1).read_bytes(), into(prior)),
        "sampler, old format": (legacy.getvalue(), into(prior)),
        "optimiser": (run.model("optim", 1).read_bytes(), optimizer_state),
        "stats": (run.stats(1).read_bytes(), stats),
        "cached ids": (ids.read_bytes(), lambda path: read_cached(path, "k", Strict, check_ids)),
        "features": (array.getvalue(), read_array),
        "results.json": (results.encode(), read_results),
        "manifest": (run.manifest(1).read_bytes(), manifest),
        "hparams.yaml": (run.hparams.read_bytes(), settings),
    }
    noise = torch.randint(256, (40, 30, 4), dtype=torch.uint8).numpy()
    for kind, picture in {
        "JPEG": Image.fromarray(noise[:, :, :3]), "PNG": Image.fromarray(noise),
        "WEBP": Image.fromarray(noise[:, :, :3]), "BMP": Image.fromarray(noise[:, :, :3]),
        "GIF": Image.fromarray(noise[:, :, 0]).quantize(),
    }.items():
        content = io.BytesIO()
        picture.save(content, kind)
        found[kind] = content.getvalue(), image
    return found


# --- how they are broken -----------------------------------------------------------------------


def mutate(content, others, rng):
    """One random change of `content`; `others` are files to take parts from."""
    content = bytearray(content)
    # Half of the changes hit the first kilobytes, where headers and pickles are.
    end = len(content) if rng.random() < 0.5 else min(len(content), 4096)
    start = rng.randrange(end)
    stop = min(len(content), start + rng.choice((1, 4, 8, 64, 1000)))
    kind = rng.choice(("bits", "cut", "zeros", "ones", "splice", "repeat", "noise", "remove"))
    if kind == "bits":
        for _ in range(rng.choice((1, 1, 4, 64))):
            content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[start:]
    elif kind == "zeros":
        content[start:stop] = bytes(stop - start)
    elif kind == "ones":
        content[start:stop] = b"\xff" * (stop - start)
    elif kind == "splice":
        other = rng.choice(others)
        place = rng.randrange(len(other))
        content[start:stop] = other[place : place + stop - start]
    elif kind == "repeat":
        content[stop:stop] = content[start:stop] * rng.choice((1, 3))
    elif kind == "noise":
        content[start:stop] = rng.randbytes(stop - start)
    else:
        del content[start:stop]
    return bytes(content)


# --- made by hand ------------------------------------------------------------------------------


class Command:
    def __reduce__(self):
        return os.system, (f"touch '{CANARY}'",)


class Code:
    def __reduce__(self):
        return eval, (f"open({CANARY!r}, 'w')",)


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def huge_png(side):
    """A PNG that says it has side x side pixels, of which it brings a row."""
    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(bytes(3 * side))) + chunk(b"IEND", b""))


def shortened(archive, size):
    """An archive of torch's whose tensors have `size` bytes, though its pickle says otherwise."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:size] if "/data/" in name else content)
    return buffer.getvalue()


def made_by_hand(found):
    """[(name, bytes, function that reads them)]."""
    _, model = found["sampler"]
    _, optimiser = found["optimiser"]
    _, image = found["PNG"]
    _, settings = found["hparams.yaml"]
    _, stats = found["stats"]
    sound = found["sampler"][0]
    laughs = "a0: &a0 [1, 1]\n" + "".join(
        f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)
    )
    state = torch.load(io.BytesIO(sound), weights_only=True)
    name = next(iter(state))
    wide, endless = torch.zeros(1).expand(1 << 40), {}
    endless["model"] = endless
    files = [(LIE, shortened(sound, size), model) for size in (0, 4, 100)]
    for kind, evil in {"a command": Command(), "code": Code()}.items():
        for content in (saved(evil), saved({name: evil}), saved({"model": {name: evil}}), saved(
            {**state, "x": evil}, _use_new_zipfile_serialization=False
        )):
            files += [(kind, content, reader) for reader in (model, optimiser, stats)]
    files += [
        ("a tensor without end", saved({**state, name: wide}), model),
        ("a sparse tensor", saved({**state, name: torch.zeros(3, 3).to_sparse()}), model),
        ("numbers for names", saved({1: torch.zeros(1)}), model),
        ("lists for tensors", saved({name: [1, 2]}), model),
        ("a dict in itself", saved(endless), model),
        ("a wrapped tensor without end", saved({"state_dict": {**state, name: wide}}), model),
        ("huge PNG", huge_png(12_000), image),
        ("huge PNG", huge_png(60_000), image),
        ("a PNG bomb", huge_png(100_000), image),
        ("a billion laughs", laughs.encode(), settings),
        ("lists in lists", b"a: " + b"[" * 100_000, settings),
        ("a number without end", b"nf: 0x" + b"f" * 100_000, settings),
        ("a number without end", b"nf: " + b"9" * 100_000, settings),
        ("no date", b"nf: 2024-99-99", settings),
        ("python code", b"nf: !!python/object/apply:os.system ['touch x']", settings),
        ("much text", b"nf: " + b"x" * (2 << 20), settings),
        ("a list for a name", b"ch_mult: {a: b}\nimg_size: .inf", settings),
        ("no text", b"\x00\xff\xfe", settings),
    ]
    return files


# --- the run -----------------------------------------------------------------------------------


def too_slow(number, frame):
    raise SystemExit(f"reading a file took longer than {SECONDS} seconds")


def read(reader, path):
    """What reading a file came to: "read", or "refused" with a sentence."""
    signal.alarm(SECONDS)
    try:
        reader(path)
        return "read"
    except UserError as error:
        reason = str(error)
        assert reason and (isinstance(error, UnreadableImage) or "\n" not in reason), reason
        return "refused"
    finally:
        signal.alarm(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000, help="how many mutated files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    signal.signal(signal.SIGALRM, too_slow)
    outcomes, longest = Counter(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = specimens()
        names, contents = list(found), [content for content, _ in found.values()]
        path = Path("mutated.th")
        for name, (content, reader) in found.items():
            path.write_bytes(content)
            assert read(reader, path) == "read", f"a sound {name} is refused"
        cases = made_by_hand(found)
        handmade = len(cases)
        for index in range(arguments.files):
            content, reader = found[names[index % len(names)]]
            for _ in range(rng.choice((1, 1, 3))):
                content = mutate(content, contents, rng) or b"0"
            cases.append((names[index % len(names)], content, reader))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for index, (name, content, reader) in enumerate(cases):
            path.write_bytes(content)
            begun = time.perf_counter()
            try:
                outcome = read(reader, path)
            except BaseException:
                print(f"file {index}, {name}, of --seed {arguments.seed}:", file=sys.stderr)
                raise
            longest = max(longest, time.perf_counter() - begun)
            if index < handmade:
                assert name == LIE or outcome == "refused", f"{name} is not refused"
                name = "made by hand"
            outcomes[name, outcome] += 1
            assert not Path(CANARY).exists(), f"file {index}, {name}, ran code"
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        assert growth < MEMORY, f"reading took {growth >> 20} MiB of memory"
        os.chdir("/")
    print(f"{arguments.files} mutated files and {handmade} made by hand, seed {arguments.seed}: "
          f"the slowest took {longest:.2f} s, memory grew by {growth >> 20} MiB")
    for name in [*names, "made by hand"]:
        print(f"  {name:20} {outcomes[name, 'refused']:5} refused {outcomes[name, 'read']:5} read")


if __name__ == "__main__":
    main()
