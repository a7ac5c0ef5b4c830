"""Sharing through the hub's own client, with a small hub on this machine.

The tests check which files are transferred, and what the messages of refusals say.
"""

import base64
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml
from torch import nn

from equipoise.config import TrainConfig
from equipoise.data import load
from equipoise.files import MANIFEST
from equipoise.hub import RUN_FILES, HubError, publish, run_folder
from equipoise.run import Run
from equipoise.sharing import model_card, push
from equipoise.training.job import train
from equipoise.training.trainer import Trainer
from tests.oracles import evaluation_about

COMMIT = 40 * "a"
QUICK = TrainConfig(
    latent_dim=2, width=2, stage_1_epochs=1, stage_2_epochs=1, n_components=2, batch_size=128
)


class _Answers(BaseHTTPRequestHandler):
    """The part of the hub's interface that publishing and fetching models take."""

    def log_message(self, *_):
        pass

    def answer(self, value, status=200, **headers):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def repository(self, name):
        """Its files, or None after a refusal."""
        hub = self.server
        if name in hub.files and (
            name not in hub.private or self.headers.get("Authorization") == "Bearer right"
        ):
            return hub.files[name]
        return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        path, hub = urlsplit(self.path).path, self.server
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer right":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = (
                f"{asked['organization']}/{asked['name']}"
                if asked.get("organization")
                else asked["name"]
            )
            if name in hub.files:
                return self.answer(
                    {"error": "You already created this model repo", "url": f"{hub.url}/{name}"},
                    409,
                )
            hub.files[name] = {}
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(name)
            return self.answer({"url": f"{hub.url}/{name}"})
        name, action = re.fullmatch(r"/api/models/(.+?/.+?)/(preupload|commit)/main", path).groups()
        if self.repository(name) is None:
            return None
        if action == "preupload":
            asked = [file["path"] for file in json.loads(content)["files"]]
            modes = [
                {"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in asked
            ]
            return self.answer({"files": modes})
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                hub.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append(path)
        if found := re.fullmatch(
            r"/(?:api/models/)?(.+?/.+?)/(revision|tree|resolve)/(.+?)(?:/(.+))?", path
        ):
            name, action, revision, file = found.groups()
            files = self.repository(name)
            if files is None:
                return None
            if revision not in ("main", COMMIT):
                return self.answer(
                    {"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound"
                )
            if action == "revision":
                return self.answer({"id": name, "sha": COMMIT})
            if action == "tree":
                tree = [
                    {"type": "file", "path": key, "size": len(files[key]), "oid": key}
                    for key in files
                ]
                return self.answer(tree)
            return self.answer(files[file], ETag=f'"{file}"', X_Repo_Commit=COMMIT)
        return self.answer({"error": path}, 404)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.files, server.private, server.asked = {}, set(), []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    point_to(server.url, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "right")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def point_to(url, monkeypatch):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "absent")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    np.save(
        folder / "private.npy",
        np.random.default_rng(0).integers(0, 17, (60, 8, 8)).astype(np.uint8),
    )
    with pytest.MonkeyPatch.context() as patch:
        # There is nothing to predict in noise, but a card should tell of a prediction.
        patch.setattr(Trainer, "_refuse_worse_prediction", lambda trainer: [])
        run = train(
            load(folder / "private.npy", data_dir=folder),
            QUICK,
            folder / "run",
            command=["equipoise", "train", str(folder / "private.npy"), f"--data-dir={folder}"],
        )
    (run.folder / "figures").mkdir()
    (run.folder / "figures" / "reconstructions.png").write_bytes(b"pictures show data")
    estimate = {"value": 50.00225, "standard_error": 1.4725, "n": 180}
    run.evaluation_file.write_text(
        json.dumps(
            {
                "about": evaluation_about(run.folder)
                | {
                    "command": ["equipoise", "evaluate", str(run.folder)],
                },
                "likelihood": {"elbo": estimate},
                "samples": {
                    "features": "efficientnet-lite0",
                    "mixture": {"frechet_distance": {"value": 12.5, "n": 180}},
                },
            }
        )
    )
    return run


def test_a_run_that_was_pushed_is_fetched_and_the_same(trained, hub):
    assert push(trained, "ada/digits") == f"{hub.url}/ada/digits"
    folder = run_folder("hf:ada/digits")
    assert str(folder) == "runs/ada/digits"
    fetched = Run(folder)
    code = torch.randn(3, 2)
    assert torch.equal(fetched.model().decode(code).mean, trained.model().decode(code).mean)
    assert torch.equal(fetched.mixture().means, trained.mixture().means)
    assert fetched.config() == trained.config()
    assert fetched.history() == trained.history()


def test_only_safetensors_and_json_travel_and_no_paths_of_this_machine(trained, hub):
    push(trained, "ada/digits")
    files = hub.files["ada/digits"]
    tensors, texts = (
        {"model.safetensors", "aggregate.safetensors", "held-out.safetensors"},
        {"config.json", "evaluation.json", "metrics.jsonl"},
    )
    assert set(files) == tensors | texts | {"README.md"}
    home = str(trained.folder.parent).encode()
    assert home in trained.config_file.read_bytes()
    assert not any(home in content for content in files.values())
    settings = json.loads(files["config.json"])
    assert settings["command"] == [
        "equipoise",
        "train",
        "private.npy",
        f"--data-dir={trained.folder.parent.name}",
    ]
    assert settings["data"]["load"]["source"] == "private.npy"
    assert settings["options"] == trained.settings()["options"]
    assert "ada/digits" in hub.private
    push(trained, "ada/open", private=False)
    assert "ada/open" not in hub.private


def test_other_files_of_a_repository_are_not_fetched(trained, hub):
    push(trained, "ada/digits")
    hub.files["ada/digits"]["model.pkl"] = b"anything"
    folder = run_folder("hf:ada/digits@main")
    assert str(folder) == "runs/ada/digits@main"
    assert {path.name for path in folder.iterdir()} - {".cache", MANIFEST} == set(RUN_FILES)
    assert not (folder / "model.pkl").exists()
    assert not any("pkl" in path for path in hub.asked)


def test_a_fetched_run_needs_the_hub_no_more_and_keeps_what_was_added(trained, hub):
    push(trained, "ada/digits")
    folder = run_folder("hf:ada/digits")
    (folder / "evaluation.json").write_text("{}")
    hub.asked.clear()
    assert run_folder("hf:ada/digits") == folder
    assert not hub.asked
    assert (folder / "evaluation.json").read_text() == "{}"
    (folder / "model.safetensors").unlink()  # a transfer that was cut off goes on
    Run(run_folder("hf:ada/digits")).model()


def test_a_path_is_left_alone(tmp_path):
    assert run_folder(tmp_path) == tmp_path
    assert str(run_folder("runs/hf")) == "runs/hf"


def test_pushing_again_replaces(trained, hub):
    push(trained, "ada/digits")
    push(trained, "ada/digits", license_id="mit")
    assert b"license: mit" in hub.files["ada/digits"]["README.md"]


@pytest.mark.parametrize(
    "address", ["hf:digits", "hf:ada/digits/extra", "hf:", "hf:../digits", "hf:ada/..", "hf:a/b c"]
)
def test_malformed_names_are_refused(address):
    with pytest.raises(HubError, match="as owner/name, got"):
        run_folder(address)


def test_what_the_hub_lacks_is_said(trained, hub, monkeypatch):
    with pytest.raises(
        HubError,
        match=r"no model ada/absent that you may see: check the name, or log in with 'hf auth",
    ):
        run_folder("hf:ada/absent")
    push(trained, "ada/digits")
    with pytest.raises(HubError, match="ada/digits has no such revision"):
        run_folder("hf:ada/digits@v9")
    publish("ada/other", {"README.md": b"# Something else\n"})
    with pytest.raises(
        HubError, match=r"not a run of equipoise: it has no config\.json, model\.safetensors"
    ):
        run_folder("hf:ada/other")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="that you may see"):
        run_folder("hf:ada/digits@main")  # private


