"""From the spool to a remote store that is slow, broken, killed, full of another's checkpoints, or away for good."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from labtrain.base.errors import StoreError
from labtrain.stores.delivery import Delivery
from labtrain.stores.prune import check
from labtrain.stores.store import Store, TakenOverError
from tests.real.stores.test_store import made, names
from tests.support.servers import S3, Proxy
from tests.support.waiting import wait_until

MB = 1 << 20


@pytest.fixture
def proxy(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """S3 behind something that can be made slow or broken."""
    between = Proxy(s3.port)
    for name, value in {**s3.variables(), "AWS_ENDPOINT_URL": f"http://127.0.0.1:{between.port}"}.items():
        monkeypatch.setenv(name, value)
    yield between
    between.close()


class Run:
    """A spool and its delivery."""

    def __init__(self, folder: Path, url: str, *, spool_bytes: int = 1 << 40) -> None:
        self.spool, self.remote = Store(folder / "spool"), Store(url)
        token = self.spool.take_over()
        self.remote.renew(token, seen=None)
        self.delivery = Delivery(self.spool, Store(url), token=token, spool_bytes=spool_bytes)

    def save(self, step: int, size: int = 1000) -> str:
        name = f"step-{step:010d}"
        manifest = made(Path(self.spool.root, name), step, size)
        self.spool.commit(name, manifest)
        self.delivery.add(name, manifest)
        return name


@pytest.mark.parametrize("url", ["memory", "s3", "sftp"], indirect=True)
def test_what_is_saved_arrives_and_leaves_the_spool(url: str, tmp_path: Path) -> None:
    run = Run(tmp_path, url)
    for step in (1, 2, 3):
        run.save(step)
    assert run.delivery.wait(60)
    assert names(run.remote) == ["step-0000000001", "step-0000000002", "step-0000000003"]
    assert [check(checkpoint) for checkpoint in run.remote.checkpoints()] == [None] * 3
    assert run.spool.find() == []
    run.delivery.drop({"step-0000000001"})
    assert run.delivery.wait(60)
    assert names(run.remote) == ["step-0000000002", "step-0000000003"]
    assert run.delivery.status() == ""


@pytest.mark.parametrize("url", ["s3", "sftp"], indirect=True)
def test_what_is_superseded_during_its_upload_leaves_nothing(url: str, tmp_path: Path) -> None:
    run = Run(tmp_path, url)
    name = "step-0000000001"
    folder = Path(run.spool.root, name)
    run.remote.upload(folder, made(folder, 1), run.remote.writing(name, run.delivery.token))
    assert run.remote.find()
    run.delivery.drop({name})
    assert run.delivery.wait(60)
    assert run.remote.find() == []


@pytest.mark.parametrize("url", ["memory", "s3", "sftp"], indirect=True)
def test_another_process_that_took_over_ends_it(url: str, tmp_path: Path) -> None:
    run = Run(tmp_path, url)
    other = Store(url).take_over()
    run.save(1)
    wait_until(lambda: run.delivery.error is not None)
    with pytest.raises(TakenOverError, match="another process"):
        run.delivery.check()
    assert names(run.remote) == []
    assert names(run.spool) == ["step-0000000001"]  # nothing is lost
    run.remote.check_writer(other)


def test_a_server_that_answers_503(proxy: Proxy, tmp_path: Path) -> None:
    run = Run(tmp_path, f"s3://lab/{tmp_path.name}")
    proxy.broken = 12
    run.save(1)
    assert run.delivery.wait(120)
    assert names(run.remote) == ["step-0000000001"]


def test_a_slow_server_shows_how_far_it_is(proxy: Proxy, tmp_path: Path) -> None:
    """One megabyte a second; the training would go on."""
    run = Run(tmp_path, f"s3://lab/{tmp_path.name}")
    proxy.bytes_per_second = MB
    run.save(1, size=40 * MB)
    seen = set()
    while not run.delivery.wait(0.2):
        seen.add(run.delivery.status())
        if len(seen) > 1:
            proxy.bytes_per_second = 0
    assert any("step-0000000001, 0 of 42 MB" in line or "1 to deliver to s3://lab" in line for line in seen)
    assert check(run.remote.checkpoints()[0]) is None


def test_a_server_killed_in_an_upload_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = S3(tmp_path / "s3")
    server.start()
    server.make_bucket()
    between = Proxy(server.port)
    for name, value in {**server.variables(), "AWS_ENDPOINT_URL": f"http://127.0.0.1:{between.port}"}.items():
        monkeypatch.setenv(name, value)
    try:
        run = Run(tmp_path, "s3://lab/run")
        between.bytes_per_second = 20 * MB
        run.save(1, size=60 * MB)
        wait_until(lambda: between.passed > 10 * MB)
        server.kill()
        between.bytes_per_second = 0
        run.save(2)
        wait_until(lambda: between.refused > 0)
        run.delivery.check()  # nothing that would end the training
        server.start()
        assert run.delivery.wait(180), run.delivery.status()
        assert [check(checkpoint) for checkpoint in run.remote.checkpoints()] == [None, None]
    finally:
        between.close()
        server.kill()


def test_a_store_that_stays_away(
    tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is superseded does not wait; the rest is bounded, and named."""
    between = Proxy(s3.port)
    for name, value in {**s3.variables(), "AWS_ENDPOINT_URL": f"http://127.0.0.1:{between.port}"}.items():
        monkeypatch.setenv(name, value)
    run = Run(tmp_path, f"s3://lab/{tmp_path.name}", spool_bytes=2500)
    between.target = 9  # nobody listens there
    between.broken = 0
    run.save(1)
    run.save(2)
    run.delivery.check()
    run.delivery.drop({"step-0000000001"})
    run.save(3)
    run.delivery.check()
    assert names(run.spool) == ["step-0000000002", "step-0000000003"]
    run.save(4)
    with pytest.raises(StoreError, match=r"3 checkpoints of 3,030 bytes wait in .*spool.*checkpoint.spool_bytes=2500"):
        run.delivery.check()
    wait_until(lambda: run.delivery.trouble)
    assert not run.delivery.wait(0.5)
    said = capfd.readouterr().err
    assert said.count("the training continues, and checkpoints wait in ") == 1
    between.close()
