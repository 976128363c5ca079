"""What a driver imports on its way, for the process drivers are forked from."""

import distributed  # noqa: F401
import torch  # noqa: F401
import zarr  # noqa: F401

import lca_posthoc.allocation
import lca_posthoc.objective
import lca_posthoc.replay
import lca_posthoc.worker.spans  # noqa: F401
