"""Fixtures that several files of tests share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes on this machine, the first of which has no cores for jobs."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the package itself is sent
        patch.setenv("RAY_gcs_server_port_wait_time_s", "300")  # a busy machine is no reason to fail
        try:
            found = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 0})
            found.add_node(num_cpus=2)
        except Exception as error:  # before anything of this project runs: sandboxes may forbid what Ray needs
            pytest.skip(f"Ray starts no cluster on this machine: {error}")
        patch.setenv("RAY_ADDRESS", found.address)
        try:
            yield found
        finally:
            ray.shutdown()
            found.shutdown()
