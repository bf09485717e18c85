"""Phrases that readers had to read twice do not come back. CONTRIBUTING.md: write plain English."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# What people read. Of Python: strings, docstrings and comments.
READ = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "docs/**/*.md",
    "mkdocs.yml",
    "docs/reference.py",
    "src/**/*.py",
    "src/**/*.j2",
    "src/labtrain/conf/**/*.yaml",
    "template/*/README.md",
    "template/*/conf/**/*.yaml",
    "template/*/Makefile",
    "template/*/*.sh",
    "template/*/*.sbatch",
    "template/*/*.py",
    "template/*/.github/**/*.yml",
    "Makefile",
    "containers/*.sh",
    ".ci/*",
    ".github/**/*.yml",
]
# The pattern, and what to write instead.
PHRASES = {
    r"\b(is|are) wanted\b": "must be",
    r"(?<=\S )\bwanted\b(?=[.;,:])": "expected, target",
    r"\blooks? away\b": "skip",
    r"\bthese words\b": "quote the message",
    r"\bdoes not know why\b": "lost contact with",
    r"\bpromise \d": "say what is promised: results do not depend on the number of devices",
    r"\bas (it|they) (is|are|stands?|lies?)\b(?=[.,;:]|$)": "unchanged, plainly",
    r"(?<=\S )(?<!each )(?<!after the )(others?|so)[.:](?=\s|$)": "different",
    r"\bso many\b": "N",
    r"\bgo(es)? on (from|with|where|although|as|again)\b": "resume, continue",
    r"\bwhere there (is|are|was|were) (none|one|no)\b": "if there is",
    r"\b(is|are) no (cause|place|proof|part|store|loop|mean|worker)\b": "is not a",
    r"\bbecame of\b": "result",
    r"\banew\b": "again",
    r"\bheld against\b": "compared with",
    r"\bsaid aloud\b|\bis said\b|\bare said\b": "reported",
    r"\b(for|and not) (the|its) weights at the end\b|\bweights at the end\b": "final weights",
    r"\bmicro-batch": "shard",
    r"\bthat is theirs\b|\bof ours\b(?= is)": "ours",
    r"\btold apart\b": "distinguished",
    r"\bin silence\b": "without a message",
    r"\banother \w+ than\b|\bis another than\b": "different from",
    r"\bwhatever happens on the way\b": "even if it is interrupted",
    r", say\b(?=[:;,.)]|$)": "for example",
    r"\bof nobody\b": "unused",
    r"\b(is|are|was|were) (looked into|made up for)\b": "entered, made later",
    r"\bwhat (started|starts) (it|them)\b": "the launcher",
}


def lines(pattern: str) -> Iterator[tuple[Path, int, str]]:
    """Yield the lines of the files that match a pattern."""
    found = sorted(ROOT.glob(pattern))
    assert found, f"{pattern} names no file"
    for path in found:
        text = path.read_text()
        numbered = written(text) if path.suffix == ".py" else enumerate(text.splitlines(), 1)
        yield from ((path, number, line) for number, line in numbered)


def written(code: str) -> Iterator[tuple[int, str]]:
    """Yield the comments of a file and the lines of its strings; of an f-string its parts, joined by an ellipsis."""
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    parts = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(value) for value in node.values}
            text = "".join(str(value.value) if isinstance(value, ast.Constant) else "…" for value in node.values)
            yield node.lineno, text
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield from enumerate(node.value.splitlines(), node.lineno)


@pytest.mark.parametrize("pattern", READ)
def test_no_phrase_that_has_to_be_read_twice(pattern: str) -> None:
    """Each file says it in the words of the field."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}: write {instead!r}\n    {line.strip()}"
        for path, number, line in lines(pattern)
        for phrase, instead in PHRASES.items()
        if (match := re.search(phrase, line, re.IGNORECASE))
    ]
    assert not found, "\n".join(found)


def test_comments_are_read_as_strings_are() -> None:
    code = 'def f(x):\n    """One."""\n    return f"{x} two"  # three\n'
    assert sorted(written(code)) == [(2, "One."), (3, "# three"), (3, "… two")]


def test_the_phrases_are_found() -> None:
    """Today's sentences of the style guide, which this test is for."""
    for line in (
        "an integer of at least 1 is wanted",
        "warn says, off looks away",
        "what is planned is refused with these words",
        "ranks are gone, and this one does not know why",
        "(promise 3 is off)",
        "weights at the end: others",
        "train so many again; 0: none.",
        "the clone is left as it is.",
    ):
        assert any(re.search(phrase, line, re.IGNORECASE) for phrase in PHRASES), line
