"""What several test files share."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

import torch
import visdom
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from utils.signals import Stopped
from utils.training.loop import TrainingLoop
from utils.training.precision import Precision
from utils.training.processes import Processes

ROOT = Path(__file__).resolve().parent.parent
ON_DIGITS = "--dataset digits --recipe published"  # the recipe of the fewest parts
DATA = ROOT / "tests" / "data"


def golden(name):
    """The golden data of `tests/data/<name>`: inputs, weights and outputs of the originals."""
    return torch.load(DATA / name, weights_only=True)


def assert_close(actual, expected, tolerance=1e-5):
    """Equal shapes, and no entry further apart than `tolerance` times the tensor's scale."""
    assert actual.shape == expected.shape
    scale = expected.double().abs().max().clamp(min=1e-30)
    error = (actual.double() - expected.double()).abs().max() / scale
    assert error <= tolerance, f"relative error {error:.2e}"


def name_transparent(path, grey):
    """Name one value of a grey PNG as transparent, which Pillow 10 does not write for 16 bits."""
    chunk = b"tRNS" + grey.to_bytes(2, "big")
    chunk = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    png = path.read_bytes()
    path.write_bytes(png[:33] + chunk + png[33:])  # after the signature and IHDR


def half_precision(scale):
    """A class of Precision: float16 and a gradient scaler that begins with `scale`, on a CPU."""
    class HalfPrecision(Precision):
        def __init__(self, amp, device):
            super().__init__(amp, device)
            self.dtype = torch.float16
            self.scaler = torch.amp.GradScaler(device.type, init_scale=scale)

    return HalfPrecision


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@contextlib.contextmanager
def started(command, **options):
    """A process with its output as text; after the block neither it nor what it started runs.

    `options` are those of subprocess.Popen. It computes in one thread: more wait for each other
    where the processors are busy.
    """
    environment = {**options.pop("env", os.environ), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True, env=environment, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def with_small_files(size, function):
    """What `function` gives where no file may grow beyond `size` bytes: as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        return function()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def at_the_end_of_steps(monkeypatch, function):
    """Call `function(loop)` after every step of a training run, when its weights are updated."""
    end_step = TrainingLoop.end_step

    def patched(loop):
        function(loop)
        end_step(loop)

    monkeypatch.setattr(TrainingLoop, "end_step", patched)


@contextlib.contextmanager
def one_thread():
    """With one thread for torch, as each of several processes has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def as_torchrun(rank, count, port="0"):
    """The variables by which torchrun tells a process who it is."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def on_processes(count, main, flags=""):
    """Run `main` in forked processes, as torchrun would; returns their exit statuses.

    Processes that wait for each other in vain are killed after two minutes.
    """
    port, processes = str(free_port()), []
    for rank in range(count):
        process = os.fork()
        if process == 0:
            status = 1
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it is the test's own limit here
                signal.alarm(120)
                os.environ |= as_torchrun(rank, count, port)
                torch.set_num_threads(1)
                main(flags.split())
                status = 0
            except Stopped as stopped:
                status = stopped.exit_status
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        processes.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


class Log:
    """A logger that keeps what is said."""

    def __init__(self):
        self.lines = []

    def info(self, message):
        self.lines.append(message)

    warning = info

    def passed_over(self, path, reason):
        self.lines.append(f"passed over {path}: {reason}")


class VisdomServer:
    """A visdom server in a process of its own, without memory of an earlier one.

    It shows the runs in the folder `logs` when it starts: none by default.
    """

    def __init__(self, folder):
        self.port, self.folder, self.starts = free_port(), folder, 0
        self.process, self.logs = None, folder / "no_logs"

    def start(self):
        self.starts += 1
        command = [sys.executable, "-m", "utils.logging.visdom_server", "--no_download"]
        command += ["--port", str(self.port), "--env_path", f"{self.folder}/{self.starts}"]
        command += ["--logs", str(self.logs)]
        output = subprocess.DEVNULL
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        wait_until(self.listens, seconds=60)

    def listens(self):
        assert self.process.poll() is None, "the server did not start"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def windows(self, env):
        """What visdom's own client is told about all windows of an environment, in their order; no
        window is there twice."""
        client = visdom.Visdom(
            "http://127.0.0.1", port=self.port, env=env, use_incoming_socket=False
        )
        windows = json.loads(client.get_window_data(env=env))
        ordered = sorted(windows.items(), key=lambda window: window[1]["i"])
        named = {name.partition(" #")[0]: window for name, window in ordered}
        assert len(named) == len(windows), f"shown twice: {list(windows)}"
        return named


class OneOfMany(Processes):
    """One process of several that run one after the other and so never talk."""

    def wait(self):
        pass

    def broadcast(self, value):
        return value

    def gather(self, value):
        return [value] if self.is_first else None


class TinyExtractor(FeatureExtractorBase):
    """Sixteen features and five classes of images of any size, with weights drawn from a seed."""

    seed = 0

    def __init__(self, name, features_list, **options):
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(self.seed)
        for part, shape in (("filters", (16, 3, 3, 3)), ("classes", (5, 16))):
            self.register_buffer(part, torch.randn(shape, generator=generator))

    @staticmethod
    def get_provided_features_list():
        return "16", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "16"

    def forward(self, images):
        x = torch.conv2d(images.float() / 255, self.filters).relu().mean((2, 3))
        outputs = {"16": x, "logits": x @ self.classes.T}
        return tuple(outputs[layer] for layer in self.features_list)
