"""Open URLs as fsspec filesystems, and explain the backends' errors. No torch.

Each backend finds its own credentials: environment, ~/.aws, ~/.ssh/config, an agent, a metadata service. A URL with a
password is refused, because URLs are in configurations, receipts and logs.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from labtrain.base.console import one_line
from labtrain.base.contracts import Options
from labtrain.base.credentials import without_secrets
from labtrain.base.errors import ConfigError, LabtrainError, StoreError
from labtrain.base.untrusted import NotPlainError

if TYPE_CHECKING:
    import paramiko
    from fsspec import AbstractFileSystem

CONNECT_SECONDS = 10
ANSWER_SECONDS = 60
WORDS: dict[type[Exception], str] = {EOFError: "the server closed the connection"}  # of exceptions without a text
ATTEMPTS = 2  # of one request; a whole delivery is retried anyway
# The package of each scheme's backend.
NEEDS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "sftp": "paramiko"}


# Schemes that are stores. Other fsspec schemes lead elsewhere (`reference::`, `simplecache::`) or run what they read.
SCHEMES = {"file", "local", "ssh", "abfss", "adl", "hdfs", "webhdfs", "oss", "oci", "smb", "memory", *NEEDS}


def is_local(url: str) -> bool:
    """Return whether a URL is a local path."""
    return "://" not in url or url.startswith("file://")


def check_url(url: str) -> None:
    """Raise on a URL that contains a password or is not a store's.

    Raises:
        ConfigError: does not repeat the password.
    """
    parts = urlsplit(url)
    if parts.password is not None:
        raise ConfigError(
            f"the URL {parts.scheme}://{parts.hostname} contains a password, which would end up in receipts and logs",
            hint="docs/guides/storage.md says where each backend finds credentials",
        )
    if one_line(url) != url:
        raise ConfigError(f"{url}: must be a URL without control characters", hint="docs/guides/storage.md")
    if "?" in url or "#" in url:
        raise ConfigError(f"{url.partition('?')[0]}: must be a URL without ? and #", hint="docs/guides/storage.md")
    scheme, separator, _ = url.partition("://")
    if separator and scheme not in SCHEMES:
        raise ConfigError(
            f"{url}: {scheme} is not supported for checkpoints",
            hint=f"use one of {', '.join(sorted(SCHEMES))}; docs/guides/storage.md",
        )


def open_url(url: str) -> tuple["AbstractFileSystem", str]:
    """Return the filesystem of a URL and the path in it.

    Raises:
        ConfigError: the URL cannot be used, or its backend's package is not installed.
        StoreError: the server cannot be reached or refuses access.
    """
    import fsspec

    check_url(url)
    if is_local(url):
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem(auto_mkdir=True), str(Path(url.removeprefix("file://")).absolute())
    scheme = url.partition("://")[0]
    with explained(url):
        try:
            if scheme in ("sftp", "ssh"):
                return _sftp(url)
            options: dict[str, object] = {"use_listings_cache": False, "skip_instance_cache": True}
            if scheme in ("s3", "s3a"):
                timeouts = {"connect_timeout": CONNECT_SECONDS, "read_timeout": ANSWER_SECONDS}
                options["config_kwargs"] = {**timeouts, "retries": {"max_attempts": ATTEMPTS}}
            fs, root = fsspec.core.url_to_fs(url, **options)
            if hasattr(fs, "retries"):
                fs.retries = ATTEMPTS
            return fs, root.rstrip("/")
        except ImportError as error:
            package = NEEDS.get(scheme, f"the fsspec package for {scheme}")
            raise ConfigError(f"{url}: {package} is not installed", hint=f"uv pip install {package}") from error
        except ValueError as error:
            raise ConfigError(f"{url}: {error}", hint="docs/guides/storage.md lists the backends") from error


def _connected(name: str, options: Options) -> tuple["paramiko.SSHClient", "paramiko.SFTPClient"]:
    """Connect as ssh would; return the SSH client and its SFTP session.

    Args:
        name: of the host, from the URL, or an alias in ~/.ssh/config.
        options: port and username from the URL.
    """
    import paramiko

    from labtrain.stores.known_hosts import KnownHosts

    path = Path("~/.ssh/config").expanduser()
    config = paramiko.SSHConfig.from_path(str(path)) if path.exists() else paramiko.SSHConfig()
    found = config.lookup(name)
    host, port = found.get("hostname", name), int(options.get("port") or found.get("port", 22))
    known = KnownHosts(host, port, found)

    class Transport(paramiko.Transport):  # type: ignore[misc]
        @property
        def preferred_keys(self) -> tuple[str, ...]:
            return known.kinds(super().preferred_keys)

    class Known(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]
        def missing_host_key(self, _client: object, _name: str, key: paramiko.PKey) -> None:
            known.check(key.public_blob.key_blob if key.public_blob else key.asbytes())

    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(Known())  # the client has no known keys, so it asks this policy for each
    try:
        client.connect(
            host,
            port=port,
            username=options.get("username") or found.get("user"),
            key_filename=[file for file in found.get("identityfile", []) if Path(file).exists()] or None,
            timeout=CONNECT_SECONDS,
            banner_timeout=CONNECT_SECONDS,
            auth_timeout=CONNECT_SECONDS,
            transport_factory=Transport,
        )
        session = client.open_sftp()
        session.get_channel().settimeout(ANSWER_SECONDS)
    except BaseException:
        client.close()  # a server limits connections that have not logged in
        raise
    return client, session


def _sftp(url: str) -> tuple["AbstractFileSystem", str]:
    """Connect as ssh would, with ~/.ssh/config, agent and keys, and only to a host whose key is known.

    fsspec's default accepts any key.
    """
    from fsspec.implementations.sftp import SFTPFileSystem

    class KnownHostsOnly(SFTPFileSystem):  # type: ignore[misc]
        def _connect(self) -> None:
            self.client, self.ftp = _connected(self.host, self.ssh_kwargs)

        def get_file(self, rpath: str, lpath: str, **_: object) -> None:
            with self.ftp.open(rpath, "rb") as source, Path(lpath).open("wb") as target:
                ask = source._prefetch_thread
                source._prefetch_thread = lambda *asked: _quietly(ask, *asked)
                source.prefetch()
                shutil.copyfileobj(source, target)

    parts = urlsplit(url)
    if not parts.hostname or not parts.path.strip("/"):
        raise ConfigError(f"{url}: must have a host and a path", hint="sftp://me@host/scratch/me")
    logging.getLogger("paramiko").addHandler(logging.NullHandler())  # else it prints tracebacks of what it raises, too
    options = {"port": parts.port, "username": parts.username}
    return KnownHostsOnly(parts.hostname, skip_instance_cache=True, **options), parts.path.rstrip("/")


def _quietly(ask: Callable[..., None], *asked: object) -> None:
    """Ask for a file's parts, in paramiko's thread; an error there reaches who reads them, and needs no traceback."""
    with suppress(Exception):
        ask(*asked)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn a backend's exception into a StoreError that names the URL and contains no credential."""
    try:
        yield
    except (LabtrainError, NotPlainError):
        raise
    except Exception as error:
        if isinstance(error, ImportError | ValueError) and not isinstance(error, UnicodeError):
            raise
        text = without_secrets(" ".join(str(error).split()) or WORDS.get(type(error), type(error).__name__))
        raise StoreError(
            f"{url}: {text}", hint=_hint(error, text, url)
        ) from None  # the context may contain requests with credentials


def _hint(error: Exception, text: str, url: str) -> str:
    kind = type(error).__name__
    if "RequestTimeTooSkewed" in text or "skew" in text.lower() or "difference between the request time" in text:
        return "timedatectl set-ntp true: the clocks of this machine and the server differ too much"
    if "NoCredentials" in kind or "credentials" in text.lower():
        return "aws configure, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if (
        isinstance(error, PermissionError)
        or "authentication" in f"{kind} {text}".lower()
        or "SignatureDoesNotMatch" in text
    ):
        scheme = url.partition("://")[0]
        return f"use credentials that may write there: docs/guides/storage.md says where {scheme} finds them"
    if isinstance(error, FileNotFoundError):
        return f"create it first: {url}"
    if isinstance(error, OSError) and error.errno in (28, 122):
        return "df -h: free space, then start the same command again; it resumes"
    return "check the server, its address and port; docs/guides/storage.md has a command to try it"
