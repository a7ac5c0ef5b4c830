"""A noise model of a user's own: trained, saved, loaded and resumed as those of the library are."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import equipoise
from equipoise.config import ConfigError
from equipoise.files import StoreError
from equipoise.noise import GlobalNoise, NoiseModel, build_noise, describe_noise
from equipoise.training.setup import check_own_noise, make_model, parameter_groups
from equipoise.training.trainer import Trainer

CONFIG = equipoise.TrainConfig(
    latent_dim=2, width=2, stage_1_epochs=3, stage_2_epochs=0, batch_size=128, n_components=2
)


class BrightnessNoise(NoiseModel):
    """A log-variance that is linear in the code, the same for all pixels: no class of ours."""

    depends_on_code = True

    def __init__(self, latent_dim, start=-2.0):
        super().__init__()
        self.start = start
        self.slope = nn.Parameter(torch.zeros(latent_dim))
        self.level = nn.Parameter(torch.tensor(start))

    def forward(self, z):
        return (self.level + z @ self.slope)[:, None, None, None]

    def description(self):
        return {"latent_dim": len(self.slope), "start": self.start}

    def learning_rate_factors(self):
        return {"level": 5.0}


@pytest.fixture(scope="module")
def digits():
    return equipoise.load_data("digits")


def test_it_is_trained_saved_and_loaded(digits, tmp_path):
    run = equipoise.train(digits, CONFIG, tmp_path / "run", noise=BrightnessNoise(2))
    model = run.model()
    assert isinstance(model.noise, BrightnessNoise)
    assert model.noise.start == -2.0
    assert model.noise.slope.abs().min() > 0  # it was trained
    x = model.scaling(torch.from_numpy(digits.test[:5]))
    assert model.reconstruct(x).std.shape == (5, 1, 8, 8)
    evaluation = equipoise.evaluate(run, digits, sections=["likelihood", "noise"], brief=True)
    assert evaluation["noise"]["varying"]["coverage_1"]["value"] > 0


def test_it_is_resumed_bit_for_bit(digits, tmp_path):
    torch.manual_seed(0)
    whole = Trainer(make_model(digits, CONFIG, noise=BrightnessNoise(2)), digits, CONFIG)
    rows = whole.fit()

    class Kill:
        def start(self, total_steps, done_steps, history): ...
        def step(self, done_steps, total_steps, label, figures): ...
        def message(self, text): ...
        def close(self): ...
        def epoch(self, row):
            if row["epoch"] == 3:
                raise KeyboardInterrupt

    torch.manual_seed(0)
    model = make_model(digits, CONFIG, noise=BrightnessNoise(2))
    with pytest.raises(KeyboardInterrupt):
        Trainer(model, digits, CONFIG, folder=tmp_path, sinks=[Kill()]).fit()
    resumed = Trainer(
        make_model(digits, CONFIG, noise=BrightnessNoise(2)), digits, CONFIG, folder=tmp_path
    )
    assert resumed.fit(resume=True)[-1]["validation_elbo"] == rows[-1]["validation_elbo"]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)


def test_its_parameters_have_the_rates_it_asks_for(digits):
    model = make_model(digits, CONFIG, noise=BrightnessNoise(2))
    rates = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, 0.01, 0.1)
        for parameter in group["params"]
    }
    assert rates[id(model.noise.level)] == (pytest.approx(0.05), 0.0)
    assert rates[id(model.noise.slope)] == (0.01, 0.0)
    assert rates[id(model.decoder.output.weight)] == (0.01, 0.1)
    assert len(rates) == len(list(model.parameters()))


def test_stage_2_starts_from_it(digits):
    config = replace(CONFIG, stage_1_epochs=2, stage_2_epochs=1)
    trainer = Trainer(make_model(digits, config, noise=BrightnessNoise(2)), digits, config)
    trainer.fit()
    assert type(trainer.model.noise).__name__ == "PredictedNoise"


@pytest.mark.parametrize("noise", [BrightnessNoise, "global", 0.5])
def test_what_is_no_noise_model_is_refused(digits, noise):
    with pytest.raises(ValueError, match="noise must be an instance of a NoiseModel, got"):
        check_own_noise(noise, digits, CONFIG)


def test_a_class_that_is_not_defined_is_named():
    description = describe_noise(BrightnessNoise(3))
    again = build_noise(description, nn.Identity)
    assert isinstance(again, BrightnessNoise)
    with pytest.raises(ValueError, match="'FogNoise' is not defined; import the module"):
        build_noise({**description, "kind": "FogNoise"}, nn.Identity)


def test_a_name_that_is_taken_is_refused_but_a_cell_may_run_again():
    body = {"forward": BrightnessNoise.forward, "description": BrightnessNoise.description}
    with pytest.raises(TypeError, match=r"there is a noise model GlobalNoise in equipoise\.noise"):
        type("GlobalNoise", (NoiseModel,), body)
    for _ in range(2):
        type("CellNoise", (NoiseModel,), {**body, "__module__": "notebook"})


def test_a_saved_model_without_its_class_says_what_to_import(digits, tmp_path, monkeypatch):
    run = equipoise.train(digits, CONFIG, tmp_path / "run", noise=BrightnessNoise(2))
    monkeypatch.delitem(NoiseModel._classes, "BrightnessNoise")
    with pytest.raises(StoreError, match=r"model\.safetensors cannot be loaded.*BrightnessNoise"):
        run.model()


class Flat(NoiseModel):
    """A noise model whose description uses the word that names classes."""

    def __init__(self, kind="flat"):
        super().__init__()
        self.kind = kind
        self.register_buffer("level", torch.zeros(()))

    def forward(self, z):
        return self.level

    def description(self):
        return {"kind": self.kind}


def test_a_description_may_use_any_word(digits, tmp_path):
    run = equipoise.train(digits, CONFIG, tmp_path / "run", noise=Flat("mild"))
    assert run.model().noise.kind == "mild"


class OtherArgument(Flat):
    def description(self):
        return {"w": 1}


class LateBuffer(Flat):
    def __init__(self, kind="flat"):
        super().__init__(kind)
        self.register_buffer("seen", None)

    def update(self, residual, all_reduce=None):
        self.seen = residual.mean()


class TwoNames(Flat):
    def __init__(self, kind="flat"):
        super().__init__(kind)
        self.first = nn.Linear(2, 1)
        self.second = self.first


class TensorInDescription(Flat):
    def description(self):
        return {"kind": torch.zeros(2)}


class WrongShape(Flat):
    def forward(self, z):
        return z


class WrongStatistic(Flat):
    @property
    def statistic_shape(self):
        return (3, 1, 1)


class NotANumber(Flat):
    def forward(self, z):
        return self.level * torch.nan


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (OtherArgument, r"OtherArgument cannot be built from its description\(\) {'w': 1}.*'w'"),
        (LateBuffer, r"LateBuffer has other tensors .*: seen. Register buffers"),
        (TwoNames, "TwoNames has a tensor under two names"),
        (TensorInDescription, r"JSON values in description\(\): .*Tensor is not JSON"),
        (WrongShape, r"gives log-variances \(2, 2\), which do not broadcast to \(2, 1, 8, 8\)"),
        (WrongStatistic, "WrongStatistic fails when it is tried: RuntimeError"),
        (NotANumber, "gives log-variances that are not finite"),
    ],
)
def test_what_could_not_be_saved_or_trained_is_refused_before_a_folder_appears(
    digits, tmp_path, noise, message
):
    with pytest.raises(ValueError, match=message):
        equipoise.train(digits, CONFIG, tmp_path / "run", noise=noise())
    assert not (tmp_path / "run").exists()


def test_options_that_exclude_an_own_noise_model_are_refused(digits):
    for options in ({"noise": "dimension"}, {"objective": "vae", "noise": "fixed"}):
        config = replace(CONFIG, **options)
        with pytest.raises(ValueError, match="exclude each other"):
            make_model(digits, config, noise=Flat())
    with pytest.raises(ValueError, match="objective=sigma-vae has a noise model of its own"):
        make_model(digits, replace(CONFIG, objective="sigma-vae"), noise=Flat())


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_resume_keeps_the_noise_model_that_the_run_began_with(digits, tmp_path, has_checkpoint):
    folder = tmp_path / "run"

    class Kill:
        def start(self, total_steps, done_steps, history): ...
        def step(self, done_steps, total_steps, label, figures): ...
        def message(self, text): ...
        def close(self): ...
        def epoch(self, row):
            if row["epoch"] == 1 + has_checkpoint:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        equipoise.train(digits, CONFIG, folder, noise=BrightnessNoise(2), sinks=[Kill()])
    with pytest.raises(StoreError, match=r"began with another noise model.*BrightnessNoise"):
        equipoise.train(digits, CONFIG, folder, resume=True, noise=Flat())
    if has_checkpoint:
        run = equipoise.train(digits, CONFIG, folder, resume=True)
    else:
        with pytest.raises(StoreError, match=r"BrightnessNoise of your own .* first checkpoint"):
            equipoise.train(digits, CONFIG, folder, resume=True)
        run = equipoise.train(digits, CONFIG, folder, resume=True, noise=BrightnessNoise(2))
    assert isinstance(run.model().noise, BrightnessNoise)


def class_of(constant):
    class Twin(NoiseModel):
        def __init__(self):
            super().__init__()
            self.log_var = nn.Parameter(torch.zeros(()))

        def forward(self, z):
            return self.log_var + constant

        def description(self):
            return {}

    return Twin


class PerColumnFloor(GlobalNoise):
    @property
    def floor_var(self):
        return torch.full((4,), 0.1)


class DoublePrecision(GlobalNoise):
    def __init__(self, update="closed-form", memory=100):
        super().__init__(update=update, memory=memory)
        self.extra = nn.Parameter(torch.zeros((), dtype=torch.float64))


class Forgetful(NoiseModel):
    """Its state is a Python number, which no file holds."""

    def __init__(self):
        super().__init__()
        self.log_var = 0.0

    def forward(self, z):
        return torch.full((len(z), 1), self.log_var)

    def update(self, residual, all_reduce=None):
        self.log_var = 1.0

    def description(self):
        return {}


class ForTwoRows(NoiseModel):
    def __init__(self):
        super().__init__()
        self.log_var = nn.Parameter(torch.zeros(2, 4))

    def forward(self, z):
        return self.log_var

    def description(self):
        return {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (class_of(-3.0)(), class_of(5.0))[0], "another one of the same name has replaced"),
        (PerColumnFloor, "floor_var of the shape"),
        (DoublePrecision, r"type torch\.float64"),
        (Forgetful, "other variances after it was saved"),
        (ForTwoRows, "do not broadcast"),
    ],
    ids=["twin", "floor", "double", "forgetful", "two rows"],
)
def test_what_would_fail_later_is_refused_before_a_folder_appears(tmp_path, make, message):
    data = equipoise.load_data(np.random.default_rng(0).normal(size=(60, 4)))
    with pytest.raises(ConfigError, match=message):
        equipoise.train(data, CONFIG, tmp_path / "run", noise=make())
    assert not (tmp_path / "run").exists()
