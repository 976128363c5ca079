"""A standing Dask cluster of real processes on this host, and certificates for one, as users start
them.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import ipaddress
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

TLS = tuple[Path, Path, Path]


def _die_with_the_tests() -> None:
    """Of a test that is killed nothing stays behind: a process ends with the thread that started
    it.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def launch(
    *arguments: object, prefix: Sequence[str] = (), **environment: str
) -> subprocess.Popen[bytes]:
    """`dask …` in a process of its own session."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "dask", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_die_with_the_tests,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def end(process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
    """End a process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    process.wait()


@dataclass
class Standing:
    """A scheduler and its workers, one process group each."""

    place: Path
    scheduler: subprocess.Popen[bytes]
    address: str
    tls: TLS | None = None
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def hire(
        self, *options: object, prefix: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[bytes]:
        """One more worker; whoever uses the cluster waits for it."""
        given = (
            "worker",
            self.address,
            "--nthreads",
            1,
            "--memory-limit",
            0,
            "--dashboard-address",
            "127.0.0.1:0",
            *_tls(self.tls),
        )
        place = ("--local-directory", self.place / f"worker-{len(self.workers)}")
        self.workers.append(launch(*given, *place, *options, prefix=prefix, **environment))
        return self.workers[-1]

    @property
    def options(self) -> list[str]:
        """What `lca run` needs to use it."""
        given = zip(("--tls-ca", "--tls-cert", "--tls-key"), self.tls or (), strict=False)
        return ["--cluster", self.address, *(str(word) for pair in given for word in pair)]


@contextlib.contextmanager
def standing(
    place: Path,
    workers: int = 0,
    *,
    host: str = "127.0.0.1",
    tls: TLS | None = None,
    prefix: Sequence[str] = (),
    **environment: str,
) -> Iterator[Standing]:
    """A scheduler on `host`, and workers; ended afterwards."""
    place.mkdir(parents=True, exist_ok=True)
    file = place / "scheduler.json"
    protocol = ("--protocol", "tls") if tls else ()
    arguments = (
        "scheduler",
        "--host",
        host,
        "--port",
        0,
        "--dashboard-address",
        "127.0.0.1:0",
        "--scheduler-file",
        file,
    )
    scheduler = launch(*arguments, *protocol, *_tls(tls), prefix=prefix, **environment)
    try:
        while not file.exists() or not file.read_text().strip():
            with contextlib.suppress(subprocess.TimeoutExpired):
                scheduler.wait(timeout=0.05)
                raise AssertionError("the scheduler did not start")
        made = Standing(place, scheduler, json.loads(file.read_text())["address"], tls)
        try:
            for _ in range(workers):
                made.hire(**environment)
            yield made
        finally:
            for each in made.workers:
                end(each)
    finally:
        end(scheduler)


def _tls(files: TLS | None) -> tuple[Any, ...]:
    options = ("--tls-ca-file", "--tls-cert", "--tls-key")
    return tuple(word for pair in zip(options, files or (), strict=False) for word in pair)


def certificates(place: Path, name: str) -> TLS:
    """An authority of its own, a certificate it signed, and the certificate's key, as PEM files."""
    place.mkdir(parents=True, exist_ok=True)
    authority_key, key = (
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP256R1()),
    )
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority")])
    authority = (
        _started(authority_name, authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(False, False, False, False, False, True, True, False, False),
            critical=True,
        )
        .sign(authority_key, hashes.SHA256())
    )
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = (
        _started(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
            authority_name,
            key.public_key(),
        )
        .add_extension(addresses, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    files = tuple(place / f"{name}.{kind}.pem" for kind in ("ca", "cert", "key"))
    pem = serialization.Encoding.PEM
    files[0].write_bytes(authority.public_bytes(pem))
    files[1].write_bytes(signed.public_bytes(pem))
    plain = serialization.NoEncryption()
    files[2].write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return files[0], files[1], files[2]


def _started(subject: x509.Name, issuer: x509.Name, key: Any) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
    )
