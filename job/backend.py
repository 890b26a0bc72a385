"""How Ray Train prepares the workers: each learns the addresses of all.

Ray's own `TensorflowConfig` does the same, but loads TensorFlow into the driver and into the controller, which have no
use for it: 8 s more until the workers start, on two cores. It also asks for Keras 2.
"""

import json
import os
from dataclasses import dataclass
from typing import Any

from ray.train.backend import Backend, BackendConfig

__all__ = ["MultiWorkerConfig"]


@dataclass
class MultiWorkerConfig(BackendConfig):
    """Workers of `tf.distribute.MultiWorkerMirroredStrategy`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _MultiWorkerBackend


class _MultiWorkerBackend(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:  # noqa: ARG002
        """Set TF_CONFIG on every worker (https://www.tensorflow.org/guide/distributed_training#tf_config)."""
        import ray

        addresses = worker_group.execute(_free_address)
        ray.get(
            [
                worker_group.execute_single_async(rank, _set_tf_config, addresses=addresses, index=rank)
                for rank in range(len(worker_group))
            ]
        )


def _free_address() -> str:
    from ray._common.network_utils import build_address
    from ray.train._internal.utils import get_address_and_port

    return str(build_address(*get_address_and_port()))


def _set_tf_config(addresses: list[str], index: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})
