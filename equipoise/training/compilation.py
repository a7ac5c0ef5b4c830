"""``torch.compile`` of a model's networks, in place, so that the names of the weights stay.

On one GPU the compiled networks are replayed as CUDA graphs, which saves the host from starting
every kernel. A graph writes its results into the same memory each time. What a network has returned
must therefore not be read after the next step has begun. The training loop marks that moment with
:func:`begin_step`, and restores the networks at its end.
"""

from typing import cast

import torch
from torch import nn

from equipoise.model import VAE


def compile_networks(model: VAE, device: torch.device, n_processes: int) -> None:
    """Compile the encoder, the decoder and, in stage 2, the variance network.

    A decoder whose features the noise model reads is compiled in the two parts that are called.

    Args:
        model: Model of the networks. They stay the same modules.
        device: Device of the training. Only GPUs have CUDA graphs.
        n_processes: Number of processes that train together. If there are several, the gradients
            pass through buffers of the engine, and the networks are compiled without graphs.
    """
    has_graphs = device.type == "cuda" and n_processes == 1
    decoder = [model.decoder]
    if model.noise.reads_features:
        decoder = [cast(nn.Module, part) for part in (model.decoder.hidden, model.decoder.output)]

    for network in (model.encoder, *decoder, *model.noise.networks()):
        network.compile(mode="reduce-overhead" if has_graphs else "default")


def restore_networks(model: VAE) -> None:
    """Undo :func:`compile_networks`, so that results of the networks can be kept.

    Args:
        model: Model of the networks.
    """
    for network in model.modules():
        # Nothing else is set by nn.Module.compile.
        network._compiled_call_impl = None


def begin_step() -> None:
    """Mark the moment from which earlier results of compiled networks are not needed any more."""
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
