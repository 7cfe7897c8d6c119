"""What each module drags in, seen in fresh processes, where deferred imports count too.

The contracts of pyproject.toml say the same about the source text; a static graph cannot see `importlib` or a
package that imports torch by itself.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hvlite"

# The torch-free modules of the design, and `cli`, which imports torch inside commands only. Absent ones come
# later.
LIGHT = (
    "hvlite",
    "hvlite.errors",
    "hvlite.paths",
    "hvlite.telemetry",
    "hvlite.dims",
    "hvlite.events",
    "hvlite.profile",
    "hvlite.request",
    "hvlite.memory.decode_ladder",
    "hvlite.memory.exact_needs",
    "hvlite.memory.plan",
    "hvlite.jobs.job",
    "hvlite.jobs.supervisor",
    "hvlite.jobs.worker",
    "hvlite.cli_work",
    "hvlite.jobs.store",
    "hvlite.jobs.batch",
    "hvlite.jobs.eta",
    "hvlite.jobs.prompt_files",
    "hvlite.tui",
    "hvlite.tui.app",
    "hvlite.formats",
    "hvlite.metadata",
    "hvlite.weights.fetch",
    "hvlite.weights.fetched",
    "hvlite.weights.layout",
    "hvlite.weights.mounts",
    "hvlite.weights.published",
    "hvlite.disk",
    "hvlite.memory.rates",
    "hvlite.progress",
    "hvlite.cli_flags",
    "hvlite.cli_machine",
    "hvlite.cli_models",
    "hvlite.cli_report",
    "hvlite.report",
    "hvlite.report.markup",
    "hvlite.cli",
)
HEAVY = (
    "accelerate",
    "av",
    "bitsandbytes",
    "diffusers",
    "numpy",
    "optimum",
    "safetensors",
    "torch",
    "transformers",
)

# Imports the modules one after the other and prints the first one that brings each heavy package.
FIND_CULPRITS = """
import importlib, json, sys
modules, heavy = json.loads(sys.argv[1])
culprits = {}
for module in modules:
    importlib.import_module(module)
    for name in heavy:
        if name in sys.modules:
            culprits.setdefault(name, module)
print(json.dumps(culprits))
"""

# Imports the large libraries once, then each module in a forked child that has seen none of hvlite: as good
# as a fresh process each, in a fraction of the time.
IMPORT_ALONE = """
import importlib, json, os, sys
for library in ("torch", "transformers", "av"):
    importlib.import_module(library)
for module in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(module)
        except BaseException as error:
            print(f"{module}: {error!r}", flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status != 0:
        print(f"{module}: ended with status {status}", flush=True)
"""


def modules_present() -> list[str]:
    """Every module of the package, by its dotted name."""
    names = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def run_python(script: str, argument: object) -> str:
    """Run `script` in a fresh interpreter in the checkout -> what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(argument)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_front_ends_and_arithmetic_leave_the_heavy_libraries_alone() -> None:
    present = modules_present()
    light = [module for module in LIGHT if module in present]
    assert "hvlite" in light

    assert json.loads(run_python(FIND_CULPRITS, (light, HEAVY))) == {}


def test_a_worker_that_goes_on_with_a_clip_does_without_encoders() -> None:
    assert json.loads(run_python(FIND_CULPRITS, (["hvlite.jobs.render"], ["transformers"]))) == {}


def test_each_module_imports_on_its_own() -> None:
    assert run_python(IMPORT_ALONE, modules_present()) == ""


def sql_in(file: Path) -> list[str]:
    """The strings of a source file that are SQL."""
    words = re.compile(
        r"\s*(SELECT .* FROM|INSERT INTO|UPDATE \w+ SET|DELETE FROM|CREATE TABLE|PRAGMA|BEGIN IMM)", re.S
    )
    strings = (node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant))
    return [text for text in strings if isinstance(text, str) and words.match(text)]


def test_only_the_store_speaks_sql() -> None:
    store = PACKAGE / "jobs" / "store"
    speaking = {file for file in PACKAGE.rglob("*.py") if sql_in(file)}
    assert len(speaking) > 4
    assert {file for file in speaking if store not in file.parents} == set()
