"""Runs that older versions of labtrain trained, kept as they were: every command still reads them.

In tests/golden/old/runs.tar.xz, by the commit of labtrain:

    9bd916f  2026-11-25  config without speed, gpu_stats and init_from; manifests without a digest
    5bb262a  2026-11-25  config without init_from
    11d679c  2026-11-30  manifests have a digest, the checkpoint before, and marks of trail and history

In tests/golden/old/digits.tar.xz: 38c3d00, 2026-12-01, with repository and sources.

A change that makes this test fail breaks a promise of docs/guides/update.md: make the new key optional in
receipt.schema.json, or fill it where the record is read, after its digest was checked. When the form changes, add a run.
"""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import labtrain
from labtrain.base.errors import DamagedError
from labtrain.cli import main
from labtrain.record import receipt
from tests.conftest import ROOT
from tests.support.old import RUNS as OLD
from tests.support.old import unpack

RUNS = {
    "9bd916f": ("e146daed9be1", "9b759ee2b05e798039aad83185ce3b5951dfb7a7e81e5caf938d140662f5564f"),
    "5bb262a": ("190179f19519", "9b759ee2b05e798039aad83185ce3b5951dfb7a7e81e5caf938d140662f5564f"),
    "11d679c": ("f1dd292e8404", "d11e2c7899a54b848eab3791b1d2bad5f256d4fe2f1a3af981bf547cfdb3b9be"),
    "38c3d00": (OLD[0], "67fb0332a6e42b83f8c055e7221af65d786ca158ad6760761d2a7b7007213814"),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment of 38c3d00, with the runs of all versions."""
    root = unpack(tmp_path_factory.mktemp("old"))
    with tarfile.open(ROOT / "tests" / "golden" / "old" / "runs.tar.xz") as archive:
        archive.extractall(root / "runs", filter="data")
    return root


@pytest.fixture
def run_dir(request: pytest.FixtureRequest, kept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(kept)
    folder = request.param if request.param != "38c3d00" else "digits"
    return kept / "runs" / folder / RUNS[request.param][0]


def command(*words: str | Path) -> Result:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done


@pytest.mark.parametrize(("run_dir", "commit"), [(commit, commit) for commit in RUNS], indirect=["run_dir"])
def test_every_command_reads_an_old_run(run_dir: Path, commit: str, tmp_path: Path) -> None:
    run_id, digest = RUNS[commit]
    listed = json.loads(command("ls", run_dir.parent, "--json").stdout)
    found = {row["run"].rpartition("/")[2]: row for row in listed}[run_id]
    assert (found["status"], found["weights_digest"]) == ("complete", digest)

    done = command("diff", run_dir, ROOT / "tests" / "golden")
    assert done.exit_code == 1, done.output
    assert "final weights: different" in done.stdout

    page = tmp_path / "report.html"
    done = command("report", run_dir, "-o", page)
    assert (done.exit_code, digest[:12] in page.read_text()) == (0, True), done.output

    done = command("digest", run_dir)
    assert (done.exit_code, done.stdout) == (0, f"{digest}\n"), done.output

    done = command("verify", run_dir, "--steps", "0")
    assert "digest correct" in done.stdout, done.output
    assert "checkpoints" in done.stdout
    assert "all match their manifests and the receipt" in done.stdout
    # Only the sources of the newest are kept; of the others verify says that it cannot find them.
    assert "\nunverified " in done.stdout or "is not in this repository" in done.stderr, done.output

    assert labtrain.digest(labtrain.load_weights(run_dir)) == digest


@pytest.mark.parametrize("run_dir", ["11d679c"], indirect=True)
def test_a_newer_manifest_without_its_digest_is_damaged_not_old(run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / run_dir.name)
    manifest = next(copy.glob("checkpoints/*/manifest.json"))
    left = {key: value for key, value in json.loads(manifest.read_text()).items() if key != "digest"}
    manifest.write_text(json.dumps(left))
    done = command("digest", next(copy.glob("checkpoints/*")))
    assert done.exit_code == 2
    assert "was changed after it was written" in done.stderr


def test_what_cannot_be_read_says_which_labtrain_reads_it(tmp_path: Path) -> None:
    """Receipts of before 2026-11-25, which no version of labtrain was released with, and of a schema to come."""
    golden = json.loads((ROOT / "tests" / "golden" / "receipt.json").read_text())
    for changes, says in (
        ({"schema": "labtrain/receipt/2"}, "has schema 'labtrain/receipt/2', but this labtrain reads only"),
        ({"digest": None}, "has no digest to check it by"),
        ({"new": 1}, "its top level must not contain {'new'} properties"),
    ):
        (tmp_path / receipt.FILE).write_text(json.dumps(golden))
        found = golden | changes
        if "new" in changes:
            from labtrain.base.exact_json import digest_of

            found = {**found, "digest": digest_of(found)}
        (tmp_path / receipt.FILE).write_text(json.dumps(found))
        with pytest.raises(DamagedError) as caught:
            receipt.read(tmp_path)
        assert says in str(caught.value)
        assert "use the labtrain that wrote it: its wheel is in the experiment's vendor/" in str(caught.value)
