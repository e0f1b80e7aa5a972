"""What is declared, pinned, installed and imported agrees; and the Makefile installs it once."""

import ast
import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from hparams import (
    get_digits_report_hparams, get_reconstruct_hparams, get_sampler_hparams, get_samples_hparams,
    get_vqgan_hparams,
)
from utils.runs.folder import RunFolder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
BUILD_TOOLS = {"pip", "python", "setuptools", "wheel"}  # what requirements.yml takes from conda
CODE = ("hparams", "models", "utils", "experiments", "benchmarks", "tests")
TORCHVISION_AHEAD = 15  # torchvision 0.(n+15) is built for torch 2.n

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUNTIME = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
TESTING = [Requirement(line) for line in PROJECT["project"]["optional-dependencies"]["test"]]
WEB = [Requirement(line) for group in ("web", "browser")
       for line in PROJECT["project"]["optional-dependencies"][group]]
BUILDING = [Requirement(line) for line in PROJECT["build-system"]["requires"]]


def names(requirements):
    return {canonicalize_name(requirement.name) for requirement in requirements}


def applies(requirement, python=None):
    """Whether the requirement's marker holds, on this Python or on the one given ("3.10")."""
    if requirement.marker is None:
        return True
    return requirement.marker.evaluate({} if python is None else {"python_version": python})


def pinned_version(requirement):
    [specifier] = requirement.specifier
    assert specifier.operator == "==" and "*" not in specifier.version, f"{requirement} is no pin"
    return specifier.version


def lower_bound(requirement):
    [version] = [x.version for x in requirement.specifier if x.operator == ">="]
    return version


def constraints(python, path=ROOT / "constraints.txt"):
    """What constraints.txt pins for one Python: {name: version}; a name pinned twice fails."""
    pins = {}
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if applies(pin, python):
            name = canonicalize_name(pin.name)
            assert name not in pins, f"{path} pins {name} twice for Python {python}"
            pins[name] = pinned_version(pin)
    return pins


def conda():
    """requirements.yml in three parts: conda's own packages, pip's options, pip's requirements."""
    *packages, pip = yaml.safe_load((ROOT / "requirements.yml").read_text())["dependencies"]
    options = [line for line in pip["pip"] if line.startswith("-")]
    return packages, options, [Requirement(x) for x in pip["pip"] if not x.startswith("-")]


def conda_pins():
    return {canonicalize_name(x.name): pinned_version(x) for x in conda()[2]}


def assert_torch_pair(torch, torchvision):
    torch, torchvision = Version(torch), Version(torchvision)
    assert torchvision.minor == torch.minor + TORCHVISION_AHEAD, f"{torch} with {torchvision}"
    assert torch.local == torchvision.local


def environment_is_the_pinned_one():
    installed = importlib.metadata.version("torch").split("+")[0]
    return installed == constraints(f"3.{sys.version_info.minor}").get("torch")


# --- declared and pinned


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_a_pin_in_its_range(python):
    pins = constraints(python)
    for requirement in RUNTIME + TESTING + WEB:
        if applies(requirement, python):
            name = canonicalize_name(requirement.name)
            assert name in pins, f"constraints.txt does not pin {name}"
            assert requirement.specifier.contains(pins[name]), f"{requirement}, not {pins[name]}"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_pinned_torch_and_torchvision_belong_together(python):
    pins = constraints(python)
    assert_torch_pair(pins["torch"], pins["torchvision"])


@pytest.mark.parametrize("python", PYTHONS)
def test_the_pinned_setuptools_can_build_the_project_and_visdom(python):
    pinned = constraints(python)["setuptools"]
    for requirement in BUILDING:
        assert requirement.specifier.contains(pinned)
    assert Version(pinned) < Version("82"), "visdom's setup needs pkg_resources"


def test_the_conda_environment_names_every_dependency_and_no_stranger():
    packages, options, requirements = conda()
    wanted = {canonicalize_name(x.name) for x in RUNTIME + TESTING if applies(x, "3.11")}
    assert names(requirements) == wanted
    assert len(requirements) == len(wanted)
    assert {re.match("[a-z]+", package)[0] for package in packages} == BUILD_TOOLS
    assert {option.split()[0] for option in options} == {"--extra-index-url", "--find-links", "-e"}
    assert "-e ." in options


