"""What must be true of the repository's files as a whole."""

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import labtrain
from labtrain import __version__
from labtrain.bootstrap import PYTHONS
from tests.conftest import ROOT, need, skip_or_fail
from tests.support.workflows import BEFORE_CHECKOUT, OF_AN_EXPERIMENT, WORKFLOWS, jobs, run_lines

# Written so that this file does not name them.
REGISTRIES = [
    "python" + "hosted.org",
    "py" + "pi.org",
    "npm" + "js.org",
    "deb." + "deb" + "ian.org",
    "pytorch.org/" + "whl",
]


def grep(pattern: str) -> list[str]:
    need("git", "git")
    command = ["git", "grep", "-lIE", pattern, "--", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode > 1:
        skip_or_fail("not a git repository")
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
    need("git", "git")
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


def test_every_module_that_the_design_names_exists() -> None:
    """`training/fit` in docs/why/design.md stands for src/labtrain/training/fit.py, `training/sharded` for a package."""
    text = (ROOT / "docs/why/design.md").read_text()
    names = set(re.findall(r"`([a-z_]+/[a-z_/]+)`", text))
    assert len(names) > 5
    for name in names:
        assert any((ROOT / "src/labtrain" / f"{name}{end}").exists() for end in (".py", "/__init__.py")), name


def test_the_design_names_the_public_names() -> None:
    listed = re.search(r"`labtrain.__all__` has the public names: ([^.]*)\.", (ROOT / "docs/why/design.md").read_text())
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == set(labtrain.__all__)


def test_contributing_names_the_packages_that_the_tests_need() -> None:
    """Those of .ci/packages, which installs each package that a test asks for with `need`."""
    script = (ROOT / ".ci/packages").read_text()
    installed = {name for names in re.findall(r"packages\+=\((.*)\)", script) for name in names.split()}
    listed = re.search(r"They are Debian's ([\s\S]*?)\. `make test-real`", (ROOT / "CONTRIBUTING.md").read_text())
    assert listed is not None
    assert set(re.split(r",\s+|\s+and\s+", listed[1])) == installed
    tests = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    needed = {name for text in tests for name in re.findall(r'\bneed\("[\w-]+", "([\w.+-]+)"\)', text)}
    assert len(needed) > 5
    assert needed <= installed


MOST_ANY = 150
MOST_LINES = 45


def nodes_of_src() -> Iterator[tuple[str, ast.AST]]:
    """Yield the file and each node of the code."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            yield str(path.relative_to(ROOT)), node


def test_any_is_rare() -> None:
    """mypy checks nothing about a value of type Any."""
    names = ((path, getattr(node, "id", getattr(node, "attr", None))) for path, node in nodes_of_src())
    found = Counter(path for path, name in names if name == "Any")  # Any or typing.Any
    assert found.total() <= MOST_ANY, found.most_common(10)


def test_a_function_fits_on_a_page() -> None:
    """Its docstring counts, its decorators do not."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    functions = ((path, node) for path, node in nodes_of_src() if isinstance(node, kinds))
    lines = {f"{path}:{node.lineno} {node.name}": 1 + (node.end_lineno or 0) - node.lineno for path, node in functions}
    assert {name: number for name, number in lines.items() if number > MOST_LINES} == {}


each_job = pytest.mark.parametrize("job", [job for _, job in jobs()], ids=[name for name, _ in jobs()])
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


@each_workflow
def test_a_workflow_may_only_read_and_runs_once_at_a_time(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow["concurrency"]) == {"group", "cancel-in-progress"}
    assert True in workflow  # `on:`, which YAML 1.1 reads as a boolean


@each_job
def test_a_job_has_a_time_limit_and_keeps_no_token(job: dict[str, Any]) -> None:
    assert 0 < job["timeout-minutes"] <= 120
    assert "permissions" not in job
    (checkout,) = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
    assert checkout["with"]["persist-credentials"] is False


def test_each_action_is_pinned_by_its_commit() -> None:
    """By 40 hex digits, which cannot be moved as a tag can; the release stands beside them, one for each action.

    Also in the workflows that `labtrain new` writes.
    """
    pins: dict[str, set[str]] = {}
    assert len(OF_AN_EXPERIMENT) == 2
    for path in WORKFLOWS + OF_AN_EXPERIMENT:
        for line in re.findall(r"^.*\buses:.*$", path.read_text(), re.MULTILINE):
            found = re.fullmatch(r"\s*(?:- )?uses: ([\w./-]+)@([0-9a-f]{40} # v\d+\.\d+\.\d+)", line)
            assert found is not None, f"{path.name}: {line}"
            pins.setdefault(found[1], set()).add(found[2])
    assert pins
    assert {name: found for name, found in pins.items() if len(found) > 1} == {}


def test_a_workflow_runs_what_the_makefile_has() -> None:
    """Whoever reads a red job can type the same line."""
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line.split() for line in run_lines() if line != BEFORE_CHECKOUT]
    assert [line for line in lines if line[0] != "make" or len(line) != 2 or line[1] not in targets] == []
    assert {line[1] for line in lines} == {"check", "docs", "test", "test-real", "packages"}


