"""Finds what lies beside the package in a checkout, and inside it in a wheel: launch scripts,
recipes, sweeps, sites, train.py."""

from pathlib import Path

from .errors import ConfigError, did_you_mean

_SHIPPED = Path(__file__).with_name("shipped")  # setup.py puts it into the wheel
INSTALLED = _SHIPPED.is_dir()
FOLDER = _SHIPPED if INSTALLED else Path(__file__).parents[1]
RECIPES = FOLDER / "launch" / "recipes"
_RECIPE = "recipe:"


def file(name: str) -> Path:
    """The path that a user named: a file's, or that of the recipe NAME in `recipe:NAME`.

    Raises ConfigError for an unknown recipe.
    """
    if not name.startswith(_RECIPE):
        return Path(name)
    recipe = name.removeprefix(_RECIPE)
    known = {path.stem: path for path in RECIPES.glob("*.yaml")}
    if recipe not in known:
        hint = did_you_mean(recipe, known, "`dist-looksam recipes` lists them.", flag=_RECIPE)
        raise ConfigError(f"recipe must be one of `dist-looksam recipes`, got {recipe!r}; {hint}")
    return known[recipe]
