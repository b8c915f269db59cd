"""Prints pip constraints that pin each lower bound of pyproject.toml: `torch>=2.11` becomes `torch==2.11`."""

import pathlib
import tomllib

from packaging.requirements import Requirement


project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"].values()
for line in [*project["dependencies"], *(line for extra in extras for line in extra)]:
    requirement = Requirement(line)
    for specifier in requirement.specifier:
        if specifier.operator == ">=":
            print(f"{requirement.name}=={specifier.version}")

# datasets' own lower bound. Newer versions need NumPy 2 when they are imported, but do not declare it.
print("pyarrow==21.0.0")
