"""Check whether a worker that somebody else started can take part: same versions, same files, a
device.
"""

from __future__ import annotations

import platform
from importlib.metadata import version

from ...checkpoints.headers import read_header
from ...checkpoints.paths import located, reached
from ...errors import LCAError, ResourceError
from ..requests import Admission, AdmissionRequest
from .state import reported

_DISTRIBUTIONS = ("lca_posthoc", "torch", "numpy", "safetensors", "zarr", "dask", "distributed")


def versions() -> dict[str, str]:
    """Return the versions that decide bits and the protocol between processes; builds of one
    release count as equal.
    """
    installed = {name: version(name).partition("+")[0] for name in _DISTRIBUTIONS}
    return {"python": ".".join(platform.python_version_tuple()[:2]), **installed}


@reported(AdmissionRequest)
def admit(request: AdmissionRequest) -> Admission:
    """Check this process against the driver's description of itself; return the GPU it sees.

    Raises:
        ResourceError: naming the problem here and what to do.
    """
    import torch

    from ...results import check_shared_directory

    installed = versions()
    for name, needed in request.versions.items():
        if needed != installed[name]:
            fix = f"`pip install {name}=={needed}`" if name != "python" else f"Python {needed}"
            raise ResourceError(
                f"has {name} {installed[name]}, but this driver has {needed}: install {fix}"
            )
    check_shared_directory(request.token, request.text)
    _reads_checkpoints(request)
    cuda = torch.cuda.is_available()
    if request.device == "cuda" and not cuda:
        raise ResourceError(
            "sees no GPU: start it where `nvidia-smi` lists one, or use --device cpu"
        )
    gpu = str(torch.cuda.get_device_properties(0).uuid) if cuda else None
    return Admission(cuda=cuda, gpu=gpu)


def _reads_checkpoints(request: AdmissionRequest) -> None:
    for checkpoint in request.checkpoints:
        size = 0
        for file in checkpoint.files:
            path = located(request.root) / str(file)
            try:
                with reached(path), path.open("rb"):
                    size += read_header(path).size
            except OSError as error:
                raise ResourceError(
                    f"cannot read checkpoint {path} ({error.strerror}): mount the file system of "
                    "the checkpoints there, under the same path, and give its user the right to "
                    "read them"
                ) from None
            except LCAError as error:
                raise ResourceError(f"reads other checkpoints than this driver: {error}") from None
        if size != checkpoint.size:
            raise ResourceError(
                f"reads other checkpoints than this driver: {path} and its shards have {size:,} "
                f"bytes, not {checkpoint.size:,}"
            )
