"""Fixtures that several files of tests share."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes on this machine, the first of which has no cores for jobs, and answers Ray's client."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the package itself is sent
        patch.setenv("RAY_gcs_server_port_wait_time_s", "300")  # a busy machine is no reason to fail
        try:
            head = {"num_cpus": 0, "ray_client_server_port": _free_port()}
            found = Cluster(initialize_head=True, connect=False, head_node_args=head)
            found.client_address = f"ray://127.0.0.1:{head['ray_client_server_port']}"
            found.add_node(num_cpus=2)
        except Exception as error:  # before anything of this project runs: sandboxes may forbid what Ray needs
            pytest.skip(f"Ray starts no cluster on this machine: {error}")
        patch.setenv("RAY_ADDRESS", found.address)
        try:
            yield found
        finally:
            ray.shutdown()
            found.shutdown()
