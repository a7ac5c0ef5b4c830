"""The explorer: what it answers, what it refuses, and the page in a real browser."""

import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise import TrainConfig, load_data, train

pytest.importorskip("starlette", reason="the extra 'explore' is not installed")

import uvicorn
from starlette.testclient import TestClient

from equipoise.correlated_noise import CorrelatedNoise
from equipoise.correlation import FullCorrelation
from equipoise.explorer import View, explore
from equipoise.explorer.server import _listen, make_app
from equipoise.residuals import ResidualCovariance

QUICK = {"width": 4, "stage_1_epochs": 3, "stage_2_epochs": 1, "n_components": 3, "batch_size": 64}


def trained(data, folder, latent_dim, **options):
    return train(data, TrainConfig(**(QUICK | {"latent_dim": latent_dim} | options)), folder)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    return trained(digits, tmp_path_factory.mktemp("explored") / "digits", latent_dim=4)


@pytest.fixture(scope="module")
def view(run, digits):
    return View(run.model(), run.mixture(), digits, "digits")


@pytest.fixture(scope="module")
def table_view(table, tmp_path_factory):
    data = load_data(table)
    run = trained(data, tmp_path_factory.mktemp("explored") / "table", latent_dim=1)
    return View(run.model(), run.mixture(), data, "table")


@pytest.fixture
def client(view):
    return TestClient(
        make_app(view), base_url="http://127.0.0.1:8769", raise_server_exceptions=False
    )


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_codes_decode_to_mean_and_std_in_raw_units(view):
    codes = view.sample("prior", 5, seed=1)
    z, mean, std = np.split(view.decode(codes), [4, 68], axis=1)
    with torch.no_grad():
        seen = view.model.decode(torch.from_numpy(codes))
    np.testing.assert_array_equal(z, codes)
    np.testing.assert_allclose(mean, 16 * seen.mean.flatten(1), rtol=1e-5)
    np.testing.assert_allclose(std, 16 * seen.std.flatten(1), rtol=1e-5)


@pytest.mark.parametrize("point", [(0.3, -0.8), (-2.0, 1.5)])
def test_the_code_at_a_point_lies_there_and_is_the_likeliest_of_its_component(view, point):
    _, axes, projected = view.map
    code = torch.from_numpy(view.code_at(np.array(point))[0])
    np.testing.assert_allclose(axes @ code, point, atol=1e-8)
    k = int(projected.responsibilities(torch.tensor([point], dtype=torch.float64)).argmax())
    mean, covariance = view.mixture.means[k].double(), view.mixture.covariances[k].double()
    gradient = torch.linalg.solve(covariance, code - mean)
    hidden = torch.linalg.svd(axes).Vh[2:]  # directions that the map does not show
    np.testing.assert_allclose(hidden @ gradient, 0, atol=1e-8)


def test_samples_come_from_their_source(view):
    for source in ("prior", "mixture", "2"):
        np.testing.assert_array_equal(
            view.sample(source, 8, seed=3), view.sample(source, 8, seed=3)
        )
    component = torch.distributions.MultivariateNormal(
        view.mixture.means[2].double(), view.mixture.covariances[2].double()
    )
    codes = torch.from_numpy(view.sample("2", 64, seed=0)).double()
    assert component.log_prob(codes).mean() == pytest.approx(-float(component.entropy()), abs=0.8)
    for source, n, message in (
        ("2", 65, "1 to 64"),
        ("prior", 0, "1 to 64"),
        ("9", 1, "from 0 to 2"),
        ("-1", 1, "number of a component"),
    ):
        with pytest.raises(ValueError, match=message):
            view.sample(source, n, seed=0)


