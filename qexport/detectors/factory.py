"""Run a detector factory of the user's, from a file or a package, and leave the interpreter as it was.

This runs the user's code. Whatever it raises becomes a CheckpointError that shows their line.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from torch import nn

from qexport.errors import CheckpointError

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def build_from_file(path: Path, name: str, source: str) -> tuple[object, object]:
    """Run function `name` of the file `path`; the file's folder can be imported from meanwhile.

    Returns:
        What the function returns, and the file's `CLASSES` (None where it has none).

    Raises:
        CheckpointError: no such file or function, arguments needed, or the code fails.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such factory file. Check the path given with --model.")
    path = path.resolve()
    # A name of its own: the user's model.py must not become the `model` of anyone else.
    module_name = f"qexport_factory_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise CheckpointError(f"{path}: Python cannot load this file as a module. Give a .py file.")
    module = importlib.util.module_from_spec(spec)
    with _importable(path.parent):
        sys.modules[module_name] = module  # dataclasses and annotations look their module up here
        try:
            with _user_code(source, path.parent):
                spec.loader.exec_module(module)
            return _call_factory(module, name, source, path.parent), getattr(module, "CLASSES", None)
        finally:
            del sys.modules[module_name]


def build_from_package(place: str, name: str, source: str) -> tuple[object, object]:
    """Run function `name` of the module `place`; the current folder can be imported from meanwhile.

    Returns:
        What the function returns, and the module's `CLASSES` (None where it has none).

    Raises:
        CheckpointError: no such module or function, arguments needed, or the code fails.
    """
    folder = Path.cwd()
    with _importable(folder):
        try:
            found = importlib.util.find_spec(place) is not None
        except (ImportError, ValueError):  # a parent package is missing, or the name is not one of a module
            found = False
        except Exception as error:  # a parent package's own code
            raise CheckpointError(_explain_failure(error, source, folder)) from error
        if not found:
            raise CheckpointError(
                f"{source}: there is no Python module {place!r} in this environment or in {folder}. "
                "Install it, or give the file itself: path/to/file.py:function."
            )
        with _user_code(source, folder):
            module = importlib.import_module(place)
        home = Path(module.__file__).parent if module.__file__ else folder
        return _call_factory(module, name, source, home), getattr(module, "CLASSES", None)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the user's code import what lies in `folder`, and leave `sys.path` and `sys.modules` as they were.

    Packages that the code imports from elsewhere (torch, timm) stay: dropping them would break them.
    """
    path_before, modules_before = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path_before
        elsewhere = [Path(entry or ".").resolve() for entry in path_before]
        for name in set(sys.modules) - modules_before:
            home = _home_of(sys.modules[name])
            # What the path of before reaches (an environment inside the folder) is not the user's factory.
            if home and _is_under(home, folder) and not any(_is_under(home, entry) for entry in elsewhere):
                del sys.modules[name]


def _home_of(module: ModuleType) -> Path | None:
    """Return where a module was read from; a package without `__init__.py` has a folder only."""
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    return Path(file) if file else None


def _is_under(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


@contextmanager
def _user_code(source: str, folder: Path) -> Iterator[None]:
    """Turn whatever the user's code raises into a CheckpointError that shows their line."""
    try:
        yield
    except (Exception, SystemExit) as error:  # any code may stand there; an interrupt passes through
        raise CheckpointError(_explain_failure(error, source, folder)) from error


def _explain_failure(error: BaseException, source: str, folder: Path) -> str:
    if isinstance(error, SyntaxError):
        text = (error.text or "").strip()
        place = f"{error.filename}, line {error.lineno}"
        return f"{source}: syntax error in {place}: {error.msg}: {text!r}. Correct the file."
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        frame
        for frame in frames
        if _is_under(Path(frame.filename), folder) and "site-packages" not in frame.filename
    ]
    frame = (theirs or frames)[-1]
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    fix = "Correct the factory"
    if isinstance(error, ModuleNotFoundError):
        fix = f"Install {error.name} in this environment, or put it beside the file"
    return (
        f"{source}: the factory's code raised {what}\n"
        f"  {frame.filename}, line {frame.lineno}, in {frame.name}: {frame.line}\n{fix}."
    )


def _call_factory(module: ModuleType, name: str, source: str, folder: Path) -> object:
    factory = getattr(module, name, None)
    if factory is None:
        functions = [
            key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"
        ]
        raise CheckpointError(
            f"{source}: there is no function {name!r} in {module.__file__}. "
            f"It has {', '.join(functions) or 'no functions'}."
        )
    if isinstance(factory, nn.Module) or not callable(factory):
        raise CheckpointError(
            f"{source}: {name} is a {type(factory).__name__}, expected a function without arguments that "
            f"returns the detector. Write one: def build(): return {name}."
        )
    with _user_code(source, folder):
        signature = inspect.signature(factory)
    needed = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty and parameter.kind not in _VARIADIC
    ]
    if needed:
        raise CheckpointError(
            f"{source}: {name}{signature} needs {', '.join(needed)}, but the factory is called without "
            f"arguments. Write one that gives them: def build(): return {name}(...)."
        )
    with _user_code(source, folder):
        built: object = factory()
    return built
