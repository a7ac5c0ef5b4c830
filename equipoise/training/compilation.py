"""``torch.compile`` of a model's networks, in place: names of weights stay as they are.

On one GPU the compiled networks are replayed as CUDA graphs, which spares the host from starting every kernel. A graph
writes its results into the same memory each time, so nothing that a network returned may be read once the next step has
begun: the loop says when that is, by :func:`begin_step`, and hands the networks back uncompiled when it has done.
"""

import torch
from torch import nn

from equipoise.model import VAE


def compile_networks(model: VAE, device: torch.device, n_processes: int) -> None:
    """Compile the encoder, the decoder and, in stage 2, the variance network.

    Args:
        model: whose networks; they are the same modules afterwards, called by another way.
        device: where it trains. CUDA graphs are for GPUs.
        n_processes: that train together; with several, whose gradients go through buffers of the engine, the
            networks are compiled without graphs.
    """
    has_graphs = device.type == "cuda" and n_processes == 1
    for network in _networks(model):
        network.compile(mode="reduce-overhead" if has_graphs else "default")


def restore_networks(model: VAE) -> None:
    """Take back :func:`compile_networks`, so that whoever has the model next may keep what it returns.

    Args:
        model: whose networks.
    """
    for network in _networks(model):
        network._compiled_call_impl = None  # all that nn.Module.compile sets


def begin_step() -> None:
    """Say that what compiled networks returned so far is not needed any more."""
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def _networks(model: VAE) -> list[nn.Module]:
    return [model.encoder, model.decoder, *model.noise.networks()]