def test_an_input_is_judged_against_the_validation_set(view):
    judged = [view.inspect(view.example(i)) for i in range(40)]
    # Ranks of the reference itself are about uniform.
    assert np.mean([found.odder_than for found in judged]) == pytest.approx(0.5, abs=0.15)
    assert all(found.log_likelihood > found.elbo - 10 for found in judged)
    noise = np.random.default_rng(0).integers(0, 17, (1, 1, 8, 8), dtype=np.uint8)
    found = view.inspect(noise)
    assert found.odder_than > 0.95
    assert found == view.inspect(noise)  # the same answer each time
    assert found.raw == noise.flatten().tolist()
    with torch.no_grad():
        code = view.model.encode(torch.from_numpy(noise) / 16).mean[0]
    assert found.code == pytest.approx(code.tolist())
    assert found.code_log_prob == pytest.approx(float(view.mixture.log_prob(code[None])), rel=1e-4)


def test_without_data_the_map_is_that_of_the_mixture_and_nothing_is_ranked(run, view):
    alone = View(run.model(), run.mixture())
    shown = alone.about()
    assert shown["n_examples"] == 0
    assert max(shown["plane"]["density"]) == 1
    assert alone.inspect(view.example(0)).odder_than is None
    with pytest.raises(ValueError, match="without its data"):
        alone.example(0)


