"""The text that the shipped base model learns from: the docstrings of Python's own standard library."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "pydoc_data", "test", "tests", "idle_test"}
_MAIL_ADDRESS = re.compile(r"[\w.+-]+@[\w-]+\.\w+")
_HELD_OUT_EVERY = 20


def standard_library() -> Path:
    """The folder that holds the running Python's standard library as source files."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(library: Path) -> list[Path]:
    """Every ``.py`` file of a library that is documentation for users rather than tests, in one fixed order.

    ``pydoc_data`` is left out because the demo fine-tunes on it, installed packages because they are not Python's.
    """
    relative = (path.relative_to(library) for path in library.rglob("*.py"))
    kept = (path for path in relative if _SKIPPED_FOLDERS.isdisjoint(path.parts[:-1]))
    return [library / path for path in sorted(kept, key=lambda path: path.parts)]


def is_held_out(path: Path, library: Path) -> bool:
    """Whether a source file belongs to the twentieth of the library that is never trained on.

    Whole files are held out, chosen by a hash of their name, so that a module's docstrings never lie on both sides.
    """
    name = path.relative_to(library).as_posix()
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % _HELD_OUT_EVERY == 0


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a source file's module, classes and functions, cleaned of indentation, in source order.

    A file that Python itself cannot parse has none; a docstring that holds a mail address is skipped.
    """
    try:
        with warnings.catch_warnings():  # where warnings are errors, a stray "\\d" would make a file unreadable
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return
    holders = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    holders.sort(key=lambda node: getattr(node, "lineno", 0))
    for node in holders:
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
        if text and not _MAIL_ADDRESS.search(text):
            yield text


def corpus(library: Path | None = None) -> tuple[list[str], list[str]]:
    """Collect the whole corpus, each text once.

    Args:
        library: Folder to read; the running Python's standard library if not given.

    Returns:
        ``(train, held_out)``. A text of the training files is never repeated among the held-out ones.
    """
    library = library or standard_library()
    paths = source_files(library)
    train = _unique(text for path in paths if not is_held_out(path, library) for text in docstrings(path))
    seen = set(train)
    held_out = _unique(text for path in paths if is_held_out(path, library) for text in docstrings(path))
    return train, [text for text in held_out if text not in seen]


def corpus_sha256(texts: list[str]) -> str:
    """A hash that names a corpus: of the texts in order, each preceded by its length in bytes."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()


def _unique(texts: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(texts))
