"""What lies behind the errors that Ray raises."""

import json
import os
from dataclasses import dataclass
from typing import Any

from ray.train.backend import Backend, BackendConfig

from nucleus.errors import NucleusError

__all__ = ["MultiWorkerConfig", "our_error"]


_CAUSES = ("cause", "controller_failure", "health_check_failure")
"""Where Ray's errors keep those that they wrap."""


def our_error(error: BaseException | None) -> NucleusError | None:
    """The first of this project's errors in a chain of causes."""
    while error is not None:
        if isinstance(error, NucleusError):
            return error
        inner = (getattr(error, name, None) for name in _CAUSES)
        error = next((cause for cause in inner if isinstance(cause, BaseException)), error.__cause__)
    return None


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
