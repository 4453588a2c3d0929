"""A Ray cluster of two machines on loopback. Ray leaves 127.0.0.2 alone, while it takes 127.0.0.1 for an outward address."""

import os

import pytest

HOST = "127.0.0.2"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ["RAY_worker_niceness"] = "0"


@pytest.fixture(scope="module")
def ray_cluster():
    """The cluster, as Ray's own tests make one. `address` is its head's."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = dict(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False, node_ip_address=HOST)
    made = Cluster(initialize_head=True, head_node_args=node)
    made.add_node(**node)
    try:
        yield made
    finally:
        made.shutdown()