def test_images_become_examples(view):
    example = view.example(5)
    np.testing.assert_array_equal(
        view.read(png((example[0, 0].astype(int) * 255 // 16).astype(np.uint8))), example
    )
    photo = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    assert view.read(png(photo)).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("upload", "message"),
    [
        (b"", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "expected BMP"),
        (png(np.zeros((20, 20), np.uint8))[:-30], "cannot be used"),
        (png(np.zeros((8000, 8000), np.uint8)), "8000 x 8000 pixels, more than 40,000,000"),
    ],
)
def test_files_that_are_no_fit_images_are_refused(view, upload, message):
    with pytest.raises(ValueError, match=message):
        view.read(upload)


def test_a_row_of_a_table_and_one_latent_unit(table_view, table):
    found = table_view.inspect(table_view.read("; ".join(map(str, table[3])).encode()))
    assert found.raw == pytest.approx(table[3].tolist())
    assert 0 <= found.odder_than < 1
    assert table_view.inspect(table_view.read(b"1e4 " * 6)).odder_than > 0.97
    assert table_view.about()["plane"] is None
    with pytest.raises(ValueError, match="no map"):
        table_view.code_at(np.zeros(2))
    for text, message in (
        (b"1, 2", "6 finite numbers"),
        (b"1,2,3,4,5,x", "could not convert"),
        (b"nan " * 6, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            table_view.read(text)


def test_the_page_and_what_it_is_told(client, view):
    page = client.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for file in ("style.css", "explorer.js"):
        assert client.get(f"/{file}").status_code == 200
    assert client.get("/about").json() == json.loads(json.dumps(view.about(), allow_nan=False))
    assert client.get("/../views.py").status_code == 404


def test_draws_of_one_code_hang_together_as_its_noise_does(run, digits):
    model = run.model()
    assert View(model, run.mixture()).about()["n_draws"] == 0
    statistic = ResidualCovariance(64)
    statistic.update(torch.randn(500, 1, 8, 8).cumsum(-1))
    correlation = FullCorrelation.fit(model.shape, statistic, torch.tensor(0.1)).float()
    model.noise = CorrelatedNoise(model.noise, correlation)

    view = View(model, run.mixture())
    assert view.about()["n_draws"] == 3
    code = view.sample("mixture", 1, seed=0)
    drawn = view.draws(code)
    mean, std = np.split(view.decode(code)[:, 4:], 2, axis=1)
    np.testing.assert_allclose(drawn[:, -64:], np.broadcast_to(std, (3, 64)), rtol=1e-5)
    u = torch.from_numpy((drawn[:, 4:68] - mean) / std).view(3, 1, 8, 8)
    white = correlation.whiten(u)  # the noise that it was made of
    assert abs(float(white.mean())) < 0.3
    assert 0.7 < float(white.var()) < 1.3

    client = TestClient(make_app(view), base_url="http://127.0.0.1:8769")
    answer = client.post("/draws", json={"codes": code.tolist()}).content
    np.testing.assert_allclose(
        np.frombuffer(answer, "<f4").reshape(3, -1), drawn, rtol=1e-4, atol=1e-4
    )


def test_answers_over_http_are_those_of_the_view(client, view):
    codes = view.sample("mixture", 3, seed=7)
    sampled = client.post("/sample", json={"source": "mixture", "n": 3, "seed": 7}).content
    decoded = client.post("/decode", json={"codes": codes.tolist()}).content
    at = client.post("/decode", json={"point": [0.5, 0.5]}).content
    for answer, expected in (
        (sampled, codes),
        (decoded, codes),
        (at, view.code_at(np.array([0.5, 0.5]))),
    ):
        # As JSON the codes keep all digits; threads may add in another order.
        found = np.frombuffer(answer, "<f4").reshape(-1, 4 + 128)
        np.testing.assert_allclose(found, view.decode(expected), rtol=1e-5, atol=1e-5)
    found = client.post("/inspect", content=png(np.zeros((8, 8), np.uint8))).json()
    assert found == client.post("/inspect", content=png(np.zeros((9, 9), np.uint8))).json()
    assert (
        client.post("/example", json={"index": 4}).json()["raw"]
        == view.example(4).flatten().tolist()
    )


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/decode", b"{", "Expecting"),
        ("/decode", b"[]", "JSON object"),
        ("/decode", b"{}", "lists of 4 numbers"),
        ("/decode", b'{"codes": []}', "1 to 64"),
        ("/decode", b'{"codes": [[1, 2, 3, "x"]]}', "lists of 4 numbers"),
        ("/decode", b'{"codes": [[1, 2, 3, 1e300]]}', "below 1e"),
        ("/decode", b'{"codes": [[1, 2, 3, NaN]]}', "finite numbers, got NaN"),
        ("/decode", json.dumps({"codes": [[0.0] * 4] * 65}).encode(), "1 to 64"),
        ("/decode", b'{"point": [1, 2, 3]}', "2 numbers"),
        ("/sample", b'{"source": "prior", "n": true, "seed": 0}', "whole number"),
        ("/sample", b'{"source": "attic", "n": 1, "seed": 0}', "'attic'"),
        ("/example", b'{"index": -1}', "whole number"),
        ("/inspect", b"no image", "no image"),
    ],
)
def test_malformed_requests_are_told_what_was_expected(client, path, body, message):
    answer = client.post(path, content=body)
    assert answer.status_code == 400
    assert message in answer.text


def test_other_sites_are_refused(client):
    assert (
        client.get("/about", headers={"host": "attacker.example:8769"}).status_code == 400
    )  # DNS rebinding
    assert client.get("/about", headers={"host": "localhost:8769"}).status_code == 200
    for origin in ("http://attacker.example", "null", "http://127.0.0.1:9999"):
        assert (
            client.post("/decode", json={"point": [0, 0]}, headers={"origin": origin}).status_code
            == 403
        )
    assert (
        client.post(
            "/decode", json={"point": [0, 0]}, headers={"origin": "http://127.0.0.1:8769"}
        ).status_code
        == 200
    )
    assert client.post("/inspect", content=bytes(20_000_001)).status_code == 413


def test_ports():
    with _listen(0) as taken:
        port = taken.getsockname()[1]
        assert taken.getsockname()[0] == "127.0.0.1"
        with socket.create_connection(("127.0.0.1", port)), taken.accept()[0] as accepted:
            assert accepted.getsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY
            )  # else an answer takes 40 ms
        with pytest.raises(ValueError, match=f"port {port} cannot be used"):
            _listen(port)
    with (
        _listen(None) as first,
        _listen(None) as second,
    ):  # another is free where the default is taken
        assert first.getsockname()[1] != second.getsockname()[1]
    with pytest.raises(ValueError, match="65535"):
        _listen(70_000)


def test_other_data_are_refused(run, table):
    with pytest.raises(ValueError, match="was trained on"):
        explore(run, load_data(table))


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send")
def test_it_serves_until_interrupted(run):
    script = (
        "import sys\n"
        "from equipoise.explorer import explore\n"
        "from equipoise.run import Run\n"
        "say = lambda url: print(url, flush=True)\n"
        "explore(Run(sys.argv[1]), port=0, open_browser=False, on_ready=say)\n"
        "print('ended')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, run.folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            url = process.stdout.readline().strip()
            with urllib.request.urlopen(url, timeout=20) as answer:
                assert b"Latent space" in answer.read()
            process.send_signal(signal.SIGINT)
            printed, complaints = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert printed == "ended\n"
    assert complaints == ""


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """Serve a view and open it; the test fails if the page reports an unexpected problem."""
    opened, complaints = [], []

    def serve(view, width=1280, height=800, expected=None):
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(make_app(view), log_level="warning", lifespan="off", ws="none")
        )
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        page = browser.new_page(viewport={"width": width, "height": height})
        opened.append((page, server, thread, listener))
        page.on("pageerror", lambda error: complaints.append(str(error)))

        def listen(message):
            if message.type == "error" and not (expected and expected in message.text):
                complaints.append(message.text)

        page.on("console", listen)
        page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        page.wait_for_selector("body[data-ready]")
        return page

    yield serve
    for page, server, thread, listener in opened:
        page.close()
        server.should_exit = True
        thread.join()
        listener.close()
    assert not complaints


def pixels(page, canvas):
    return page.evaluate(
        "id => { const c = document.getElementById(id);"
        " return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data] }",
        canvas,
    )


def place(page):
    text = page.inner_text("#place").replace("\u2212", "-")
    return [float(part.split(": ")[1]) for part in text.split(", ")]


def changes(page, element, act):
    """Act, and wait until the text of an element is another."""
    before = page.inner_text(element)
    act()
    page.wait_for_function(
        "([e, before]) => document.querySelector(e).innerText !== before",
        arg=[element, before],
        timeout=5000,
    )


def test_a_drag_on_the_map_decodes_what_lies_there(open_page, view):
    page = open_page(view)
    before = pixels(page, "mean")
    box = page.locator("#map").bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    changes(page, "#place", page.mouse.down)
    changes(
        page,
        "#place",
        lambda: page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.6 * box["height"]),
    )
    page.mouse.up()
    x, y = (view.map.plane.x[[0, -1]], view.map.plane.y[[0, -1]])
    point = np.array([x[0] + 0.25 * (x[1] - x[0]), y[1] - 0.6 * (y[1] - y[0])])
    np.testing.assert_allclose(place(page), point, atol=0.1)
    shown = np.array(pixels(page, "mean")).reshape(64, 4)[:, 0]
    expected = view.decode(view.code_at(point))[0, 4:68]
    np.testing.assert_allclose(shown / 255 * 16, expected.clip(0, 16), atol=1.0)
    assert pixels(page, "mean") != before


def test_arrow_keys_move_the_point_and_may_keep_hidden_directions(open_page, view):
    page = open_page(view)
    page.focus("#map")
    start = place(page)
    changes(page, "#place", lambda: page.keyboard.press("ArrowRight"))
    step = (view.map.plane.x[-1] - view.map.plane.x[0]) / 100
    assert place(page) == pytest.approx([start[0] + step, start[1]], abs=0.011)
    page.check("#keep")
    page.focus("#map")
    changes(page, "#place", lambda: page.keyboard.press("Shift+ArrowUp"))
    step = (view.map.plane.y[-1] - view.map.plane.y[0]) / 10
    assert place(page)[1] == pytest.approx(start[1] + step, abs=0.011)


def test_a_slider_moves_its_unit_alone(open_page, view):
    page = open_page(view)
    units = lambda: {  # noqa: E731
        label: page.inner_text(f"output[for={label}]") for label in [f"unit-{u}" for u in range(4)]
    }
    before = units()
    page.focus("#unit-2")
    changes(page, "output[for=unit-2]", lambda: page.keyboard.press("ArrowRight"))
    assert [name for name, value in units().items() if value != before[name]] == ["unit-2"]


def test_an_image_is_reconstructed_and_ranked(open_page, view, tmp_path):
    page = open_page(view)
    file = tmp_path / "noise.png"
    file.write_bytes(png(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)))
    page.set_input_files("#file", file)
    page.wait_for_selector("#verdict")
    assert "Odder than 9" in page.inner_text("#verdict")
    assert "nats" in page.inner_text("#figures")
    changes(page, "#figures", lambda: page.click("#example"))


