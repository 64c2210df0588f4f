"""The page in a real browser: uploads, results, masks, bad files, and who can reach it."""

import json
import os
import re
import shutil
import socket
import stat
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

import app
from datasets.faces.detection import open_detector
from inference.page import EXAMPLES, INVITATION, Checkpoints, explain_faces, faces_in
from inference.predict import Predictor
from models_saved import open_classifier
from runs import ROOT, free_port, run_here, start
from util.errors import BAD_INPUT, DONE, FAULT, BadInput

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
def temporary(tmp_path_factory):
    """The folder for the program's temporary files."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def address(checkpoints, temporary):
    """The address of the page, while the program runs."""
    port = free_port()
    program = [sys.executable, str(ROOT / "app.py"), "--checkpoints", str(checkpoints)]
    process = start([*program, "--port", str(port)], TMPDIR=str(temporary))
    line = process.stdout.readline()
    assert line.startswith(f"http://127.0.0.1:{port} on cpu"), line + process.stdout.read()
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.communicate()
    assert process.returncode == DONE
    assert not list(temporary.rglob("*.*")), "pictures are left"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium: the machine's or else Playwright's."""
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
    """The source of a picture on the page."""
    return picture.locator("img").get_attribute("src")


def test_a_photograph_gives_probabilities_and_an_attention_map(page, photographs, checkpoints):
    upload(page, photographs / "people" / "astronaut.jpg")
    page.get_by_text("1 face; faces are cropped with --face_margin").wait_for()
    bars = page.locator("#bars")
    saved = open_classifier(checkpoints / "fine-tuning" / "checkpoint-best.pth")
    pictures, _ = faces_in(photographs / "people" / "astronaut.jpg", open_detector("mtcnn"), saved)
    (p,) = Predictor(saved, torch.device("cpu")).of_faces(pictures).probabilities
    for name, share in zip(saved.classes, p, strict=True):
        row = bars.locator("button", has_text=name)
        assert f"{100 * share:.0f}%" in row.inner_text()
    assert saved.classes[p.argmax()] in bars.locator("h2").inner_text()
    assert page.locator("#attention img").bounding_box()["height"] > 300


def test_one_of_several_faces_can_be_chosen(page, photographs):
    upload(page, photographs / "people" / "two.jpg")
    page.get_by_text("2 faces, the largest first").wait_for()
    thumbnails = page.locator(".thumbnail-item, .gallery-item button").locator("visible=true")
    first = source(page.locator("#attention"))
    thumbnails.nth(1).click()
    page.wait_for_function(
        "old => document.querySelector('#attention img').getAttribute('src') != old", arg=first
    )


def test_a_synthetic_face_is_used_whole_and_a_photograph_searched_for_faces(page, photographs):
    drawn = page.locator(".gallery button, button.gallery-item").locator("visible=true")
    drawn.first.wait_for()
    assert drawn.count() == EXAMPLES
    drawn.nth(2).click()
    page.get_by_text(re.compile(rf"^Each picture is used whole.*{app.TICK}\.$")).wait_for()
    page.locator("#attention img").wait_for()
    upload(page, photographs / "people" / "two.jpg")
    page.get_by_label("Find faces in the picture").locator("visible=true").check()
    page.get_by_text("2 faces, the largest first").wait_for()


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
    wait_for_another()
    number = page.locator("#ratio input[type=number]")
    number.fill("0.5")
    number.press("Enter")
    wait_for_another()
    assert len(set(seen)) == 3
    for _ in range(50):  # two of four patches are visible: one in six new masks equals the old one
        page.get_by_role("button", name="New mask").click()
        page.wait_for_timeout(200)
        if source(picture) not in seen:
            return
    raise AssertionError("New mask makes no new mask")


def test_pictures_without_faces_and_unreadable_files_are_explained(page, photographs):
    upload(page, photographs / "grey.png")
    page.get_by_text("No face was found, so the whole picture is used as a face.").wait_for()
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    page.get_by_text(INVITATION).first.wait_for()
    assert page.locator("#attention img").count() == 0
    upload(page, photographs / "page.jpg")
    page.get_by_text("This picture cannot be read (is a web page, not an image").wait_for()
    upload(page, photographs / "bomb.png")
    page.get_by_text("This picture cannot be read (has more than 89,478,485 pixels").wait_for()
    upload(page, photographs / "people" / "astronaut.jpg")  # the page still works
    page.get_by_text("1 face; faces are cropped with --face_margin").wait_for()


def test_the_page_uses_no_network_and_writes_nothing_to_the_repository(browser, address):
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
        probe.connect(("10.255.255.255", 1))  # sends nothing, but chooses this machine's address
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


def ask(address, picture, checkpoint):
    """The answer of the page's function to a request that the page did not make."""
    data = json.dumps({"data": [picture, False, checkpoint]}).encode()
    call, kind = f"{address}/gradio_api/call/judge", {"Content-Type": "application/json"}
    request = urllib.request.Request(call, data, kind)
    with urllib.request.urlopen(request, timeout=30) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}", timeout=30) as answer:
        return answer.read().decode()


@pytest.mark.parametrize("more", [{}, {"meta": {"_type": "gradio.FileData"}}, {"is_stream": True}])
def test_a_request_cannot_read_files_of_the_machine(more, address, photographs, temporary):
    (private,) = temporary.glob("mae-sfer-*")
    name = "fine-tuning/checkpoint-best.pth"
    grey = str(photographs / "grey.png")
    for path in (grey, "/etc/passwd", f"{private}/../{private.name}", f"{private}/../x", "x\0"):
        assert "event: error" in ask(address, {"path": path, **more}, name)
    shown = ask(address, {"path": f"{private}/face-1.png", **more}, name)
    assert "event: complete" in shown
    assert app.TICK in shown


