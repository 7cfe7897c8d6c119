"""install.sh on machines that are acted: a stub in PATH is the machine, a stub pip is the registry.

Also what pyproject.toml and constraints.txt promise: the declared packages are those imported, and the wheel
is complete.
"""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "cat", "cksum", "cp", "date", "dirname", "grep", "ln", "nproc", "rm", "sed")

# Writes down what it was asked to install, and leaves the console script that a real pip would.
STUB_PIP = """
import os, pathlib, sys
venv = pathlib.Path(sys.prefix)
with (venv / "pip.log").open("a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
script = venv / "bin" / "hvlite"
script.write_text("#!/bin/sh\\n")
script.chmod(0o755)
"""
STUB_TORCH = """
import types
__version__ = {version!r}
version = types.SimpleNamespace(cuda={cuda!r})
cuda = types.SimpleNamespace(
    is_available=lambda: {usable!r},
    device_count=lambda: 1,
    get_device_name=lambda index: "NVIDIA Stub",
    get_device_capability=lambda index: {capability!r},
)
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """A checkout with a virtual environment in which pip and torch are stubs, and a PATH of its own."""

    checkout: Path
    commands: Path

    @property
    def site(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.checkout / ".venv" / "lib" / version / "site-packages"

    @property
    def installed(self) -> list[str]:
        """The arguments of every pip call so far."""
        log = self.checkout / ".venv" / "pip.log"
        return log.read_text().splitlines() if log.exists() else []

    def add_command(self, name: str, script: str) -> None:
        path = self.commands / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def make_venv(self) -> None:
        """As the script's own `python -m venv`, but quick, and with the stub pip."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.checkout / ".venv"], check=True)
        (self.site / "pip").mkdir()
        (self.site / "pip" / "__init__.py").write_text("")
        (self.site / "pip" / "__main__.py").write_text(STUB_PIP)
        (self.site / "hvlite.py").write_text("")

    def add_torch(
        self,
        *,
        version: str = "2.13.0",
        cuda: str | None = "13.0",
        usable: bool = False,
        capability: tuple[int, int] = (8, 9),
    ) -> None:
        stub = STUB_TORCH.format(version=version, cuda=cuda, usable=usable, capability=capability)
        (self.site / "torch.py").write_text(stub)

    def install(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", self.checkout / "install.sh", *arguments],
            env={"PATH": str(self.commands), "CUDA_HOME": str(self.checkout / "no-cuda"), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A Linux machine with no Python in PATH and no NVIDIA card known to nvidia-smi."""
    checkout, commands = tmp_path / "checkout", tmp_path / "commands"
    checkout.mkdir()
    commands.mkdir()
    for name in ("install.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout)
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None, f"the test needs {tool}"
        (commands / tool).symlink_to(found)
    made = Machine(checkout, commands)
    made.add_command("uname", "echo Linux")
    return made


def test_first_run_installs_the_tested_versions_and_names_the_next_command(machine: Machine) -> None:
    machine.make_venv()

    done = machine.install()

    assert done.returncode == 0, done.stderr
    assert [line.split()[-4:] for line in machine.installed] == [["-c", "constraints.txt", "-e", "."]]
    assert done.stdout.splitlines()[-1].strip().startswith(".venv/bin/hvlite gen ")


def test_second_run_installs_nothing(machine: Machine) -> None:
    machine.make_venv()
    machine.install("--dev")
    before = machine.installed

    again, plain = machine.install("--dev"), machine.install()

    assert again.returncode == plain.returncode == 0
    assert machine.installed == before
    assert before[0].endswith("-e .[dev]")


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_is_installed(machine: Machine, changed: str) -> None:
    machine.make_venv()
    machine.install()
    with (machine.checkout / changed).open("a") as file:
        file.write("# changed\n")

    machine.install()

    assert len(machine.installed) == 2


def test_dev_after_a_plain_install_adds_the_rest(machine: Machine) -> None:
    machine.make_venv()
    machine.install()

    machine.install("--dev")

    assert len(machine.installed) == 2


def test_a_failed_install_is_tried_again(machine: Machine) -> None:
    machine.make_venv()
    pip = machine.site / "pip" / "__main__.py"
    pip.write_text("raise SystemExit(1)")
    failed = machine.install()
    pip.write_text(STUB_PIP)

    done = machine.install()

    assert failed.returncode != 0
    assert done.returncode == 0
    assert len(machine.installed) == 1


def test_a_copied_environment_is_made_anew(machine: Machine) -> None:
    """Its scripts name the folder they came from."""
    machine.make_venv()
    machine.install()
    moved = machine.checkout.rename(machine.checkout.with_name("moved"))
    machine.add_command("python3.11", f'[ "$1" = -m ] && echo "made: $*" && exit 7; exec "{sys.executable}" "$@"')

    done = Machine(moved, machine.commands).install()

    assert "made: -m venv --clear .venv" in done.stdout
    assert done.returncode == 7


def test_no_python_is_said_clearly(machine: Machine) -> None:
    machine.add_command("python3", "exit 1")

    done = machine.install()

    assert done.returncode == 1
    assert "no Python of 3.11 or newer" in done.stderr
    assert not (machine.checkout / ".venv").exists()


def test_a_python_without_venv_names_the_package(machine: Machine) -> None:
    machine.add_command("python3", 'case "$2" in *ensurepip*) exit 1 ;; esac')

    done = machine.install()

    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr


def test_native_windows_is_refused(machine: Machine) -> None:
    machine.add_command("uname", "echo MINGW64_NT-10.0-22631")

    done = machine.install()

    assert done.returncode == 2
    assert "WSL2" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_arguments_are_refused(machine: Machine) -> None:
    done = machine.install("--devel")

    assert done.returncode == 2
    assert "'--devel'" in done.stderr


def test_flash_without_nvcc_stops_before_anything_is_made(machine: Machine) -> None:
    done = machine.install("--flash")

    assert done.returncode == 1
    assert "nvcc" in done.stderr
    assert not (machine.checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("cuda", "said"),
    [(None, "for the CPU only"), ("12.8", "nvcc of CUDA 12")],
)
def test_flash_is_not_built_for_a_torch_it_cannot_fit(machine: Machine, cuda: str | None, said: str) -> None:
    machine.make_venv()
    machine.add_torch(cuda=cuda)
    machine.add_command("nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")

    done = machine.install("--flash")

    assert done.returncode == 1
    assert said in done.stderr
    assert not any("flash" in line for line in machine.installed)


def test_flash_is_built_only_when_asked_for(machine: Machine) -> None:
    machine.make_venv()
    machine.add_torch()
    machine.add_command("nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")

    machine.install()
    assert not any("flash" in line for line in machine.installed)
    done = machine.install("--flash")

    assert done.returncode == 0, done.stderr
    (extra,) = project()["optional-dependencies"]["flash"]
    assert machine.installed[-1].endswith(f"--no-build-isolation {extra}")


@pytest.mark.parametrize(
    ("cuda", "driver", "said"),
    [
        (None, "580.95.05", "for the CPU only"),
        ("13.0", "535.183.01", "needs driver 580 or newer; found 535.183.01"),
        ("13.0", "580.95.05", "run nvidia-smi"),
    ],
)
def test_a_card_that_torch_cannot_use_is_named(machine: Machine, cuda: str | None, driver: str, said: str) -> None:
    machine.make_venv()
    machine.add_torch(cuda=cuda)
    machine.add_command("nvidia-smi", f"echo 'NVIDIA GeForce RTX 3090, {driver}'")

    done = machine.install()

    assert done.returncode == 0, done.stderr
    assert f"NVIDIA GeForce RTX 3090, driver {driver}" in done.stdout
    assert "torch 2.13.0" in done.stdout
    assert said in done.stdout
    assert "next: " in done.stdout


def test_a_usable_card_is_named_without_a_warning(machine: Machine) -> None:
    machine.make_venv()
    machine.add_torch(usable=True)
    machine.add_command("nvidia-smi", "echo 'NVIDIA Stub, 580.95.05'")

    done = machine.install()

    assert "GPU 0: NVIDIA Stub, driver 580.95.05" in done.stdout
    assert "warning" not in done.stdout
    assert "below 8.0" not in done.stdout


def test_a_card_below_bf16_is_told_so(machine: Machine) -> None:
    machine.make_venv()
    machine.add_torch(usable=True, capability=(7, 5))
    machine.add_command("nvidia-smi", "echo 'NVIDIA Stub, 580.95.05'")

    assert "compute capability 7.5 is below 8.0" in machine.install().stdout


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def pins() -> dict[str, str]:
    """Package -> version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def imported_packages() -> set[str]:
    """The distributions whose modules hvlite's source imports, deferred imports included."""
    modules: set[str] = set()
    for file in (ROOT / "hvlite").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    modules -= set(sys.stdlib_module_names) | {"hvlite"}
    homes = packages_distributions()
    return {canonicalize_name(homes[module][0]) if module in homes else module for module in modules}


# Extras, imported where present: under the name of the module where the package is absent.
OPTIONAL = {"flash_attn", "flash-attn", "sageattention", "textual_image", "textual-image", "pillow"}


def test_the_declared_packages_are_the_imported_ones() -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in project()["dependencies"]}

    assert imported_packages() - OPTIONAL == declared


def test_every_requirement_is_pinned_inside_its_range() -> None:
    extras = project()["optional-dependencies"]
    tested = pins()

    for line in [*project()["dependencies"], *extras["dev"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), line


def test_the_wheel_carries_profiles_and_assets(tmp_path: Path) -> None:
    sources = (file for pattern in ("*.py", "*.css") for file in (ROOT / "hvlite").rglob(pattern))
    expected = {str(file.relative_to(ROOT)) for file in sources}
    expected |= {f"hvlite/profiles/{file.name}" for file in (ROOT / "profiles").glob("*.toml")}
    assets = (ROOT / "hvlite" / "assets").rglob("*")
    expected |= {str(file.relative_to(ROOT)) for file in assets if file.is_file()}

    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert expected <= set(archive.namelist())
