"""Hold the user's choice of a cluster, and check it."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import InputError

SCHEMES = ("tcp", "tls")


@dataclass(frozen=True)
class ClusterConfig:
    """A place where work runs.

    Args:
        kind: "local", "inline", `tcp://HOST:PORT`, `tls://HOST:PORT`, or `file:SCHEDULER.json`.
        workers: how many local workers; at an address, how many to wait for.
        tls_ca: PEM file of the certificate authority, for `tls://`.
        tls_cert: PEM file of the certificate, for `tls://`.
        tls_key: PEM file of its key, for `tls://`.
        insecure: use a cluster whose listeners are open to others and not encrypted.
        dashboard: serve Dask's dashboard for local workers on loopback.
    """

    kind: str = "local"
    workers: int | None = None
    tls_ca: str | Path | None = None
    tls_cert: str | Path | None = None
    tls_key: str | Path | None = None
    insecure: bool = False
    dashboard: bool = False

    @property
    def is_address(self) -> bool:
        """Tell whether it names a scheduler that somebody else started."""
        return self.kind.startswith(("file:", *(f"{scheme}://" for scheme in SCHEMES)))

    @property
    def tls(self) -> dict[str, Path]:
        """Return the given TLS files, by option."""
        files = {"--tls-ca": self.tls_ca, "--tls-cert": self.tls_cert, "--tls-key": self.tls_key}
        return {option: Path(file) for option, file in files.items() if file is not None}

    def check(self) -> None:
        """Reject options that contradict each other, before anything starts.

        Raises:
            InputError: naming the options.
        """
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers must be 1 or more, got {self.workers}.")
        for option, file in self.tls.items():
            if not file.is_file():
                raise InputError(f"{option} {file} does not exist. Give a PEM file.")
        if self.is_address and self.dashboard:
            raise InputError(
                "--dashboard is for local workers; a scheduler at an address has its own. Leave it "
                "out."
            )
        if not self.is_address:
            extra = [*self.tls, *(["--insecure"] if self.insecure else [])]
            if extra:
                raise InputError(
                    f"{', '.join(extra)} {'goes' if len(extra) == 1 else 'go'} with --cluster "
                    "ADDRESS only."
                )

    def address(self) -> str:
        """Return the scheduler's address, read from its file if one is named.

        Raises:
            InputError: if the file is missing or holds no address, or the address is open to others
                without TLS.
        """
        address = (
            _in_file(Path(self.kind.removeprefix("file:")))
            if self.kind.startswith("file:")
            else self.kind
        )
        parts = urlsplit(address)
        if parts.scheme not in SCHEMES or not parts.hostname or not _has_port(address):
            raise InputError(
                f"{address!r} is not the address of a scheduler. Expected tcp://HOST:PORT or "
                "tls://HOST:PORT."
            )
        if parts.scheme == "tls" and self.tls and len(self.tls) < 3:
            missing = [
                option
                for option in ("--tls-ca", "--tls-cert", "--tls-key")
                if option not in self.tls
            ]
            raise InputError(f"{address} needs {' and '.join(missing)} as well.")
        if parts.scheme != "tls" and self.tls:
            raise InputError(
                f"{', '.join(self.tls)} {'goes' if len(self.tls) == 1 else 'go'} with tls://, not "
                f"{address}."
            )
        if not self.insecure and not is_closed(address):
            raise InputError(open_to_others(f"the scheduler at {address}"))
        return address


def _has_port(address: str) -> bool:
    try:
        return urlsplit(address).port is not None
    except ValueError:
        return False


def is_closed(address: str) -> bool:
    """Tell whether only this host, or holders of a certificate, can talk to an address.

    >>> [is_closed(each) for each in ("tcp://127.0.0.1:1", "tcp://[::1]:1", "tls://10.0.0.1:1", "tcp://10.0.0.1:1", "tcp://node:1")]
    [True, True, True, False, False]
    """
    parts = urlsplit(address)
    if parts.scheme != "tcp":
        return parts.scheme in ("tls", "inproc")
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname == "localhost"


def open_to_others(who: str) -> str:
    """Return the message that rejects a listener open to others."""
    return (
        f"{who} is open to the network without TLS: anyone who reaches it can run code as you. Start "
        "it with --host 127.0.0.1, or with TLS and give --tls-ca, --tls-cert and --tls-key, or "
        "give --insecure on a network you trust."
    )


def _in_file(file: Path) -> str:
    try:
        return str(json.loads(file.read_text())["address"])
    except OSError as error:
        raise InputError(
            f"scheduler file {file} cannot be read: {error.strerror}. `dask scheduler "
            f"--scheduler-file {file}` writes it."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file} is not a scheduler file: it holds no address.") from None
