"""The page in a real browser: uploads, results, masks, bad files, and who can reach it."""

import csv
import itertools
import json
import os
import shutil
import socket
import stat
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

import app
from datasets.faces.detection import Face, open_detector
from inference import page_picture
from inference.explanation import attention_map
from inference.page import Checkpoints, Seen, explain_faces, face_table
from inference.page_html import about, data_link, heat_caption
from inference.page_picture import PHOTOGRAPHS, SYNTHETIC, Finder, Picture, example_pictures
from inference.page_tabs import INVITATION
from inference.predict import Prediction, Predictor
from models_saved import open_classifier
from runs import ROOT, free_port, run_here, start
from util.errors import BAD_INPUT, DONE, FAULT, BadInput
from util.predictions import COLUMNS

FIRST, SECOND = "fine-tuning/checkpoint-best.pth", "other-model/checkpoint-last.pth"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
QUIET += ["disable-component-update", "disable-sync"]


@pytest.fixture(scope="session")
def checkpoints(finetune, pretrained, tmp_path_factory):
    """A folder as the demo leaves it: fine-tuned models and a pre-trained one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, source in (
        (FIRST, finetune() / "checkpoint-best.pth"),
        (SECOND, finetune("convnext") / "checkpoint-last.pth"),
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


def upload(page, path):
    page.locator("input[type=file]").set_input_files(path)


def says(page, text):
    """Wait until the page says this about the picture."""
    page.locator("#said").get_by_text(text).wait_for()


def source(picture):
    """The source of a picture on the page."""
    return picture.locator("img").get_attribute("src")


def choose(page, label, option):
    """Choose an option of a drop-down list."""
    page.get_by_label(label).click()
    page.get_by_role("option", name=option).click()


def predict(path, checkpoint):
    """What the model of a checkpoint says of the faces in a picture: (n, K) probabilities."""
    saved, finder = open_classifier(checkpoint), Finder(open_detector("mtcnn"))
    crops, _ = finder.crop(finder.open(path), saved)
    return saved, Predictor(saved, torch.device("cpu")).of_faces(crops).probabilities


def test_a_photograph_gives_probabilities_and_an_attention_map(page, photographs, checkpoints):
    upload(page, photographs / "people" / "astronaut.jpg")
    says(page, "1 face was found.")
    about = page.locator("#about1")
    about.get_by_text("Faces are cropped with --face_margin 0.15").wait_for()
    bars = page.locator("#bars1")
    saved, (p,) = predict(photographs / "people" / "astronaut.jpg", checkpoints / FIRST)
    for name, share in zip(saved.classes, p, strict=True):
        row = bars.locator("button", has_text=name)
        assert f"{100 * share:.0f}%" in row.inner_text()
    predicted = saved.classes[p.argmax()]
    assert predicted in bars.locator("h2").inner_text()
    assert page.locator("#attention1 img").bounding_box()["height"] > 200
    caption = page.locator("#caption1").inner_text()
    assert "Attention rollout: which patches the features come from" in caption
    assert "does not prove" in caption
    assert page.locator("#caption1 .scale").inner_text().split() == ["least", "most"]


def test_the_page_shows_how_a_checkpoint_was_trained_before_it_is_used(page, checkpoints):
    saved = open_classifier(checkpoints / FIRST)
    about = page.locator("#about1")
    about.get_by_text(FIRST).wait_for()
    assert f"trained on {saved.checkpoint['trained_on']}" in about.inner_text()
    assert f"test accuracy {saved.checkpoint['best']:.2f} %" in about.inner_text()
    assert not page.locator("#bars1").is_visible()


def test_one_of_several_faces_can_be_chosen(page, photographs):
    upload(page, photographs / "people" / "two.jpg")
    says(page, "2 faces were found, largest first.")
    thumbnails = page.locator(".thumbnail-item, .gallery-item button").locator("visible=true")
    first = source(page.locator("#attention1"))
    thumbnails.nth(1).click()
    page.wait_for_function(
        "old => document.querySelector('#attention1 img').getAttribute('src') != old", arg=first
    )


@pytest.mark.parametrize("width", [1200, 390])
def test_boxes_are_around_the_faces(width, page, photographs):
    page.set_viewport_size({"width": width, "height": 900})
    path = photographs / "people" / "two.jpg"
    upload(page, path)
    says(page, "2 faces were found")
    frames = page.locator("#boxes rect[stroke]")
    frames.nth(1).wait_for()
    photo = page.locator("#photo img").bounding_box()
    picture = Finder(open_detector("mtcnn")).open(path)
    height, full_width = picture.image.shape[:2]
    scale = min(photo["width"] / full_width, photo["height"] / height)  # object-fit: contain
    x0 = photo["x"] + (photo["width"] - scale * full_width) / 2
    y0 = photo["y"] + (photo["height"] - scale * height) / 2
    for k, (left, top, w, h) in enumerate(picture.boxes):
        shown = frames.nth(k).evaluate("e => e.getBoundingClientRect().toJSON()")
        expected = x0 + scale * left, y0 + scale * top, scale * w, scale * h
        found = [shown[name] for name in ("x", "y", "width", "height")]
        np.testing.assert_allclose(found, expected, atol=4)  # the frame has a width
    assert page.locator("#boxes text").all_text_contents() == ["1", "2"]


def test_a_synthetic_face_is_used_whole_and_the_next_photograph_searched(page, photographs):
    drawn = page.locator("#examples").get_by_role("button")
    drawn.first.wait_for()
    assert drawn.count() == len(PHOTOGRAPHS) + SYNTHETIC
    drawn.nth(len(PHOTOGRAPHS) + 2).click()
    says(page, "The whole picture is used as one face.")
    page.locator("#attention1 img").wait_for()
    assert page.locator("#boxes rect").count() == 0
    upload(page, photographs / "people" / "two.jpg")
    says(page, "2 faces were found")
    for number in range(len(PHOTOGRAPHS)):
        drawn.nth(number).click()
        says(page, "1 face was found.")
        upload(page, photographs / "people" / "two.jpg")
        says(page, "2 faces were found")


def test_photographs_are_optional(tmp_path, monkeypatch):
    packages = {**PHOTOGRAPHS, "matplotlib": "no/such/file.jpg", "no_such_package": "a.jpg"}
    monkeypatch.setattr(page_picture, "PHOTOGRAPHS", packages)
    examples = example_pictures(str(tmp_path))
    names = [os.path.basename(name) for name in PHOTOGRAPHS.values()]
    assert [os.path.basename(path) for path in examples.photographs] == names[1:]


def test_a_picture_can_be_used_whole_by_choice(page, photographs):
    upload(page, photographs / "people" / "two.jpg")
    says(page, "2 faces were found")
    page.get_by_label("Find faces in the picture").uncheck()
    says(page, "The whole picture is used as one face.")
    page.get_by_label("Find faces in the picture").check()
    says(page, "2 faces were found")


def test_masks_of_the_same_picture_follow_the_slider_and_the_button(page, photographs):
    upload(page, photographs / "people" / "astronaut.jpg")
    page.get_by_role("tab", name="Masks").click()
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


def test_a_picture_without_a_face_has_no_result_until_it_is_used_whole(page, photographs, tmp_path):
    upload(page, photographs / "people" / "astronaut.jpg")
    says(page, "1 face was found.")
    upload(page, photographs / "grey.png")
    says(page, "No face was found. Try a picture in which the face is larger")
    bars, whole = page.locator("#bars1 h2"), page.get_by_role("button", name="Use the whole")
    assert not bars.is_visible()
    assert not page.locator("#attention1").is_visible()
    whole.click()
    says(page, "The whole picture is used as one face.")
    bars.wait_for()
    whole.wait_for(state="hidden")
    Image.fromarray(np.full((300, 300, 3), 120, np.uint8)).save(tmp_path / "other.png")
    upload(page, tmp_path / "other.png")
    says(page, "No face was found.")


def test_unreadable_files_are_explained(page, photographs):
    upload(page, photographs / "people" / "astronaut.jpg")
    says(page, "1 face was found.")
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    says(page, INVITATION)
    assert not page.locator("#attention1").is_visible()
    upload(page, photographs / "page.jpg")
    says(page, "This picture cannot be read (is a web page, not an image")
    upload(page, photographs / "bomb.png")
    says(page, "This picture cannot be read (has more than 89,478,485 pixels")
    upload(page, photographs / "people" / "astronaut.jpg")  # the page still works
    says(page, "1 face was found.")


def test_two_checkpoints_are_compared_and_their_results_downloaded(
    page, photographs, checkpoints, tmp_path
):
    path = photographs / "people" / "two.jpg"
    upload(page, path)
    says(page, "2 faces were found")
    choose(page, "Compare with", SECOND)
    page.locator("#about2").get_by_text(SECOND).wait_for()
    results = {name: predict(path, checkpoints / name) for name in (FIRST, SECOND)}
    for number, (saved, p) in enumerate(results.values(), 1):
        heading = page.locator(f"#bars{number} h2")
        heading.wait_for()
        assert saved.classes[p[0].argmax()] in heading.inner_text()
    left, right = (page.locator(f"#bars{number}").bounding_box() for number in (1, 2))
    assert left["x"] + left["width"] <= right["x"]
    with page.expect_download() as download:
        page.get_by_text("Download as a table").click()
    download.value.save_as(tmp_path / "faces.csv")
    with open(tmp_path / "faces.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["checkpoint"], row["face"]) for row in rows] == [
        (name, face) for name in (FIRST, SECOND) for face in "01"
    ]
    for row in rows:
        saved, p = results[row["checkpoint"]]
        shares = [float(row[f"p_{name}"]) for name in saved.classes]
        np.testing.assert_allclose(shares, p[int(row["face"])], atol=1e-4)
        assert row["path"] == "two.jpg"
        assert row["label"] == saved.classes[int(np.argmax(shares))]
    choose(page, "Compare with", "no other")
    page.locator("#about2").wait_for(state="hidden")


def test_the_table_of_checkpoints_with_other_classes_has_empty_cells():
    face = Face((1, 2, 3, 4), 0.5, None)
    picture = Picture("=a.jpg", np.zeros((8, 8, 3), np.uint8), [face], whole=False)
    nothing = np.zeros((1, 1, 3), np.uint8)
    seen = {"a": [Seen({"Sad": 0.25, "Happy": 0.75}, nothing, "Grad-CAM")]}
    seen |= {"b": [Seen({"Happy": 0.5, "Fear": 0.5}, nothing, "Grad-CAM")]}
    header, *rows = csv.reader(face_table(picture, seen).splitlines())
    assert header == ["checkpoint", *COLUMNS, "p_Sad", "p_Happy", "p_Fear"]
    start = ["./=a.jpg", "0", "1", "2", "3", "4", "0.500000", "Happy", "ok"]
    assert rows[0] == ["a", *start, "0.250000", "0.750000", ""]
    assert rows[1] == ["b", *start, "", "0.500000", "0.500000"]


def test_faces_are_found_once_in_a_picture_whatever_its_name(photographs, tmp_path):
    asked = []

    def detect(image):
        asked.append(image.shape)
        return [Face((0, 0, 2, 2), 1, None), Face((4, 4, 3, 3), 1, None)]

    copied = shutil.copy(photographs / "grey.png", tmp_path / "face-1.png")
    finder = Finder(detect, whole=[photographs / "people" / "two.jpg"])
    assert finder.open(copied).boxes == [(4, 4, 3, 3), (0, 0, 2, 2)]
    assert finder.open(photographs / "grey.png").name == "grey.png"
    assert len(asked) == 1
    assert finder.open(photographs / "grey.png", search=False).whole
    assert finder.open(photographs / "people" / "two.jpg").whole
    assert len(asked) == 1


def test_the_attention_map_explains_the_class_that_is_shown(finetune, monkeypatch):
    """Predictions average over mirrored faces, so the plain face may be of another class."""
    saved = open_classifier(finetune("convnext") / "checkpoint-best.pth")
    predictor, asked = Predictor(saved, torch.device("cpu")), []
    k = len(saved.classes) - 1
    shares = np.eye(len(saved.classes), dtype=np.float32)[[k]]
    monkeypatch.setattr(predictor, "of_views", lambda views: Prediction(shares, shares))

    def attend(model, x, target):
        asked.extend(target.tolist())
        return attention_map(model, x, target)

    monkeypatch.setattr("inference.page.attention_map", attend)
    (one,) = explain_faces(saved, predictor, [np.zeros((30, 30, 3), np.uint8)])
    assert asked == [k]
    assert one.label == saved.classes[k]
    assert f"what speaks for “{one.label}”" in heat_caption(one.method, one.label)


def test_texts_of_the_page_are_escaped():
    name = "<b>&.pth"
    assert "<b>&" not in about(name, "resnet18", ["warning: <i>"]) + heat_caption("Grad-CAM", name)
    assert "<strong>Warning: &lt;i&gt;</strong>" in about(name, "resnet18", ["warning: <i>"])
    assert data_link('"<', "a.csv", "x") == (
        '<a download="a.csv" href="data:text/csv;charset=utf-8,%22%3C">x</a>'
    )


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
    data = json.dumps({"data": [picture, False, checkpoint, ""]}).encode()
    call, kind = f"{address}/gradio_api/call/judge", {"Content-Type": "application/json"}
    request = urllib.request.Request(call, data, kind)
    with urllib.request.urlopen(request, timeout=30) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}", timeout=30) as answer:
        return answer.read().decode()


@pytest.mark.parametrize("more", [{}, {"meta": {"_type": "gradio.FileData"}}, {"is_stream": True}])
def test_a_request_cannot_read_files_of_the_machine(more, address, photographs, temporary):
    (private,) = temporary.glob("mae-sfer-*")
    grey = str(photographs / "grey.png")
    for path in (grey, "/etc/passwd", f"{private}/../{private.name}", f"{private}/../x", "x\0"):
        assert "event: error" in ask(address, {"path": path, **more}, FIRST)
    shown = ask(address, {"path": f"{private}/face-1.png", **more}, FIRST)
    assert "event: complete" in shown
    assert "The whole picture is used as one face." in shown


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


def test_on_a_phone_results_are_below_the_picture_and_nothing_is_cut_off(
    browser, address, photographs
):
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.goto(address)
    page.get_by_text("What a model sees in a face").wait_for()
    upload(page, photographs / "people" / "two.jpg")
    says(page, "2 faces were found")
    choose(page, "Compare with", SECOND)
    page.locator("#attention2 img").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    parts = ["#picture", "#said", "#faces label", "#faces .thumbnail-item", "#bars1", "#attention1"]
    parts += ["#caption1", "#bars2", "#caption2", ".choice", "#examples"]
    boxes = {name: page.locator(name).first.bounding_box() for name in parts}
    end = page.locator("#faces .grid-wrap").bounding_box()
    page.close()
    for above, below in itertools.pairwise(boxes.values()):
        assert above["y"] + above["height"] <= below["y"]
    face = boxes["#faces .thumbnail-item"]
    assert face["y"] + face["height"] <= end["y"] + end["height"]


def test_checkpoints_are_listed_by_kind_without_other_files(checkpoints):
    found = Checkpoints(checkpoints, torch.device("cpu"))
    assert found.classifiers == [FIRST, SECOND]
    assert found.autoencoders == ["pre-training/checkpoint-last.pth"]
    with pytest.raises(BadInput, match=r"\.\./x: no such checkpoint"):
        found.classifier("../x")


def test_classifiers_are_sorted_by_their_best_result(checkpoints, tmp_path):
    saved = torch.load(checkpoints / FIRST, weights_only=True)
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
    shutil.copy(checkpoints / FIRST, path)
    found = Checkpoints(tmp_path, torch.device("cpu"))
    assert not found.is_open(path.name)
    first = found.classifier(path.name)
    assert found.is_open(path.name)
    assert found.classifier(path.name) is first
    shutil.copy(finetune("convnext") / "checkpoint-best.pth", tmp_path / "new")
    (tmp_path / "new").replace(path)
    assert found.classifier(path.name)[0].name.startswith("convnextv2")
    path.unlink()
    with pytest.raises(BadInput, match=r"can no longer be read .*; choose another"):
        found.classifier(path.name)


def test_a_checkpoint_with_non_finite_outputs_is_reported(checkpoints, tmp_path):
    saved = torch.load(checkpoints / FIRST, weights_only=True)
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
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run_here(app, ["--checkpoints", str(tmp_path)]) == BAD_INPUT
    first, _ = capfd.readouterr().err.splitlines()
    assert first.startswith("loading gradio and PyTorch")


def test_a_port_in_use_is_reported(checkpoints, address, capfd):
    port = address.rpartition(":")[2]
    assert run_here(app, ["--checkpoints", str(checkpoints), "--port", port]) == FAULT
    assert f"--port {port}: is already in use; choose another" in capfd.readouterr().err
