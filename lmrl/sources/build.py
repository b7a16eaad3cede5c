"""The source that a recipe names."""

from __future__ import annotations

from lmrl.errors import LmrlError, PluginError
from lmrl.plugins import registry
from lmrl.sources.base import Source, SourceRequest


def build_source(wanted: SourceRequest) -> Source:
    """The source of a stage's recipe."""
    name = wanted.recipe.source.name
    cls = registry.load("source", name, "source.name")
    if not (isinstance(cls, type) and issubclass(cls, Source)):
        raise PluginError(f"source.name: '{name}' is not an lmrl.Source")
    try:
        return cls.build(wanted)
    except (LmrlError, MemoryError):
        raise
    except Exception as error:
        if name in registry.SHIPPED["source"]:
            raise
        raise PluginError(f"source: '{name}' cannot be made: {type(error).__name__}: {error}") from error
