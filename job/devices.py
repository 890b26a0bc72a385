"""What TensorFlow may use of a machine: no more than Ray has given this process."""

__all__ = ["limit_devices"]


def limit_devices(cpus: int, gpus: int) -> None:
    """Let TensorFlow use so many cores, and GPUs (0 or 1: the one that Ray has left visible). Before its first use."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(cpus)
    tf.config.threading.set_inter_op_parallelism_threads(2)  # one would deadlock with the collectives
    if not gpus:  # Ray 2.60 leaves all GPUs visible to a worker that asked for none
        tf.config.set_visible_devices([], "GPU")
    for device in tf.config.get_visible_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, enable=True)
