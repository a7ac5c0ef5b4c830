"""The models of pythae with the networks, the start and the data of equipoise.

It alone imports pythae, so that other modules can be read without it.
"""

import copy
import tempfile
from pathlib import Path

import torch
from experiment import Clock, scaled, start
from pythae.models import RAE_L2, VAE, WAE_MMD, RAE_L2_Config, VAEConfig, WAE_MMD_Config
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.pipelines import TrainingPipeline
from pythae.samplers import GaussianMixtureSampler, GaussianMixtureSamplerConfig
from pythae.trainers import BaseTrainerConfig, CoupledOptimizerTrainerConfig

from equipoise.processes import choose_device

EVALUATION_BATCH = 500
PYTHAE = {
    "vae": (VAE, VAEConfig),
    "wae-mmd": (WAE_MMD, WAE_MMD_Config),
    "rae-l2": (RAE_L2, RAE_L2_Config),
}


class Encoder(BaseEncoder):
    """The encoder of equipoise under pythae's names; an autoencoder takes the mean only."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)
        del self.model.decoder

    def forward(self, x):
        """Map images to codes."""
        posterior = self.model.encode(x)
        return ModelOutput(embedding=posterior.mean, log_covariance=posterior.log_var)


class Decoder(BaseDecoder):
    """The decoder of equipoise under pythae's names, with its bounds."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)
        del self.model.encoder

    def forward(self, z):
        """Map codes to images."""
        return ModelOutput(reconstruction=self.model.decode_mean(z))


def fit_pythae(kind, data, config, settings):
    """Train a model of pythae by its pipeline; return it and the clock of the training."""
    model_class, config_class = PYTHAE[kind]
    ours = start(data, config)
    model_config = config_class(input_dim=data.shape, latent_dim=ours.latent_dim)
    model = model_class(model_config, Encoder(ours), Decoder(ours))

    sizes = {
        "num_epochs": config.stage_1_epochs,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": EVALUATION_BATCH,
        "seed": config.seed,
        "no_cuda": choose_device(config.accelerator).type != "cuda",
    }

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        if kind == "rae-l2":  # it has one optimiser for the encoder and one for the decoder
            coupled = {
                f"{half}_{name}": value
                for half in ("encoder", "decoder")
                for name, value in settings.items()
            }
            trainer = CoupledOptimizerTrainerConfig(output_dir=folder, **sizes, **coupled)
        else:
            trainer = BaseTrainerConfig(output_dir=folder, **sizes, **settings)

        pipeline = TrainingPipeline(model=model, training_config=trainer)
        pipeline(scaled(ours, data.train), scaled(ours, data.validation))

        weights = next(Path(folder).glob("*/final_model/model.pt"))
        model.load_state_dict(torch.load(weights, weights_only=True)["model_state_dict"])

    clock.lap("training")

    return model.eval(), clock


def fit_pythae_mixture(model, data, n_components):
    """Fit the sampler of pythae that draws codes from a Gaussian mixture."""
    mixture = GaussianMixtureSampler(model, GaussianMixtureSamplerConfig(n_components=n_components))
    mixture.fit(scaled(model.decoder.model, data.train))
    return mixture


def optimiser(config, is_scheduled):
    """Return the settings of pythae's trainer."""
    if not is_scheduled:
        return {"optimizer_cls": "Adam", "learning_rate": 1e-3}

    # The rate is half of the peak at step 0, the peak at step 1, and zero after the last epoch.
    epochs = config.stage_1_epochs
    schedule = {
        "max_lr": config.learning_rate,
        "total_steps": epochs + 1,
        "pct_start": 2 / (epochs + 1),
        "div_factor": 2.0,
        "cycle_momentum": False,
    }

    return {
        "optimizer_cls": "AdamW",
        "optimizer_params": {"betas": (0.9, 0.99), "weight_decay": config.weight_decay},
        "learning_rate": config.learning_rate,
        "scheduler_cls": "OneCycleLR",
        "scheduler_params": schedule,
    }
