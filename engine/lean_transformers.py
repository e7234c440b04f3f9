"""The import of transformers' models without torchao."""

import sys

__all__ = ["import_models"]


def import_models() -> None:
    """Imports what all of transformers' models need, once.

    Where torchao is installed, that import would import it for a format that is not read here: a second of each start,
    and warnings on stderr. So it is told that there is none; whoever asks transformers later gets the truth.
    """
    if "transformers.modeling_utils" in sys.modules or "torchao" in sys.modules:
        return
    sys.modules["torchao"] = None  # type: ignore[assignment]  # Python's own way to say so
    try:
        import transformers.modeling_utils  # noqa: F401
        from transformers.utils.import_utils import is_torchao_available
    finally:
        del sys.modules["torchao"]
    is_torchao_available.cache_clear()
