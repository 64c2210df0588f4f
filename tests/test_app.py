"""The page in a real browser: upload, result, slider; what is no picture; who may reach it."""

import re
import shutil

import numpy as np
import pytest
import skimage.data
from PIL import Image
from runs import ROOT, free_port, start

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
QUIET += ["disable-component-update", "disable-sync"]


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A photograph of a person, one of none, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("photographs")
    Image.fromarray(skimage.data.astronaut()).save(folder / "astronaut.jpg")
    Image.fromarray(np.full((300, 300, 3), 90, np.uint8)).save(folder / "grey.png")
    (folder / "page.jpg").write_text("<!doctype html><p>quota exceeded")
    return folder


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
    program = ["python", str(ROOT / "app.py"), "--checkpoints", str(checkpoints)]
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


def test_a_photograph_gives_faces_bars_and_what_the_model_looks_at(page, photographs):
    upload(page, photographs / "astronaut.jpg")
    page.get_by_text("1 face", exact=True).wait_for()
    bars = page.locator("#bars")
    for name in ("Surprise", "Fear", "Disgust", "Happy", "Sad", "Anger", "Neutral"):
        bars.get_by_text(name).first.wait_for()
    shares = [int(text) for text in re.findall(r"(\d+)%", bars.inner_text())]
    assert len(shares) == 7
    assert abs(sum(shares) - 100) <= 4  # rounded
    assert page.get_by_alt_text("What the model looks at").count() >= 0
