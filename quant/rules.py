"""Which layers of a component are quantised: data in the TOML files beside this one, one for each component."""

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from step1x.quant.schemes import SCHEMES, Scheme

__all__ = ["COMPONENTS", "Component", "Rules", "rules"]

# dit and folded are parts of the transformer, text and vision of the text model: names are theirs.
Component = Literal["dit", "folded", "text", "vision"]
COMPONENTS: tuple[Component, ...] = get_args(Component)


@dataclass(frozen=True, slots=True)
class Rules:
    """A scheme and the layers that it is for: patterns of layer names in which * stands for anything."""

    given: Scheme
    layers: tuple[str, ...]

    def scheme(self, name: str) -> Scheme:
        """The scheme of a layer by its name in the module, such as single_blocks.3.linear1."""
        return self.given if any(fnmatchcase(name, pattern) for pattern in self.layers) else "plain"


@cache
def rules(component: Component, scheme: Scheme) -> Rules:
    """The rules of a component. Raises ValueError for a component or a scheme that does not exist."""
    if component not in COMPONENTS:
        raise ValueError(f"unknown component {component!r}; known: {', '.join(COMPONENTS)}")
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    found = tomllib.loads((Path(__file__).parent / f"{component}.toml").read_text(encoding="utf-8"))
    return Rules(scheme, tuple(found["layers"]))