def test_other_users_of_the_machine_cannot_see_pictures(address, temporary):
    (private,) = temporary.glob("mae-sfer-*")
    assert stat.S_IMODE(os.stat(private).st_mode) == 0o700
    request = urllib.request.Request(f"{address}/monitoring")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=30)


@pytest.mark.parametrize(
    ("more", "let_through"),
    [
        ({}, True),
        ({"Origin": "{address}"}, True),
        ({"Host": "localhost:9", "Origin": "http://localhost:9"}, True),  # a forwarded port
        ({"Origin": "http://elsewhere.example"}, False),
        ({"Origin": "http://localhost:1"}, False),
        ({"Origin": "null"}, False),
        ({"Host": "elsewhere.example:7860"}, False),
        ({"Host": "127.0.0.1.elsewhere.example"}, False),
        ({"Host": "["}, False),
    ],
)
def test_pages_of_other_sites_are_refused(more, let_through, address):
    headers = {name: value.format(address=address) for name, value in more.items()}
    request = urllib.request.Request(f"{address}/config", headers=headers)
    if let_through:
        assert urllib.request.urlopen(request, timeout=30).status == 200
        return
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    assert error.value.code in (400, 403)


def test_on_a_phone_nothing_is_cut_off_or_covered(browser, address, photographs):
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.goto(address)
    page.get_by_text("What a model sees in a face").wait_for()
    upload(page, photographs / "people" / "two.jpg")
    page.get_by_text("2 faces, the largest first").wait_for()
    page.locator("#attention img").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    boxes = [
        page.locator(f"#faces {part}").first.bounding_box()
        for part in ("label", ".thumbnail-item", ".grid-wrap")
    ]
    page.close()
    (label, _), (face, face_end), (_, end) = ((b["y"], b["y"] + b["height"]) for b in boxes)
    assert label + boxes[0]["height"] <= face
    assert face_end <= end


def test_checkpoints_are_listed_by_kind_without_other_files(checkpoints):
    found = Checkpoints(checkpoints, torch.device("cpu"))
    assert found.classifiers == ["fine-tuning/checkpoint-best.pth"]
    assert found.autoencoders == ["pre-training/checkpoint-last.pth"]
    with pytest.raises(BadInput, match=r"\.\./x: no such checkpoint"):
        found.classifier("../x")


def test_classifiers_are_sorted_by_their_best_result(checkpoints, tmp_path):
    saved = torch.load(checkpoints / "fine-tuning" / "checkpoint-best.pth", weights_only=True)
    results = {"a/checkpoint-best.pth": 20.0, "b/checkpoint-best.pth": 30.5}
    results |= {"a/checkpoint-last.pth": 90.0, "c/checkpoint-best.pth": "?"}
    for name, best in results.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({**saved, "best": best}, tmp_path / name)
    order = ["b/checkpoint-best.pth", "a/checkpoint-best.pth", "c/checkpoint-best.pth"]
    found = Checkpoints(tmp_path, torch.device("cpu"))
    assert found.classifiers == [*order, "a/checkpoint-last.pth"]


def test_a_checkpoint_that_a_run_has_replaced_is_loaded_again(checkpoints, finetune, tmp_path):
    path = tmp_path / "checkpoint-last.pth"
    shutil.copy(checkpoints / "fine-tuning" / "checkpoint-best.pth", path)
    found = Checkpoints(tmp_path, torch.device("cpu"))
    first = found.classifier(path.name)
    assert found.classifier(path.name) is first
    shutil.copy(finetune("convnext") / "checkpoint-best.pth", tmp_path / "new")
    (tmp_path / "new").replace(path)
    assert found.classifier(path.name)[0].name.startswith("convnextv2")
    path.unlink()
    with pytest.raises(BadInput, match=r"can no longer be read .*; choose another"):
        found.classifier(path.name)


def test_a_checkpoint_with_non_finite_outputs_is_reported(checkpoints, tmp_path):
    saved = torch.load(checkpoints / "fine-tuning" / "checkpoint-best.pth", weights_only=True)
    saved["model"]["head.weight"][:] = 3e38
    torch.save(saved, tmp_path / "lost.pth")
    found = Checkpoints(tmp_path, torch.device("cpu"))
    with pytest.raises(BadInput, match="outputs are not finite; choose another"):
        explain_faces(*found.classifier("lost.pth"), [np.zeros((30, 30, 3), np.uint8)])


def test_wrong_options_give_one_error_line(tmp_path, capfd, monkeypatch):
    def said(options):
        assert run_here(app, options) == BAD_INPUT
        (line,) = capfd.readouterr().err.splitlines()
        return line

    monkeypatch.chdir(tmp_path)
    margin = ["--checkpoints", str(tmp_path), "--detector", "none", "--face_margin", "0.2"]
    assert "--face_margin: without a detector pictures are used whole" in said(margin)
    assert "demo: no such folder; run `make demo`" in said([])
    line = said(["--checkpoints", str(tmp_path)])
    assert "none of its 0 files is a checkpoint that can be shown" in line
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install -r requirements/app.txt" in said(["--checkpoints", str(tmp_path)])


def test_a_port_in_use_is_reported(checkpoints, address, capfd):
    port = address.rpartition(":")[2]
    assert run_here(app, ["--checkpoints", str(checkpoints), "--port", port]) == FAULT
    assert f"--port {port}: is already in use; choose another" in capfd.readouterr().err
