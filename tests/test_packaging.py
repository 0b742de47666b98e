"""Installs repeat, the interpreter is chosen well or its lack explained, and the tree keeps its rules."""

import configparser
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONSTRAINTS = {"3.11": "python3.11.txt", "3.12": "python3.12.txt", "3.13": "python3.12.txt"}
PACKAGES = ("sparse_lm", "pallas_kernels", "experiments")


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(*extras: str) -> list[Requirement]:
    parser = setup()
    lines = parser["options"]["install_requires"].splitlines()
    lines += [line for extra in extras for line in parser["options.extras_require"][extra].splitlines()]
    return [
        Requirement(line) for line in lines if line.strip() and not line.startswith("#") and "sparse_lm[" not in line
    ]


@pytest.mark.parametrize("python", CONSTRAINTS)
def test_every_requirement_is_pinned_within_its_bounds(python):
    lines = (ROOT / "constraints" / CONSTRAINTS[python]).read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): Version(version) for name, version in pins.items()}
    wanted = requirements("corpus", "dev")
    assert len(wanted) > 15
    for requirement in [*wanted, Requirement("setuptools>=77")]:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned for Python {python}"
        assert pins[name] in requirement.specifier, f"{requirement}: pinned to {pins[name]} for Python {python}"
    assert pins["jax"] == Version("0.10.2" if python == "3.11" else "0.11.2")


def test_every_extra_is_well_formed():
    extras = setup()["options.extras_require"]
    assert set(extras) == {"corpus", "dev", "gpu", "tpu", "eval", "interop", "tf", "wandb"}
    assert all(requirements(extra) for extra in extras)


def interpreter(folder: pathlib.Path, name: str, version: str, with_venv: bool = True) -> None:
    """A stand-in for Python that knows its version and whether it can make environments."""
    path = folder / name
    ensurepip = "exit 0" if with_venv else "exit 1"
    path.write_text(f'#!/bin/sh\ncase "$2" in *version_info*) echo {version};; *ensurepip*) {ensurepip};; esac\n')
    path.chmod(0o755)


def find_python(folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Runs the search with nothing on PATH but what the folder holds and the shell's own tools."""
    for tool in ("bash", "dirname", "sort", "ls", "awk", "env", "sh"):
        if not (folder / tool).exists():
            (folder / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
    command = [str(folder / "bash"), str(ROOT / "constraints" / "make_venv.sh"), "--find"]
    return subprocess.run(command, env={"PATH": str(folder)}, capture_output=True, text=True, timeout=30)


def test_the_newest_supported_interpreter_that_works_is_chosen(tmp_path):
    interpreter(tmp_path, "python3", "3.14")
    interpreter(tmp_path, "python3.11", "3.11")
    interpreter(tmp_path, "python3.12", "3.12")
    interpreter(tmp_path, "python3.13", "3.13", with_venv=False)
    assert find_python(tmp_path).stdout.strip() == str(tmp_path / "python3.12")
    (tmp_path / "python3.12").write_text("#!/bin/sh\nexit 127\n")  # a shim that points nowhere
    assert find_python(tmp_path).stdout.strip() == str(tmp_path / "python3.11")


def test_pyenv_and_uv_are_asked(tmp_path):
    for version in ("3.11.9", "3.12.4"):
        folder = tmp_path / "pyenv" / "versions" / version / "bin"
        folder.mkdir(parents=True)
        interpreter(folder, "python", version.rpartition(".")[0])
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "pyenv").write_text(f"#!/bin/sh\necho {tmp_path}/pyenv\n")
    (tools / "pyenv").chmod(0o755)
    interpreter(tools, "python3", "3.9")
    assert find_python(tools).stdout.strip() == str(tmp_path / "pyenv/versions/3.12.4/bin/python")
    interpreter(tmp_path, "managed", "3.13")
    (tools / "uv").write_text(f"#!/bin/sh\necho cpython-3.13.1-linux {tmp_path}/managed\n")
    (tools / "uv").chmod(0o755)
    assert find_python(tools).stdout.strip() == str(tmp_path / "managed")


def test_a_missing_venv_module_is_named_with_its_remedy(tmp_path):
    interpreter(tmp_path, "python3", "3.11", with_venv=False)
    done = find_python(tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "ensurepip" in done.stderr and "apt-get install python3-venv" in done.stderr


def test_no_supported_interpreter_is_explained(tmp_path):
    interpreter(tmp_path, "python3", "3.9")
    done = find_python(tmp_path)
    assert done.returncode == 1
    assert "versions seen: 3.9" in done.stderr and "make PYTHON=" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_help_lists_every_public_target():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    listed = subprocess.run(
        ["make", "help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    named = re.findall(r"^  make ([a-z-]+)", listed, flags=re.MULTILINE)
    assert named == ["help", "quickstart", "test", "test-faults", "test-all", "lint", "clean"]


def modules() -> list[pathlib.Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_every_folder_of_modules_is_a_package():
    bare = {str(path.parent.relative_to(ROOT)) for path in modules() if not (path.parent / "__init__.py").exists()}
    assert not bare, f"would be left out of an installation, for want of __init__.py: {sorted(bare)}"


def test_no_module_is_named_after_nothing():
    vague = {"utils", "helpers", "common", "misc"}
    paths = [*modules(), *sorted((ROOT / "scripts").glob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
    assert not [str(path) for path in paths if vague & {path.stem, *path.relative_to(ROOT).parts}]


def test_no_script_hides_a_module_of_the_standard_library():
    """Python puts a script's folder first on its path: scripts/tokenize.py would be what `inspect` imports."""
    hidden = [path.name for path in (ROOT / "scripts").glob("*.py") if path.stem in sys.stdlib_module_names]
    assert not hidden