def test_the_workflows_test_every_python_and_the_image_that_there_is() -> None:
    found = dict(jobs())
    (first, first_minor), (last, below) = PYTHONS
    assert first == last == 3
    assert found["ci.yml: test"]["strategy"]["matrix"]["python"] == [
        f"3.{minor}" for minor in range(first_minor, below)
    ]
    image = found["nightly.yml: test-real"]["container"]["image"]
    assert f"ARG BASE={image}\n" in (ROOT / "containers" / "Containerfile").read_text()


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_an_issue_form_is_one_that_github_shows(name: str) -> None:
    """Its keys and types of fields are those of GitHub's syntax for issue forms, and each field has a name of its own."""
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert set(form) == {"name", "description", "labels", "body"}
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes", "markdown")
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert field["attributes"]["label"]
        assert (field["type"] == "dropdown") == ("options" in field["attributes"])
        assert all(isinstance(option, str) for option in field["attributes"].get("options", []))
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    if name == "bug_report":
        assert {"receipt", "doctor"} <= set(ids)


def test_dependabot_looks_after_the_actions_and_the_packages() -> None:
    config = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())
    assert config["version"] == 2
    assert [each["package-ecosystem"] for each in config["updates"]] == ["github-actions", "pip"]
    assert all(each["directory"] == "/" and each["schedule"]["interval"] for each in config["updates"])


def test_the_citation_has_the_version_and_the_keys_of_its_schema() -> None:
    """Citation File Format 1.2.0, https://github.com/citation-file-format: what is required, and nothing unknown."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == __version__, "make release writes it"
    assert {"authors", "cff-version", "message", "title"} <= set(citation)
    assert set(citation) <= {
        "abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords",
        "license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact",
        "repository-code", "title", "type", "url", "version",
    }  # fmt: skip
    assert citation["type"] in ("software", "dataset")
    assert all(set(author) <= {"name", "website", "email", "orcid", "alias"} for author in citation["authors"])


def test_no_test_is_skipped_without_a_word_under_ci() -> None:
    """A missing program skips through `need` or `skip_or_fail` of conftest.py, which fail where CI=true."""
    pattern = re.compile(r"pytest\.(skip|importorskip)\b|mark\.skip(if)?\b|unittest\.skip|allow_module_level")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    (only,) = found
    assert only.startswith("tests/conftest.py:")
    assert 'os.environ.get("CI") == "true" else' in only


def test_no_test_sleeps_but_for_a_reason() -> None:
    """A test waits for a condition by tests/support/waiting.py. `# fixed:` says why a line sleeps for a fixed time."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\bsleep[ (]", line) and "  # fixed: " not in line and path != Path(__file__)
    ]
    assert found == []
