"""``torch.compile`` of a model's networks, in place, so that the names of the weights stay."""

from typing import cast

from torch import nn

from equipoise.model import VAE


def compile_networks(model: VAE) -> None:
    """Compile the encoder, the decoder and, in stage 2, the variance network.

    A decoder whose features the noise model reads is compiled in the two parts that are called.

    Args:
        model: Model of the networks. They stay the same modules.
    """
    decoder = [model.decoder]
    if model.noise.reads_features:
        decoder = [cast(nn.Module, part) for part in (model.decoder.hidden, model.decoder.output)]

    for network in (model.encoder, *decoder, *model.noise.networks()):
        network.compile()


def restore_networks(model: VAE) -> None:
    """Undo :func:`compile_networks`, so that results do not depend on it.

    Args:
        model: Model of the networks.
    """
    for network in model.modules():
        # Nothing else is set by nn.Module.compile.
        network._compiled_call_impl = None