def test_a_refusal_is_told_until_something_succeeds(open_page, view, tmp_path):
    page = open_page(view, expected="400 (Bad Request)")
    (tmp_path / "text.png").write_bytes(b"no image")
    page.set_input_files("#file", tmp_path / "text.png")
    page.wait_for_selector("#problem")
    assert "no image that can be read" in page.inner_text("#problem")
    page.click("#example")
    page.wait_for_selector("#problem", state="hidden")


def test_samples_and_the_path_lead_somewhere(open_page, view):
    page = open_page(view)
    page.select_option("#source", "1")
    page.click("#draw")
    assert page.locator("#samples button").count() == 24
    changes(page, "#place", page.locator("#samples button").nth(3).click)
    here = place(page)
    page.click("#keep-b")
    page.wait_for_function("document.getElementById('path-at').value === '1'")
    changes(page, "#place", page.locator("#path button").first.click)
    changes(page, "#place", page.locator("#path button").last.click)
    assert place(page) == here


def test_a_table_on_a_telephone(open_page, table_view):
    page = open_page(table_view, 390, 844)
    assert page.locator("#columns li").count() == 6
    assert not page.locator("#map").is_visible()
    page.fill("#row", "1, 2, 3, 4, 5, 6")
    page.click("#row-form button")
    page.wait_for_selector("#verdict")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