def test_who_is_not_logged_in_is_told_how(trained, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(
        HubError, match=r"does not accept your token for ada/digits: log in .* that may write"
    ):
        push(trained, "ada/digits")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        HubError,
        match="nobody is logged in to the hub: log in with 'hf auth login', or set HF_TOKEN",
    ):
        push(trained, "ada/digits")
    assert not hub.files


def test_offline_is_said(trained, hub, monkeypatch):
    point_to("http://127.0.0.1:9", monkeypatch)  # nobody listens there
    for refused in (lambda: run_folder("hf:ada/digits"), lambda: push(trained, "ada/digits")):
        with pytest.raises(HubError, match="cannot be reached for ada/digits: connect"):
            refused()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="unset HF_HUB_OFFLINE"):
        run_folder("hf:ada/digits")


def test_the_extra_is_named(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    for refused in (lambda: run_folder("hf:ada/digits"), lambda: push(trained, "ada/digits")):
        with pytest.raises(ImportError, match=r"pip install 'equipoise\[hub\]'"):
            refused()


def test_the_card_tells_what_it_is_with_figures_and_their_errors(trained):
    card = model_card(trained, "ada/digits", "apache-2.0")
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "equipoise",
        "license": "apache-2.0",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["variational-autoencoder", "vae", "uncertainty", "arxiv:1909.03765"],
    }
    for part in (
        "# digits\n",
        "of 1 x 8 x 8 images, trained on `private`",
        "predicted for every dimension of every example",
        "a mixture of 2 Gaussians",
        'equipoise.Run("hf:ada/digits")',
        "on the test set (180 examples), ± one standard error",
        "| ELBO | 50.0 ±\u00a01.5 | 180 | nats |",
        "| Fréchet distance, mixture | 12.5 | 180 |  |",
        "## Limits",
    ):
        assert part in text
    assert "license" not in model_card(trained, "ada/digits").split("---\n")[1]


def test_the_card_names_a_data_set_of_the_hub(trained, monkeypatch):
    settings = trained.settings()
    for data, expected in (
        ({"name": "mnist", "load": {"source": "mnist"}}, ["ylecun/mnist"]),
        ({"name": "ada/cats", "load": {"source": "hf:ada/cats"}}, ["ada/cats"]),
    ):
        monkeypatch.setattr(
            Run, "settings", lambda _, data=data: settings | {"data": settings["data"] | data}
        )
        assert (
            yaml.safe_load(model_card(trained, "ada/vae").split("---\n")[1])["datasets"] == expected
        )


def test_the_card_of_a_run_with_own_networks_asks_for_them(table, tmp_path):
    data = load(table)
    run = train(data, QUICK, tmp_path / "run", encoder=nn.Linear(6, 4), decoder=nn.Linear(2, 6))
    card = model_card(run, "ada/table")
    assert "run.model(encoder=..., decoder=...)" in card
    assert "build `Linear` and `Linear` as they were" in card
    assert "None yet: `equipoise evaluate` has not run" in card
    assert "pipeline_tag" not in card
