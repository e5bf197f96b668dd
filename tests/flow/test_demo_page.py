"""The demo page in a real Chromium: what it shows is what ONNX Runtime computes for the same images on this machine."""

import base64
import gzip
import http.client
import io
import json
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from helpers import clipress
from PIL import Image
from small_exports import LABELS, write_classifier, write_segmenter

import clipress as package
from clipress.errors import ArtifactError, BackendMissing, DataError, RecipeError
from clipress.export.layouts import web
from clipress.runtime.export_folder import read_export
from clipress.serve.page_server import PageServer
from clipress.studies.browser import CHROMIUM, opened_browser, write_video
from clipress.workflow.demo import DemoRequest, page_of

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
WORDS = ["a red square", "two blue circles", "the digit seven", "a green triangle"]
needs_page = pytest.mark.skipif(CHROMIUM is None or not web.VENDOR.is_dir(), reason="needs Chromium, and `make web`")


@contextmanager
def served(run, **request):
    server = page_of(run, DemoRequest(**{"labels": WORDS, **request}), print)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def run(tiny_run):
    return tiny_run[0]


@pytest.fixture(scope="module")
def picture():
    """A smooth picture that is not square: video has a color per four pixels, and sharp edges would blur."""
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return np.asarray(small.resize((320, 240), Image.Resampling.BICUBIC))


@pytest.fixture
def camera(picture, tmp_path):
    return write_video(tmp_path / "camera.y4m", picture)


