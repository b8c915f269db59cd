"""What is installed and imported."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[1]


def modules_after(statement):
    program = f"import sys, json; {statement}; print(json.dumps(sorted(name.split('.')[0] for name in sys.modules)))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return set(json.loads(output.splitlines()[-1]))


def test_importing_the_package_imports_nothing_heavy():
    assert not {"torch", "transformers", "trl"} & modules_after("import trl_dpg")


def test_the_trainer_imports_no_package_that_trls_own_does_not():
    more = modules_after("from trl_dpg import DPGTrainer") - modules_after("from trl import GRPOTrainer")
    assert {name for name in more if not name.startswith(("trl_dpg", "_", "encodings"))} <= {"difflib", "bitsandbytes"}


def test_the_wheel_holds_the_package_and_no_tests(tmp_path):
    source = tmp_path / "source"  # setuptools builds in the source tree
    shutil.copytree(ROOT / "trl_dpg", source / "trl_dpg")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"trl_dpg"} and "trl_dpg/py.typed" in names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "trl_dpg").rglob("*.py")}
    modules |= {f"trl_dpg/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*.py")}  # it has a link
    assert modules == {name for name in names if name.endswith(".py")}
