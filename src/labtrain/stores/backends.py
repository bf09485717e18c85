"""Opens what a URL names, as an fsspec filesystem, and puts what a backend raises into words. No torch.

Credentials come from where each backend looks for them: environment, ~/.aws, ~/.ssh/config, an agent, a metadata
service. A URL that holds a password is refused, since a URL stands in configurations, receipts and logs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from labtrain.base.console import one_line
from labtrain.base.contracts import Options
from labtrain.base.credentials import without_secrets
from labtrain.base.errors import ConfigError, StoreError
from labtrain.base.untrusted import NotPlainError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CONNECT_SECONDS = 10
ANSWER_SECONDS = 60
ATTEMPTS = 2  # of a request; a delivery is tried again as a whole
# Credentials that a server might repeat in what it answers.
NEEDS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "sftp": "paramiko"}


# Those that are stores. fsspec has others that lead elsewhere (`reference::`, `simplecache::`) or run what they read.
SCHEMES = {"file", "local", "ssh", "abfss", "adl", "hdfs", "webhdfs", "oss", "oci", "smb", "memory", *NEEDS}


def is_local(url: str) -> bool:
    """Return whether a URL is a path of this machine."""
    return "://" not in url or url.startswith("file://")


def check_url(url: str) -> None:
    """Refuse a URL that holds a password, or is none.

    Raises:
        ConfigError: without the password in it.
    """
    parts = urlsplit(url)
    if parts.password is not None:
        raise ConfigError(
            f"a password stands in the URL of {parts.scheme}://{parts.hostname}: it would stand in receipts and logs",
            hint="docs/guides/storage.md says where each backend looks for credentials",
        )
    if one_line(url) != url:
        raise ConfigError(f"{url}: a URL without control characters is wanted", hint="docs/guides/storage.md")
    if "?" in url or "#" in url:
        raise ConfigError(f"{url.partition('?')[0]}: a URL without ? and # is wanted", hint="docs/guides/storage.md")
    scheme, separator, _ = url.partition("://")
    if separator and scheme not in SCHEMES:
        raise ConfigError(
            f"{url}: {scheme} is no store for checkpoints",
            hint=f"docs/guides/storage.md; one of {', '.join(sorted(SCHEMES))}",
        )


def open_url(url: str) -> tuple["AbstractFileSystem", str]:
    """Return the filesystem of a URL and the path in it.

    Raises:
        ConfigError: the URL cannot be used, or the package of its backend is not installed.
        StoreError: the server cannot be reached, or refuses.
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


def _connected(name: str, options: Options) -> tuple[object, object]:
    """Return an SSH client that is connected as ssh would be, and its SFTP session.

    Args:
        name: of the host, as the URL or ~/.ssh/config has it.
        options: port and username of the URL.
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
        def missing_host_key(self, _client: object, _name: str, key: Any) -> None:
            known.check(key.public_blob.key_blob if key.public_blob else key.asbytes())

    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(Known())  # it is given no keys: each is one that it misses
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
        client.close()  # a server takes only so many that have not logged in yet
        raise
    return client, session


def _sftp(url: str) -> tuple["AbstractFileSystem", str]:
    """Connect as ssh would: ~/.ssh/config, agent and keys; and only to a host whose key is known.

    fsspec's own default accepts any key.
    """
    from fsspec.implementations.sftp import SFTPFileSystem

    class KnownHostsOnly(SFTPFileSystem):  # type: ignore[misc]
        def _connect(self) -> None:
            self.client, self.ftp = _connected(self.host, self.ssh_kwargs)

    parts = urlsplit(url)
    if not parts.hostname or not parts.path.strip("/"):
        raise ConfigError(f"{url}: must have a host and a path", hint="sftp://me@host/scratch/me")
    options = {"port": parts.port, "username": parts.username}
    return KnownHostsOnly(parts.hostname, skip_instance_cache=True, **options), parts.path.rstrip("/")


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a backend raises into a StoreError that names the URL, with no credential in it."""
    try:
        yield
    except (StoreError, ConfigError, NotPlainError):
        raise
    except Exception as error:
        if isinstance(error, ImportError | ValueError) and not isinstance(error, UnicodeError):
            raise
        text = without_secrets(" ".join(str(error).split()) or type(error).__name__)
        raise StoreError(f"{url}: {text}", hint=_hint(error, text, url)) from None  # its context may hold requests


def _hint(error: Exception, text: str, url: str) -> str:
    kind = type(error).__name__
    if "RequestTimeTooSkewed" in text or "skew" in text.lower() or "difference between the request time" in text:
        return "date; timedatectl set-ntp true: the clocks of this machine and the server are too far apart"
    if "NoCredentials" in kind or "credentials" in text.lower():
        return "aws configure, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if (
        isinstance(error, PermissionError)
        or "authentication" in f"{kind} {text}".lower()
        or "SignatureDoesNotMatch" in text
    ):
        scheme = url.partition("://")[0]
        return f"credentials that may write there: docs/guides/storage.md says where {scheme} looks for them"
    if isinstance(error, FileNotFoundError):
        return f"make it first: {url}"
    if isinstance(error, OSError) and error.errno in (28, 122):
        return "df -h: free space, then the same command goes on"
    return "the server, its address and port; docs/guides/storage.md has a command to try it"