def test_the_conda_environment_satisfies_the_declared_ranges():
    pins = conda_pins()
    for requirement in RUNTIME + TESTING:
        if applies(requirement, "3.11"):
            pinned = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pinned), f"{requirement}, not {pinned}"


def test_the_conda_environment_pins_what_is_tested_save_torchs_family():
    tested = constraints("3.11")
    own = {"torch", "torchvision", "natten"}
    for name, version in conda_pins().items():
        assert name in own or version == tested[name], f"requirements.yml pins {name}=={version}"


def test_the_natten_wheel_is_built_for_the_torch_beside_it():
    pins, options = conda_pins(), conda()[1]
    torch, cuda = pins["torch"].split("+")
    assert Version(pins["natten"]).local == f"torch{torch.replace('.', '')}{cuda}"
    assert f"--extra-index-url https://download.pytorch.org/whl/{cuda}" in options
    assert_torch_pair(pins["torch"], pins["torchvision"])


def test_the_conda_environment_can_build_visdom():
    packages = conda()[0]
    [setuptools] = [Requirement(x) for x in packages if x.startswith("setuptools")]
    assert setuptools.specifier.contains(constraints("3.11")["setuptools"])
    assert not setuptools.specifier.contains("82.0.0"), "pkg_resources is gone"
    assert "pip=25.2" in packages, "newer ones do not build with the environment's setuptools"
    assert "python=3.11" in packages, "the tests of this file compare pins for this one"


# --- installed and imported


def test_the_installed_environment_satisfies_the_declared_ranges():
    for requirement in RUNTIME + TESTING:
        if applies(requirement):
            installed = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(installed, prereleases=True), (
                f"{requirement.name} {installed} is installed, pyproject.toml wants {requirement}"
            )


def is_installed(name):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(name))
    return False


def test_constraints_pin_everything_that_the_dependencies_pull_in():
    if not environment_is_the_pinned_one():
        pytest.skip("another torch is installed than the one that constraints.txt pins")
    pins = constraints(f"3.{sys.version_info.minor}")
    waiting, seen = [x for x in RUNTIME + TESTING if applies(x)], set()
    waiting += [x for x in WEB if is_installed(x.name)]
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        assert key[0] in pins, f"constraints.txt does not pin {key[0]}"
        for line in importlib.metadata.requires(requirement.name) or ():
            needed = Requirement(line)
            extras = requirement.extras | {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": x}) for x in extras):
                waiting.append(needed)


def packages():
    """The names of all packages of the project, by their folders."""
    outside = {"tests", "build"}
    return sorted(
        ".".join(path.parent.relative_to(ROOT).parts)
        for folder in ROOT.iterdir()
        if folder.is_dir() and folder.name not in outside and not folder.name.startswith(".")
        for path in folder.rglob("__init__.py")
    )


def test_pyproject_finds_every_package():
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert len(packages()) > 3
    for name in packages():
        assert any(fnmatch(name, pattern) for pattern in patterns), name


def test_the_packages_are_importable_from_any_folder(tmp_path):
    program = (
        "import importlib.util, sys\n"
        "for name in sys.argv[1:]: print(importlib.util.find_spec(name).origin)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", program, *packages()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"run `make install`: {run.stderr}"
    where = [Path(line).resolve() for line in run.stdout.splitlines()]
    assert where == [ROOT.joinpath(*name.split("."), "__init__.py") for name in packages()]


def imported_names(path):
    """Top-level names of the absolute imports anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_every_import_is_declared():
    distributions = importlib.metadata.packages_distributions()
    sources = [*ROOT.glob("*.py"), *(x for folder in CODE for x in (ROOT / folder).rglob("*.py"))]
    assert len(sources) > 3
    for path in sources:
        allowed = names(RUNTIME)
        parts = path.relative_to(ROOT).parts
        if parts[0] in ("tests", "benchmarks"):
            allowed |= names(TESTING)
        if parts[0] == "tests" or parts[:2] == ("utils", "web"):
            allowed |= names(WEB)
        folders = (ROOT, path.parent, ROOT / "benchmarks", ROOT / "tests")
        scripts = {script.stem for folder in folders for script in folder.glob("*.py")}
        ours = {*CODE, "experiments", *scripts}
        for name in set(imported_names(path)) - ours - sys.stdlib_module_names:
            providers = {canonicalize_name(x) for x in distributions.get(name, [name])}
            assert providers & allowed, f"{path.relative_to(ROOT)} imports {name}: not declared"


# --- make and continuous integration

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# Stands for Python in a copy of the Makefile: writes down what it is asked and makes an
# environment that holds itself; fails whatever contains the text of the file `broken`.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> calls
if [ -e broken ] && echo "$*" | grep -q -e "$(cat broken)"; then exit 1; fi
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin"; cp fake-python "$3/bin/python"; touch "$3/bin/pip"; chmod +x "$3"/bin/*
fi
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder, with a space in its name, of only what `make install` reads, and a fake Python."""
    folder = tmp_path / "with space"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "fake-python").write_text(FAKE_PYTHON)
    (folder / "fake-python").chmod(0o755)
    return folder


def run_make(folder, *arguments):
    # the tests may run under make themselves: what it hands down would change how this one talks
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def make(folder, *arguments):
    """Run make; returns how it ended and what Python was asked to do meanwhile."""
    calls = folder / "calls"
    calls.write_text("")
    run = run_make(folder, *arguments, "PYTHON=./fake-python")
    return run, [line for line in calls.read_text().splitlines() if line.startswith("-m")]


@needs_make
def test_make_installs_once_and_again_only_when_the_pins_change(checkout):
    run, calls = make(checkout, "test")
    assert run.returncode == 0, run.stderr
    assert calls[0] == "-m venv .venv" and calls[-1] == "-m pytest"
    assert sum(" install " in call for call in calls) == 2
    assert make(checkout, "test")[1] == ["-m pytest"]
    assert make(checkout, "install")[1] == []
    later = (checkout / ".venv" / "installed").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (later, later))
    calls = make(checkout, "install")[1]
    assert len(calls) == 2 and all(" install " in call for call in calls)


