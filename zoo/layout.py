"""Where the shelves lie (`plugins`, `recipes`, `evals`): beside the package in a checkout, inside it once installed."""

from pathlib import Path


def shelf(name: str) -> Path:
    """The folder of one shelf (`"plugins"`, `"recipes"` or `"evals"`)."""
    package = Path(__file__).resolve().parent
    in_checkout = (package.parent / "pyproject.toml").is_file()
    return (package.parent if in_checkout else package) / name
