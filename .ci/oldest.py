"""Prints a pin for the lower end of every range in pyproject.toml, as a constraints file.

    python3 .ci/oldest.py > oldest.txt && pip install -c oldest.txt -e '.[dev]'

torch stays at its newest release inside the range: of 2.11 and 2.12 the package index has only CUDA builds of several
gigabytes, for a machine without a GPU.
"""

import re
import sys
import tomllib
from pathlib import Path

TORCH = "torch==2.13.0"
PROJECT = Path(__file__).parents[1] / "pyproject.toml"
NAME = re.compile(r"[A-Za-z0-9._-]+")
LOWEST = re.compile(r">=\s*([0-9.]+)")


def pins(requirements: list[str]) -> list[str]:
    """`name==lowest` of each requirement with a lower end, once each, and torch's own."""
    found = {}
    for requirement in requirements:
        name, lowest = NAME.match(requirement), LOWEST.search(requirement)
        if name and lowest:
            pin = f"{name[0]}=={lowest[1]}"
            if found.setdefault(name[0], pin) != pin:
                raise SystemExit(f"{PROJECT.name}: two lower ends of {name[0]}: {found[name[0]]} and {pin}")
    return sorted({**found, "torch": TORCH}.values())


def requirements(path: Path = PROJECT) -> list[str]:
    """Of the project and of all its extras."""
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]


if __name__ == "__main__":
    sys.stdout.write("\n".join(pins(requirements())) + "\n")
