"""Sections of a recipe that name custom code: checked against that code's own schema when it is loaded."""

from __future__ import annotations

from lmrl.errors import PluginError, RecipeError
from lmrl.plugins import registry
from lmrl.recipe import CustomObjective, CustomSource, Recipe, Section
from lmrl.recipe.document import Document
from lmrl.recipe.validation import validate

CUSTOM: dict[registry.Kind, type[CustomObjective | CustomSource]] = {
    "objective": CustomObjective,
    "source": CustomSource,
}


def with_custom_options(recipe: Recipe) -> Recipe:
    """The recipe with each custom section replaced by an instance of its class's `Options`, so that its checks, rates and
    estimates apply as for shipped code. Raises PluginError for code that cannot be loaded, RecipeError for a mistake."""
    for section, custom in CUSTOM.items():
        given = getattr(recipe, section)
        if type(given) is custom:
            recipe = recipe.model_copy(update={section: custom_options(section, given)})
    for mistake in recipe.mistakes():
        raise RecipeError(mistake)
    return recipe


def custom_options(section: registry.Kind, given: CustomObjective | CustomSource) -> Section:
    """The section checked against its class's `Options`; unchanged if that class has none."""
    cls = registry.load(section, given.name, f"{section}.name")
    schema = getattr(cls, "Options", None)
    if schema is None:
        return given
    base = CUSTOM[section].__mro__[1]
    if not (isinstance(schema, type) and issubclass(schema, base) and issubclass(schema, Section)):
        raise PluginError(f"{section}.name: Options of '{given.name}' is no {base.__name__}")
    return validate(schema, Document({"name": given.name, **given.options}), prefix=(section,))