@needs_make
def test_make_tests_the_lowest_versions_in_an_environment_of_their_own(checkout):
    run, calls = make(checkout, "test-lowest")
    assert run.returncode == 0, run.stderr
    assert calls[0] == "-m venv .venv-lowest" and calls[-1] == "-m pytest"
    path = checkout / ".venv-lowest" / "constraints.txt"
    installs = [call for call in calls if " install " in call]
    assert len(installs) == 2
    assert all("--constraint .venv-lowest/constraints.txt" in call for call in installs)
    for python in PYTHONS:
        declared = [x for x in BUILDING + RUNTIME + TESTING + WEB if applies(x, python)]
        lowest = {canonicalize_name(x.name): lower_bound(x) for x in declared}
        pins, tested = constraints(python, path), constraints(python)
        assert {name: pins[name] for name in lowest} == lowest
        assert all(pins[name] == tested[name] for name in set(pins) - set(lowest))
    assert make(checkout, "test-lowest")[1] == ["-m pytest"]
    assert not (checkout / ".venv").exists()


@needs_make
@pytest.mark.parametrize("step", ["-m venv", "setuptools wheel torch", "--editable"])
def test_make_takes_up_an_interrupted_installation(checkout, step):
    (checkout / "broken").write_text(step)
    run, calls = make(checkout, "test")
    assert run.returncode != 0 and "-m pytest" not in calls
    (checkout / "broken").unlink()
    run, calls = make(checkout, "test")
    assert run.returncode == 0 and calls[-1] == "-m pytest"
    assert any("--editable" in call for call in calls)


@needs_make
def test_make_uses_an_environment_that_is_there(checkout):
    subprocess.run(["./fake-python", "-m", "venv", ".venv"], cwd=checkout, check=True)
    run, calls = make(checkout, "install")
    assert run.returncode == 0 and not any("venv" in call for call in calls)


