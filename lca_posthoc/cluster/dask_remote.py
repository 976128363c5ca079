"""Use the workers of a scheduler that somebody else started, at an address."""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import InputError, ResourceError
from .assignments import ANSWER_SECONDS
from .config import ClusterConfig, is_closed, open_to_others
from .dask_client import WITHOUT_US, has_us, shortly
from .dask_workers import Workers
from .protocol import Cluster

if TYPE_CHECKING:
    from distributed import Client, Scheduler, Security

CONNECT_SECONDS = 30.0


@contextlib.contextmanager
def at_address(
    where: ClusterConfig, device: str | None, stop: threading.Event
) -> Iterator[Cluster]:
    """Connect, check the listeners, and wait for workers.

    Args:
        where: the address and its options.
        device: "cuda" or "cpu"; None if the workers decide.
        stop: drains the cluster when set.

    Raises:
        ResourceError: if the scheduler lacks this package.
    """
    address = where.address()
    with _quiet(), _connected(where, address) as client:
        if not where.insecure:
            _refuse_open_listeners(client)
        if not client.run_on_scheduler(has_us()):
            raise ResourceError(
                f"the scheduler at {address} {WITHOUT_US} (torch is not needed there)."
            )
        _wait_for(client, where.workers, address)
        with Workers.opened(client, device, stop) as workers:
            workers.dashboard = (
                client.dashboard_link if client.run_on_scheduler(_serves_dashboard) else None
            )
            yield workers


def _connected(where: ClusterConfig, address: str) -> Client:
    """Return a client of the scheduler; the caller closes it.

    Raises:
        ResourceError: if no scheduler answers.
    """
    from distributed import Client

    try:
        return Client(
            address,
            security=_security(where, address),
            timeout=CONNECT_SECONDS,
            set_as_default=False,
        )
    except (OSError, TimeoutError, RuntimeError) as error:
        raise ResourceError(
            f"no scheduler answers at {address} ({shortly(_root(error))}). Start one with `dask "
            "scheduler`, or check the address, the network, and whether it is a tls:// address that "
            "accepts these certificates."
        ) from None


def _wait_for(client: Client, asked_for: int | None, address: str) -> None:
    """Wait until the requested number of workers is connected, or one.

    Raises:
        ResourceError: if too few connect in time.
    """
    from distributed import TimeoutError as DaskTimeoutError

    count = asked_for or 1
    try:
        client.wait_for_workers(count, timeout=ANSWER_SECONDS if asked_for else CONNECT_SECONDS)
    except (DaskTimeoutError, TimeoutError):
        connected = len(client.scheduler_info()["workers"])
        tls = " --tls-ca-file CA --tls-cert CERT --tls-key KEY" if address.startswith("tls") else ""
        raise ResourceError(
            f"{connected or 'no'} worker{'' if connected == 1 else 's'} of the {count} asked for "
            f"{'is' if connected == 1 else 'are'} connected to {address}. Start some with `dask "
            f"worker {address} --nthreads 1 --memory-limit 0{tls}` (on a GPU: --resources GPU=1)."
        ) from None


def _root(error: BaseException) -> BaseException:
    """Return the first error in a chain of causes."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _serves_dashboard(dask_scheduler: Scheduler) -> bool:
    """Tell whether the scheduler's web server, which always runs, serves the dashboard."""
    return bool(getattr(dask_scheduler.http_application, "applications", None))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Dask's client, which logs tracebacks for worker failures that we report ourselves."""
    from distributed.utils import silence_logging_cmgr

    asyncio = logging.getLogger("asyncio")
    before = asyncio.level
    asyncio.setLevel(logging.CRITICAL)
    try:
        with silence_logging_cmgr(logging.CRITICAL):
            yield
    finally:
        asyncio.setLevel(before)


def _security(where: ClusterConfig, address: str) -> Security | None:
    from distributed import Security

    if not address.startswith("tls://"):
        return None
    files = where.tls
    if not files:
        security = Security()  # from Dask's own configuration
        if security.tls_ca_file is None or security.tls_client_cert is None:
            raise InputError(f"{address} needs --tls-ca, --tls-cert and --tls-key.")
        return security
    try:
        trial = ssl.create_default_context(cafile=files["--tls-ca"])
        trial.load_cert_chain(files["--tls-cert"], files["--tls-key"])
    except (ssl.SSLError, OSError) as error:
        raise InputError(
            f"--tls-ca {files['--tls-ca']}, --tls-cert {files['--tls-cert']} and --tls-key "
            f"{files['--tls-key']} are not an authority, a certificate and its key in PEM "
            f"({shortly(error)})."
        ) from None
    return Security(
        tls_ca_file=str(files["--tls-ca"]),
        tls_client_cert=str(files["--tls-cert"]),
        tls_client_key=str(files["--tls-key"]),
        require_encryption=True,
    )


def _refuse_open_listeners(client: Client) -> None:
    """Reject a scheduler or workers with open listeners: an address may be closed while the
    listener behind it is open.

    Raises:
        InputError: naming the listener.
    """

    def listeners(dask_scheduler: Scheduler) -> list[str]:
        return [str(listener.listen_address) for listener in dask_scheduler.listeners]

    for address in client.run_on_scheduler(listeners):
        if not is_closed(address):
            raise InputError(open_to_others(f"the scheduler listens on {address}, which"))
    for address, worker in client.scheduler_info()["workers"].items():
        if not is_closed(address):
            raise InputError(open_to_others(f"worker {worker['name']} listens on {address}, which"))
