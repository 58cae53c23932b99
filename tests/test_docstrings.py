"""What is public says what it takes and gives."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest

import rae
from rae.stages import models, training


def modules(package: ModuleType) -> list[str]:
    return [f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__)]


def public(module: ModuleType) -> Iterator[tuple[str, object]]:
    """The module itself, and its own functions, classes, methods and properties, by name."""
    yield module.__name__, module
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if name.startswith("_") or not own or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        yield name, value
        for member, found in vars(value).items() if inspect.isclass(value) else ():
            if not member.startswith("_") and (callable(found) or isinstance(found, property | classmethod)):
                yield f"{name}.{member}", found


@pytest.mark.parametrize("name", [*modules(models), *modules(training)])
def test_everything_public_has_a_docstring(name: str) -> None:
    found = public(importlib.import_module(name))
    # A dataclass without one gets its signature for a docstring.
    bare = [what for what, value in found if not value.__doc__ or value.__doc__.startswith(f"{what}(")]
    assert not bare


def test_the_python_api_has_docstrings_of_its_own() -> None:
    for name in rae.__all__:
        found = getattr(rae, name)
        assert found.__doc__, name
        assert found.__doc__ != getattr(type(found), "__doc__", None), name
