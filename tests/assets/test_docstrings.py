"""The corpus of the base model."""

from pathlib import Path

import pytest

from splitfed.assets.docstrings import corpus, corpus_sha256, docstrings, is_held_out, source_files, standard_library


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_module_class_and_function_docstrings_are_taken_in_source_order_and_nothing_else(tmp_path: Path) -> None:
    source = (
        '"""The module."""\n\n# a comment\nVALUE = "a string"\n\n\n'
        'def early():\n    """A function.\n\n    With more:\n        An indented line.\n    """\n'
        '    "not a docstring"\n\n\n'
        'class Thing:\n    """A class."""\n\n    async def method(self):\n        """A method."""\n'
    )
    path = write(tmp_path, "module.py", source)
    assert list(docstrings(path)) == [
        "The module.",
        "A function.\n\nWith more:\n    An indented line.",
        "A class.",
        "A method.",
    ]


def test_a_docstring_with_a_mail_address_is_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, "module.py", '"""Written by a.person@example.org."""\ndef f():\n    """Kept."""\n')
    assert list(docstrings(path)) == ["Kept."]


@pytest.mark.filterwarnings("error")
def test_a_file_with_a_stray_escape_is_read_where_warnings_are_errors(tmp_path: Path) -> None:
    assert list(docstrings(write(tmp_path, "module.py", '"""Kept."""\nPATTERN = "\\d"\n'))) == ["Kept."]


def test_a_file_that_does_not_parse_has_no_docstrings(tmp_path: Path) -> None:
    assert list(docstrings(write(tmp_path, "module.py", '"""Text."""\nprint "two"\n'))) == []


def test_tests_installed_packages_and_the_language_reference_are_left_out(tmp_path: Path) -> None:
    kept = [write(tmp_path, name, "") for name in ("a.py", "b/c.py", "b/test.py")]
    for name in ("test/a.py", "b/tests/c.py", "site-packages/d/e.py", "pydoc_data/topics.py"):
        write(tmp_path, name, "")
    assert source_files(tmp_path) == kept


def test_no_text_is_in_the_corpus_twice_or_on_both_sides(tmp_path: Path) -> None:
    for index in range(60):
        write(tmp_path, f"m{index}.py", f'"""Module {index}."""\ndef f():\n    """The same everywhere."""\n')
    train, held_out = corpus(tmp_path)
    assert {is_held_out(tmp_path / f"m{index}.py", tmp_path) for index in range(60)} == {True, False}
    assert len(train) + len(held_out) == 61
    assert len({*train, *held_out}) == 61
    assert "The same everywhere." in train


def test_the_hash_of_a_corpus_depends_on_every_text_and_their_borders() -> None:
    assert corpus_sha256(["ab", "c"]) != corpus_sha256(["a", "bc"])
    assert corpus_sha256(["ab", "c"]) == corpus_sha256(["ab", "c"])


def test_the_standard_library_is_found_without_its_language_reference() -> None:
    files = {path.relative_to(standard_library()).as_posix() for path in source_files(standard_library())}
    assert {"json/__init__.py", "argparse.py"} <= files
    assert not any(name.startswith(("pydoc_data/", "test/", "site-packages/")) for name in files)
