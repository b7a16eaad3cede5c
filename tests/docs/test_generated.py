"""The generated documentation is up to date and complete."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import lmrl
from lmrl.recipe import Recipe
from lmrl.recipe.document import read_yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "accelerate")


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = sys.modules["generate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return generate.generated()


@pytest.mark.parametrize(
    "name", ["reference/recipe.md", "reference/recipe.schema.json", "reference/cli.md", "llms.txt"]
)
def test_file_is_up_to_date(name, files):
    assert (DOCS / name).read_text() == files[name], "run: python docs/generate.py"


def test_every_page_is_in_the_site():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = [
        page for part in nav for pages in part.values() for page in ([pages] if isinstance(pages, str) else pages)
    ]
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_reference_has_a_row_for_every_top_level_key(files):
    text = files["reference/recipe.md"]
    assert all(f"| `{name}` |" in text for name in Recipe.model_fields)


def test_command_reference_names_options_and_defaults():
    text = generate.commands()
    assert "| `--output`, `-o` PATH | Run folder (default: under runs/) |" in text
    assert "lmrl reward check [OPTIONS] REWARD" in text
    assert "| `--timeout` NUMBER | Seconds that a call may take (default: 30.0) |" in text


def test_api_page_lists_the_public_names():
    table = re.findall(r"^\| (`.+?) \|", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(name for cell in table for name in re.findall(r"`(\w+)`", cell)) == sorted(lmrl.__all__)


@pytest.fixture(scope="module")
def validate():
    jsonschema = pytest.importorskip("jsonschema")
    schema = generate.json_schema()
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema).validate


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_schema_accepts_shipped_recipes(path, validate):
    validate(read_yaml(path).data)


@pytest.mark.parametrize("section", [{"objective": {"name": "ppo", "lamda": 0.9}}, {"source": {"nome": "rollouts"}}])
def test_schema_rejects_unknown_keys(section, validate):
    jsonschema = pytest.importorskip("jsonschema")
    recipe = {"model": {"path": "x"}, "objective": {"name": "ppo"}} | section
    with pytest.raises(jsonschema.ValidationError):
        validate(recipe)