# ---- signals, volumes and bands


@pytest.fixture(scope="module")
def other_views(tmp_path_factory):
    """Views of signals, of volumes, and of images of five bands and many latent units."""
    views = {}
    for shape, latent_dim in (((2, 16), 2), ((1, 8, 8, 8), 2), ((5, 8, 8), 20)):
        raw = np.random.default_rng(0).normal(size=(60, *shape)).astype(np.float32)
        data, folder = load_data(raw), tmp_path_factory.mktemp("explored") / "run"
        run = trained(data, folder, latent_dim=latent_dim, stage_2_epochs=0, n_components=1)
        views[len(shape)] = View(run.model(), run.mixture(), data, "run", data.test[:1])
    return views


def test_a_page_begins_with_an_example(other_views, client):
    for view in other_views.values():
        start = view.about()["start"]
        assert start == view.inspect(view.start)._asdict()
        assert start["raw"] == pytest.approx(view.start.flatten().tolist())
    assert client.get("/about").json()["start"] is None


def test_a_signal_is_read_channel_after_channel(other_views):
    view = other_views[2]
    text = " ".join(map(str, view.start.flatten()))
    np.testing.assert_allclose(view.read(text.encode()), view.start, rtol=1e-5)
    with pytest.raises(ValueError, match="32 finite numbers"):
        view.read(b"1, 2")


def test_slices_and_bands_are_chosen(open_page, other_views):
    for axes, name in ((4, "slice"), (3, "band")):
        page = open_page(other_views[axes])
        assert page.inner_text("#verdict")
        before = pixels(page, "mean"), pixels(page, "input")
        count = other_views[axes].model.shape[axes - 3]
        page.locator(f"#{name}").fill(str(count))
        assert page.locator(f"#{name}-at").inner_text() == f"{count} of {count}"
        assert (pixels(page, "mean"), pixels(page, "input")) != before
        hidden = {"slice": "band", "band": "slice"}[name]
        assert not page.locator(f"#{hidden}-label").is_visible()


def test_a_part_of_the_units_says_so_and_leads_to_the_others(open_page, other_views):
    page = open_page(other_views[3], 390, 844)
    panel = page.locator("#units-panel")
    assert "Showing 16 of 20 units" in panel.inner_text()
    assert panel.locator(".unit:visible").count() == 16
    panel.locator("button").click()
    assert panel.locator(".unit:visible").count() == 20
    assert "Showing 20 of 20 units" in panel.inner_text()


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_other_data_on_a_telephone(open_page, other_views, axes):
    page = open_page(other_views[axes], 390, 844)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#std").is_visible() == (axes > 2)
    assert len(set(pixels(page, "mean"))) > 2
