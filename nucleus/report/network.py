"""What a network is made of, told by the network itself."""

import keras

from nucleus.model.architecture import ModelConfig
from nucleus.model.unet import encoder_of
from nucleus.report.record import NetworkFacts

__all__ = ["network_facts"]


def network_facts(model: keras.Model, config: ModelConfig, *, encoder_trained: bool) -> NetworkFacts:
    """Describe a network of `nucleus.model.unet.build_unet`; `encoder_trained` says if its encoder was trained too."""
    encoder = encoder_of(model)
    decoder = model.count_params() - encoder.count_params()
    trained = sum(int(variable.shape.num_elements()) for variable in encoder.trainable_variables)
    return NetworkFacts(
        encoder=config.encoder,
        parameters=model.count_params(),
        encoder_parameters=encoder.count_params(),
        trained_parameters=decoder + (trained if encoder_trained else 0),
        skips=[int(output.shape[-1]) for output in encoder.outputs],
        decoder=list(config.decoder_channels),
        outputs=list(config.channels),
    )
