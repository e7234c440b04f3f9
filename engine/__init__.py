"""step1x.engine: load a Step1X-Edit model and edit pictures with it.

Names are imported on first use, so that the command line can print its help without importing torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from step1x.engine.pipeline import Engine, edit
    from step1x.engine.request import Edit

__all__ = ["Edit", "Engine", "edit"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from step1x.engine import pipeline

    return getattr(pipeline, name)