@needs_make
@pytest.mark.parametrize(
    "missing, sentence",
    [("version_info", "is no Python 3.10 or newer"), ("ensurepip", "cannot make environments")],
)
def test_make_says_in_one_sentence_what_python_lacks(checkout, missing, sentence):
    (checkout / "broken").write_text(missing)
    run, calls = make(checkout, "install")
    said = [line for line in run.stderr.splitlines() if not line.startswith("make: ***")]
    assert run.returncode != 0 and calls == []
    assert len(said) == 1 and sentence in said[0]
    assert not (checkout / ".venv").exists()


@needs_make
def test_make_clean_leaves_the_runs(checkout):
    keep = [checkout / name for name in ("logs/a/log.txt", "latents/a.pt", "statistics/a.pt")]
    caches = ("a/__pycache__/a.pyc", "build/x")
    away = [checkout / name for name in (".venv/made", ".venv-lowest/made", *caches)]
    for path in keep + away:
        path.parent.mkdir(parents=True)
        path.touch()
    assert make(checkout, "clean")[0].returncode == 0
    assert [path.exists() for path in keep + away] == [True] * len(keep) + [False] * len(away)


def make_targets():
    """What `make help` lists: the documented targets."""
    return {line.split()[1] for line in run_make(ROOT, "help").stdout.splitlines()}


@needs_make
def test_every_target_is_documented():
    [phony] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert make_targets() == set(phony.split())
    wanted = {"install", "test", "test-all", "test-lowest", "demo", "photos", "visdom", "clean",
              "help"}
    assert wanted <= make_targets()


PARSERS = {
    "train_vqgan.py": get_vqgan_hparams, "train_sampler.py": get_sampler_hparams,
    "experiments/reconstruct.py": get_reconstruct_hparams,
    "experiments/get_samples.py": get_samples_hparams,
    "experiments/digits_report.py": get_digits_report_hparams,
}


def dry_run(*arguments):
    """The commands that make would run, lists of words, without starting any."""
    printed = run_make(ROOT, "--dry-run", *arguments).stdout.replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith(".venv/bin")]


@needs_make
@pytest.mark.parametrize("arguments, scripts", [
    (["demo"], ["train_vqgan.py", "train_sampler.py", "experiments/digits_report.py"]),
    (["photos"], ["-m", "train_vqgan.py", "train_sampler.py", "experiments/reconstruct.py",
                  "experiments/get_samples.py"]),
    (["photos", "PHOTOS=/my own/Cats & dogs/"],
     ["train_vqgan.py", "train_sampler.py", "experiments/reconstruct.py",
      "experiments/get_samples.py"]),
])
def test_the_commands_of_the_trainings_parse(arguments, scripts, tmp_path, monkeypatch):
    """Each one as if those before it had run."""
    monkeypatch.chdir(tmp_path)
    commands = [words for words in dry_run(*arguments) if words[:2] != ["-m", "pip"]]
    assert [words[0] for words in commands] == scripts
    runs = []
    for script, *flags in commands:
        if script == "-m":
            assert flags == ["utils.data.fluent_emoji", "pictures/fluent_emoji"]
            continue
        H = PARSERS[script](flags)
        folder = RunFolder(H.log_dir).create()
        if script.startswith("train"):
            folder.hparams.write_text(H.as_yaml())
            folder.best.write_text(json.dumps({"step": H.train_steps}))
            runs.append(H)
    vqgan, sampler = runs
    assert sampler.ae_load_step == vqgan.train_steps and sampler.resume and vqgan.resume
    assert H.load_step in (vqgan.train_steps, sampler.train_steps)
    if "PHOTOS=/my own/Cats & dogs/" in arguments:
        assert re.fullmatch(r"photos_Cats___dogs_\d+", H.log_dir)
        assert vqgan.custom_dataset_path == "/my own/Cats & dogs/"


@needs_make
def test_every_target_that_the_readme_names_exists():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md")
    # in code: `make NAME` between backquotes, or at the start of a line of a block
    named = re.findall(r"(?:`|^\s*(?:\$ )?)make ([a-z][a-z-]*)", readme.read_text(), re.MULTILINE)
    assert named and set(named) <= make_targets()


def test_ci_runs_the_tests_by_the_makefile():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^(timeout .* )?make test\b", script.read_text(), re.MULTILINE)
    assert subprocess.run(["bash", "-n", script]).returncode == 0
