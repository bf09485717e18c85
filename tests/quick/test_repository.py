"""What must be true of the repository's files as a whole."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Written so that this file does not name them.
REGISTRIES = [
    "python" + "hosted.org",
    "py" + "pi.org",
    "npm" + "js.org",
    "deb." + "deb" + "ian.org",
    "pytorch.org/" + "whl",
]


def grep(pattern: str) -> list[str]:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    command = ["git", "grep", "-lIE", pattern, "--", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode > 1:
        pytest.skip("not a git repository")
    return done.stdout.split()


@pytest.mark.parametrize("host", REGISTRIES)
def test_no_file_names_the_host_of_a_package_registry(host: str) -> None:
    """A lock pins bytes, not hosts: a lab behind a mirror installs the very same."""
    assert grep(re.escape(host)) == []


def test_no_file_holds_a_path_of_somebodys_machine() -> None:
    assert grep("/ho" + r"me/[a-z]+/|/Us" + r"ers/|/ro" + r"ot/\.") == []


def test_the_readme_names_the_commands_that_exist() -> None:
    from labtrain.cli import main

    text = (ROOT / "README.md").read_text()
    for command in main.commands:
        assert f"labtrain {command}" in text, command


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_first_page_defines_the_words() -> None:
    """README.md and docs/index.md say what a run, a receipt and a shard are."""
    for page, words in (("README.md", "run receipt shard"), ("docs/index.md", "run receipt trail shard store")):
        text = (ROOT / page).read_text()
        for word in words.split():
            assert re.search(rf"\*\*{word}\*\* (is|\|)", text), f"{page}: {word}"


def pages() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]


def test_every_link_leads_somewhere() -> None:
    """A link of a page names a file and, behind #, a heading of it."""
    for page in pages():
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, heading = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), f"{page.relative_to(ROOT)}: {target}"
            if heading:
                headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                assert heading in {
                    re.sub(r"[^\w -]", "", text).strip().lower().replace(" ", "-") for text in headings
                }, f"{page.relative_to(ROOT)}: {target}"


def test_every_page_that_a_file_names_exists() -> None:
    """Hints of errors, comments and tests name pages of docs/."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    command = ["git", "grep", "-noIE", r"(^|[^/.a-z])docs/[a-z/-]+\.md", "--", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        assert (ROOT / f"docs/{line.rpartition('docs/')[2]}").exists(), line


def test_every_file_of_code_that_a_page_names_exists() -> None:
    for page in [*pages(), *sorted(ROOT.glob("template/*/README.md"))]:
        for name in re.findall(
            r"`((?:src|tests/(?:quick|real|full|support)|benchmarks)/[\w/.-]+\.\w+)`?", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.relative_to(ROOT)}: {name}"
