"""Where data lies: texts, gates and profiles that come with the package, and the user's cache."""

from __future__ import annotations

from pathlib import Path

from so8tqc.errors import DataError

_PACKAGE = Path(__file__).parent


def repository_root() -> Path | None:
    """The checkout this package runs from, or None when it is installed as a wheel."""
    root = _PACKAGE.parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / "data").is_dir() else None


def package_file(name: str) -> Path:
    """A file that lies beside the package's own modules, wherever its reader stands."""
    return _PACKAGE / name


def data_file(name: str) -> Path:
    """A file of ``data/``: from the checkout, or from the installed wheel.

    Raises:
        DataError: there is no such file.
    """
    root = repository_root()
    path = (root / "data" if root else _PACKAGE / "data") / name
    if not path.is_file():
        raise DataError("the package has no such data file", where=name)
    return path


def user_cache() -> Path:
    """The user's cache directory for what so8tqc makes once; made if missing."""
    from platformdirs import user_cache_path

    return user_cache_path("so8tqc", ensure_exists=True)