@pytest.fixture
def folder(tmp_path):
    """A folder of images in several sizes and modes, one of which is broken."""
    home, rng = tmp_path / "photos", np.random.default_rng(4)
    home.mkdir()
    for name, size in {
        "wide.png": (40, 90, 3),
        "high.png": (60, 31, 3),
        "small.png": (9, 12, 3),
        "same.png": (32, 32, 3),
    }.items():
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(home / name)
    Image.fromarray(rng.integers(0, 256, (50, 60), np.uint8), "L").save(home / "grey.png")
    (home / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is no image")
    return home


def visited(context, server):
    """Open the page, and wait until its program runs."""
    page = context.new_page()
    page.goto(server.url)
    sync_api.expect(page.locator("#title")).not_to_be_empty()
    return page


def shown(page, card=0):
    """Return the probabilities that an answer shows, by label."""
    rows = page.locator("article").nth(card).locator("li")
    rows.first.wait_for()
    found = rows.evaluate_all("rows => rows.map((row) => [row.dataset.label, Number(row.dataset.probability)])")
    return dict(found)


def seen(page, card=0):
    """Return the probabilities that an answer shows of a frame after the camera's first ones, which may be blank."""
    page.evaluate(
        """async (card) => {
          const video = document.getElementById("video");
          for (let i = 0; i < 5; i++) await new Promise((done) => video.requestVideoFrameCallback(done));
          const figure = document.querySelectorAll("[data-figure=run]")[card]; // It is written once per frame.
          for (let i = 0; i < 3; i++) {
            await new Promise((done) => {
              const observer = new MutationObserver(() => (observer.disconnect(), done()));
              observer.observe(figure, {childList: true});
            });
          }
        }""",
        card,
    )
    return shown(page, card)


def frame_of(page):
    """Return what the camera shows, as the page's own pixels."""
    data = page.evaluate(
        """() => {
          const video = document.getElementById("video");
          const canvas = Object.assign(document.createElement("canvas"), {width: video.videoWidth, height: video.videoHeight});
          canvas.getContext("2d").drawImage(video, 0, 0);
          return canvas.toDataURL("image/png");
        }"""
    )
    return Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB")


def assert_classified(found, model, image, labels=WORDS):
    expected = model.classify(image, labels, "a photo of {}")
    assert found.keys() == set(labels)
    np.testing.assert_allclose([found[label] for label in labels], expected, atol=1e-3)


@needs_page
@pytest.mark.parametrize("python", [False, True])
@pytest.mark.parametrize("stage", ["recovered", "int8"])
def test_it_classifies_what_the_camera_sees_as_onnx_runtime_does(run, camera, picture, stage, python):
    with served(run, stage=stage, python=python) as server, opened_browser(camera) as (context, said):
        page = visited(context, server)
        model = package.load(run / stage)
        found = seen(page)
        frame = frame_of(page)
        assert frame.size == (640, 480) or frame.size == (320, 240)
        assert_classified(found, model, frame)
        assert np.abs(np.asarray(frame.resize((320, 240)), float) - picture).mean() < 12  # it is our video
        page.get_by_label("Labels, one per line").fill("a cat, a dog\n a cat,,a house")
        sync_api.expect(page.locator("article li")).to_have_count(3)
        assert_classified(seen(page), model, frame_of(page), ["a cat", "a dog", "a house"])
        assert ("Python" if python else "WebAssembly") in page.locator("article .note").inner_text()
        button = page.locator("#camera")  # The camera has been allowed before, so it is on from the start.
        button.click()
        assert (
            page.evaluate("document.getElementById('video').srcObject") is None
            and button.inner_text() == "Start camera"
        )
        button.click()
        sync_api.expect(page.locator("#video")).to_be_visible()
        sync_api.expect(button).to_have_text("Stop camera")
        assert not said


@needs_page
def test_an_image_of_any_size_is_prepared_as_pillow_does_and_a_long_text_keeps_its_end(run, folder):
    labels = ["word " * 60, "naïve café, Straße", "猫", "It's 42 o'clock"]
    stage, model = "int8", package.load(run / "int8")
    with served(run, stage=stage) as server, opened_browser() as (context, said):
        page = visited(context, server)
        page.get_by_label("Labels, one per line").fill("\n".join(label.replace(",", "") for label in labels))
        labels = [label.replace(",", "").strip() for label in labels]
        for name in ("wide.png", "high.png", "small.png", "same.png", "grey.png"):
            page.evaluate("document.querySelectorAll('article li').forEach((row) => row.remove())")
            page.locator("#file").set_input_files(folder / name)
            sync_api.expect(page.locator("article li")).to_have_count(4)
            assert_classified(shown(page), model, folder / name, labels)
        assert not said


@needs_page
@pytest.mark.parametrize(
    "how",
    [
        {"resize_mode": "squash"},
        {"resize_mode": "longest", "fill_color": 90},
        {"interpolation": "bilinear", "crop_pct": 0.7},
    ],
)
def test_every_way_of_resizing_gives_the_models_input_exactly(run, folder, how):
    from clipress.data.transforms import Preprocess, fitted, normalised, open_image

    preprocess = Preprocess(**{"size": 24, **how})
    with served(run) as server, opened_browser() as (context, _):
        page = visited(context, server)
        for path in sorted(folder.glob("*.png")):
            image = open_image(path)
            pixels = np.dstack([np.asarray(image), np.full(image.size[::-1], 255)])
            found = page.evaluate(
                """async ([values, width, height, how]) => {
                  const {inputOf} = await import("/preprocess.js");
                  return [...inputOf({data: Uint8ClampedArray.from(values), width, height}, how)];
                }""",
                [pixels.ravel().tolist(), *image.size, preprocess.model_dump()],
            )
            wanted = normalised(fitted(image, preprocess)[None], preprocess)
            if path.name == "high.png":  # Newer Pillows round another pass of such an image first.
                assert np.abs(np.reshape(found, wanted.shape) - wanted).mean() < 0.25 / 255 / 0.26
            else:
                np.testing.assert_allclose(np.reshape(found, wanted.shape), wanted, atol=1e-6)


@needs_page
def test_it_searches_a_folder_by_words_and_names_what_it_cannot_read(run, folder):
    model = package.load(run / "int8")
    names = sorted(path.name for path in folder.glob("*.png"))
    with served(run, stage="int8") as server, opened_browser() as (context, said):
        page = visited(context, server)
        page.get_by_role("tab", name="Search").click()
        page.locator("#folder").set_input_files(folder)
        sync_api.expect(page.locator("#progress span")).to_have_text("5 images")
        assert page.locator("#broken").inner_text() == "Not read, 1: photos/broken.jpg"
        for query in ("a red square", "seven"):
            page.get_by_label("Words").fill(query)
            sync_api.expect(page.locator("#found")).to_have_attribute("data-query", query)
            scores = model.encode_image([folder / name for name in names]) @ model.encode_text(query)[0]
            rows = page.locator("#found li").evaluate_all(
                "rows => rows.map((row) => [row.dataset.name, Number(row.dataset.score)])"
            )
            assert [score for _, score in rows] == sorted((score for _, score in rows), reverse=True)
            np.testing.assert_allclose([dict(rows)[name] for name in names], scores, atol=1e-3)
        assert {image.get_attribute("alt") for image in page.locator("#found img").all()} == set(names)
        assert not said


@needs_page
def test_it_compares_two_models_on_the_same_frame(run, camera):
    with served(run, stage="int8", compare="recovered") as server, opened_browser(camera) as (context, said):
        page = visited(context, server)
        page.get_by_role("tab", name="Compare").click()
        for card, stage in enumerate(("recovered", "int8")):
            assert_classified(seen(page, card), package.load(run / stage), frame_of(page))
            assert "ms" in page.locator("[data-figure=run]").nth(card).inner_text()
        page.locator("article select").nth(0).select_option("pruned")
        sync_api.expect(page.locator("#status")).to_contain_text("pruned was ready")
        assert not said


@needs_page
@pytest.mark.parametrize("width", [375, 1280])
def test_it_fits_a_phone_works_by_keyboard_and_every_control_has_a_name(run, camera, folder, width):
    with served(run) as server, opened_browser(camera, width) as (context, said):
        page = visited(context, server)
        page.get_by_role("tab", name="Classify").focus()
        for view in ("Search", "Compare", "Classify", "Compare"):
            page.keyboard.press("ArrowRight" if view != "Compare" or page.locator("#search").is_visible() else "End")
            assert page.get_by_role("tab", name=view).get_attribute("aria-selected") == "true"
            assert page.evaluate("document.activeElement.textContent") == view
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_role("button", name="Stop camera").press("Enter")
        page.get_by_role("button", name="Start camera").press("Enter")
        shown(page, 1)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("input, select, textarea, button, video, img")].filter((one) => !one.hidden
              && !(one.labels?.length || one.textContent.trim() || one.ariaLabel || one.alt)).map((one) => one.outerHTML)"""
        )
        assert unnamed == [] and not said


@needs_page
def test_a_refused_camera_is_one_sentence_that_says_what_to_do(run):
    with served(run) as server, opened_browser() as (context, said):
        page = visited(context, server)
        sync_api.expect(page.locator("#status")).to_contain_text("ready")
        for name, words in {
            "NotAllowedError": "was refused. Allow it",
            "NotFoundError": "No camera was found. Connect",
        }.items():
            page.evaluate(
                "(name) => { navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('no', name)); }",
                name,
            )
            page.get_by_role("button", name="Start camera").click()
            sync_api.expect(page.locator("#status")).to_contain_text(words)
            assert page.get_by_role("button", name="Start camera").is_enabled()
        assert not said


@needs_page
def test_a_classifier_shows_its_own_labels_and_has_nothing_to_search(tmp_path, folder):
    export = write_classifier(tmp_path / "e")
    with served(export) as server, opened_browser() as (context, said):
        page = visited(context, server)
        page.locator("#file").set_input_files(folder / "wide.png")
        expected = package.load(export).classify(folder / "wide.png")
        sync_api.expect(page.locator("article li")).to_have_count(4)
        found = shown(page)
        np.testing.assert_allclose([found[label] for label in LABELS], expected, atol=1e-3)
        for view in ("Search", "Compare"):
            assert page.get_by_role("tab", name=view).is_disabled()
        assert not said


@needs_page
def test_the_web_layout_is_a_folder_that_any_static_host_serves_one_thread_included(run, folder):
    result = clipress("export", run, "--stage", "int8", "--layout", "web")
    assert result.exit_code == 0, result.output
    home = run / "web" / "int8"
    assert {"LICENSE.onnxruntime", "LICENSE.tokenizers"} <= {path.name for path in home.rglob("LICENSE.*")}
    files = {path.relative_to(home).as_posix(): path for path in home.rglob("*") if path.is_file()}
    host = PlainHost(files)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    with opened_browser() as (context, said):
        page = visited(context, host)
        assert not page.evaluate("crossOriginIsolated")
        page.get_by_label("Labels, one per line").fill("\n".join(WORDS))
        page.locator("#file").set_input_files(folder / "wide.png")
        sync_api.expect(page.locator("article li")).to_have_count(4)
        assert_classified(shown(page), package.load(run / "int8"), folder / "wide.png")
        assert not said
    host.shutdown()
    host.server_close()


class PlainHost(PageServer):
    """A host that sends no headers of isolation, as most static ones do not."""

    def finish_request(self, request, client_address):
        handler = type("Plain", (self.RequestHandlerClass,), {"HEADERS": {}})
        handler(request, client_address, self)


def asked(server, method, path, headers=None, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


@pytest.fixture
def site(monkeypatch, tmp_path):
    """The page without what npm brings, which these tests do not need."""
    monkeypatch.setattr(web, "VENDOR", tmp_path)


def test_only_the_page_itself_may_ask_and_only_for_what_it_has(run, site):
    with served(run, python=True, stage="int8") as server:
        assert asked(server, "GET", "/")[0] == 200
        status, _, headers = asked(server, "GET", "/models/int8/image.onnx")
        assert status == 200 and headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert asked(server, "GET", "/", {"Host": "evil.example"})[0] == 403
        assert asked(server, "POST", "/run/int8/image?shape=1", {"Origin": "http://evil.example"}, b"0000")[0] == 403
        for path in ("/../pyproject.toml", "/%2e%2e/recipe.yaml", "/models", "/etc/passwd", "//etc/passwd"):
            assert asked(server, "GET", path)[0] == 404
        for path, body in (("/run/int8/other?shape=1", b"0000"), ("/run/int8/image?shape=1", b""), ("/run", b"0000")):
            assert asked(server, "POST", path, body=body)[0] == 404
        for shape in ("1,3,2,2", "1", "", "a", "-1"):
            status, reason, _ = asked(server, "POST", f"/run/int8/image?shape={shape}", body=b"00000000")
            assert status == 400 and reason
        exported = read_export(run / "export" / "int8")
        pixels = exported.graphs["image"].example(2)["pixel_values"]
        shape = ",".join(map(str, pixels.shape))
        status, content, _ = asked(server, "POST", f"/run/int8/image?shape={shape}", body=pixels.tobytes())
        found = np.frombuffer(content, np.float32).reshape(2, -1)
        assert status == 200
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_what_cannot_be_shown_is_left_out_and_said_and_mistakes_are_one_message(run, tmp_path, site):
    said = []
    with pytest.raises(ArtifactError, match="none of its exports can be shown"):
        page_of(write_segmenter(tmp_path / "s"), DemoRequest(), said.append)
    assert said == [
        "int8 is left out: the page shows CLIPs and classifiers with labels, and this is a model for 'segmentation'."
    ]
    with pytest.raises(ArtifactError, match="expected a run with exports"):
        page_of(tmp_path, DemoRequest(), print)
    with pytest.raises(RecipeError, match=r"--compare int9: the page has no such model\. Did you mean 'int8'"):
        page_of(run, DemoRequest(compare="int9"), print)
    with pytest.raises(DataError, match=r"'a photo': expected one placeholder for the class name"):
        page_of(run, DemoRequest(template="a photo"), print)
    with pytest.raises(RecipeError, match=r"--template simple: expected one template, found 7\."):
        page_of(run, DemoRequest(template="simple"), print)
    with served(run) as server:
        result = clipress("demo", run, "--no-open", "--port", server.server_address[1])
    assert result.exit_code == 2 and "Choose another one: --port" in result.output


@pytest.mark.skipif(not web.VENDOR.is_dir(), reason="needs `make web`")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_without_an_error(run, number):
    command = [sys.executable, "-m", "clipress", "demo", run, "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        while not (line := job.stdout.readline()).startswith("http://"):
            assert line, job.stderr.read()
        job.send_signal(number)
        assert job.communicate(timeout=60) == ("", "")
    assert job.returncode == 0


def test_a_template_may_be_spelt_as_for_other_commands(run, site):
    with served(run, template="a drawing of {label}") as server:
        assert json.loads(asked(server, "GET", "/site.json")[1])["template"] == "a drawing of {}"


def test_what_runs_graphs_in_the_browser_is_not_unpacked_where_python_runs_them(monkeypatch, tmp_path):
    (tmp_path / "vendor").mkdir()
    (tmp_path / "index.html").write_text("page")
    (tmp_path / "vendor" / "ort.wasm.gz").write_bytes(gzip.compress(b"code"))
    monkeypatch.setattr(web, "PAGE", tmp_path)
    monkeypatch.setattr(web, "VENDOR", tmp_path / "vendor")
    in_browser, in_python = (web.site_of([], web.Page("t", "a", "a", python=python)) for python in (False, True))
    assert in_browser["vendor/ort.wasm"] == b"code"
    assert in_browser.keys() - in_python.keys() == {"vendor/ort.wasm"}


def test_without_what_npm_brings_it_names_the_command(run, monkeypatch, tmp_path):
    monkeypatch.setattr(web, "VENDOR", tmp_path / "nothing")
    with pytest.raises(BackendMissing, match="make web"):
        page_of(run, DemoRequest(), print)
