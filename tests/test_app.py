"""The page in a real browser: upload, result, slider; what is no picture; who may reach it."""

import shutil
import socket
import sys
import urllib.error
import urllib.request

import pytest
import torch
from runs import ROOT, free_port, run_here, start

import app
from datasets.faces import open_detector
from engine_page import Checkpoints, faces_in
from engine_predict import Predictor
from models_saved import open_classifier
from util.errors import BAD_INPUT, FAULT, BadInput
from util.options_predict import MARGIN

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
QUIET += ["disable-component-update", "disable-sync"]


@pytest.fixture(scope="session")
def checkpoints(finetune, pretrained, tmp_path_factory):
    """A folder as the demo leaves it: a fine-tuned model and a pre-trained one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, source in (
        ("fine-tuning/checkpoint-best.pth", finetune() / "checkpoint-best.pth"),
        ("pre-training/checkpoint-last.pth", pretrained["vit"]),
    ):
        (folder / name).parent.mkdir()
        (folder / name).symlink_to(source)
    (folder / "other.pth").write_bytes(b"no checkpoint")
    return folder


@pytest.fixture(scope="module")
def address(checkpoints):
    """The page's, while the program runs."""
    port = free_port()
    program = [sys.executable, str(ROOT / "app.py"), "--checkpoints", str(checkpoints)]
    process = start([*program, "--port", str(port)])
    line = process.stdout.readline()
    assert line.startswith(f"http://127.0.0.1:{port} on cpu"), line + process.stdout.read()
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium: the machine's, else Playwright's own."""
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=[f"--{flag}" for flag in ["no-sandbox", *QUIET]]
            )
        except Error:
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(30_000)
    page.goto(address)
    page.get_by_text("What a model sees in a face").wait_for()
    yield page
    page.close()


def upload(page, path, tab=0):
    page.locator("input[type=file]").nth(tab).set_input_files(path)


def source(picture):
    """What a picture on the page shows."""
    return picture.locator("img").get_attribute("src")


def test_a_photograph_gives_bars_and_what_the_model_looks_at(page, photographs, checkpoints):
    upload(page, photographs / "people" / "astronaut.jpg")
    page.get_by_text("1 face", exact=True).wait_for()
    bars = page.locator("#bars")
    saved = open_classifier(checkpoints / "fine-tuning" / "checkpoint-best.pth")
    pictures, _ = faces_in(photographs / "people" / "astronaut.jpg", open_detector("mtcnn"), MARGIN)
    (p,) = Predictor(saved, torch.device("cpu"))(pictures).probabilities
    for name, share in zip(saved.classes, p, strict=True):
        row = bars.locator("button", has_text=name)
        assert f"{100 * share:.0f}%" in row.inner_text()
    assert saved.classes[p.argmax()] in bars.locator("h2").inner_text()
    assert page.locator("#attention img").bounding_box()["height"] > 300


def test_of_several_faces_one_is_chosen(page, photographs):
    upload(page, photographs / "people" / "two.jpg")
    page.get_by_text("2 faces, the largest first").wait_for()
    thumbnails = page.locator(".thumbnail-item, .gallery-item button").locator("visible=true")
    first = source(page.locator("#attention"))
    thumbnails.nth(1).click()
    page.wait_for_function(
        "old => document.querySelector('#attention img').getAttribute('src') != old", arg=first
    )


def test_masks_follow_the_slider_and_the_button(page, photographs):
    page.get_by_role("tab", name="Masks").click()
    upload(page, photographs / "people" / "astronaut.jpg", tab=1)
    picture = page.locator("#reconstruction")
    picture.locator("img").wait_for()
    seen = [source(picture)]
    changed = "seen => !seen.includes(document.querySelector('#reconstruction img').src)"

    def wait_for_another():
        page.wait_for_function(changed, arg=seen)
        seen.append(source(picture))

    ratio = page.locator("#ratio input[type=range]")
    ratio.focus()
    ratio.press("Home")
    ratio.dispatch_event("pointerup")
    wait_for_another()
    page.get_by_role("button", name="New mask").click()
    wait_for_another()
    assert len(set(seen)) == 3


def test_no_face_and_no_picture_are_told_kindly(page, photographs):
    upload(page, photographs / "grey.png")
    page.get_by_text("No face was found, so all of the picture is taken for one.").wait_for()
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    page.get_by_text(app.INVITATION).first.wait_for()
    assert page.locator("#attention img").count() == 0
    upload(page, photographs / "page.jpg")
    page.get_by_text("This is no picture that can be read (is a web page, not an image").wait_for()
    upload(page, photographs / "bomb.png")
    page.get_by_text("no picture that can be read (has more than 89,478,485 pixels").wait_for()
    upload(page, photographs / "people" / "astronaut.jpg")  # and it goes on
    page.get_by_text("1 face", exact=True).wait_for()


def test_the_page_asks_nothing_of_the_network_and_writes_nothing_here(browser, address):
    asked, before = [], {path.name for path in ROOT.iterdir()}
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.get_by_text("What a model sees in a face").wait_for()
    page.wait_for_load_state("load")
    page.close()
    assert asked
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
    assert {path.name for path in ROOT.iterdir()} == before


def test_only_this_machine_reaches_the_page(address):
    port = int(address.rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))  # nothing is sent; says which address it would be from
        own = probe.getsockname()[0]
    if own.startswith("127."):
        pytest.skip("this machine has no address but its own")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((own, port), timeout=5)


def test_a_file_that_is_too_large_is_refused(address):
    def send(size):
        edge = "x" * 20
        body = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
        data = body.encode() + bytes(size) + f"\r\n--{edge}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={edge}"}
        request = urllib.request.Request(f"{address}/gradio_api/upload", data, kind)
        return urllib.request.urlopen(request, timeout=30).status

    assert send(1000) == 200
    with pytest.raises(urllib.error.HTTPError) as error:
        send(app.MOST_BYTES + 2**20)
    assert error.value.code in (400, 413)


def test_files_of_the_machine_are_not_served(address, checkpoints):
    for path in ("/etc/passwd", checkpoints / "other.pth", ROOT / "app.py"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=30)
        assert error.value.code in (403, 404)


def test_checkpoints_are_told_apart_and_others_left_out(checkpoints):
    found = Checkpoints(checkpoints, torch.device("cpu"))
    assert found.classifiers == ["fine-tuning/checkpoint-best.pth"]
    assert found.autoencoders == ["pre-training/checkpoint-last.pth"]
    with pytest.raises(BadInput, match=r"\.\./x: no such checkpoint"):
        found.classifier("../x")


def test_what_cannot_be_shown_is_one_line(tmp_path, capfd, monkeypatch):
    def said(options):
        assert run_here(app, options) == BAD_INPUT
        (line,) = capfd.readouterr().err.splitlines()
        return line

    monkeypatch.chdir(tmp_path)
    assert "demo: no such folder; run `make demo`" in said([])
    assert "none of 0 files is a checkpoint to show" in said(["--checkpoints", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install -r requirements-app.txt" in said(["--checkpoints", str(tmp_path)])


def test_a_port_that_is_taken_is_told(checkpoints, address, capfd):
    port = address.rpartition(":")[2]
    assert run_here(app, ["--checkpoints", str(checkpoints), "--port", port]) == FAULT
    assert f"--port {port}: is taken; name another" in capfd.readouterr().err
