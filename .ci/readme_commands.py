"""Prints the set-up commands of README.md, a line each, as they stand there: those that make an environment."""

import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The one-line `sh` blocks that begin by making a virtual environment. Raises SystemExit unless there are two."""
    blocks = [block.strip() for block in SHELL.findall(text)]
    found = [block for block in blocks if block.startswith("python3 -m venv ")]
    if len(found) != 2 or any("\n" in block for block in found):
        raise SystemExit(f"{README.name}: {len(found)} set-up commands of one line; the README promises two")
    return found


if __name__ == "__main__":
    sys.stdout.write("\n".join(commands(README.read_text(encoding="utf-8"))) + "\n")
