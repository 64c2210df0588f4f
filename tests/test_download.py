"""Downloads of released weights, from a local server with the faults of real ones."""

import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

import main_export
import main_finetune
import main_predict
import main_visualize
from backbones import model_names
from models_saved import open_classifier, open_saved
from released import CONTENT, weights, whole
from runs import ROOT, free_port, run_here
from util import download
from util.download import DRIVE, RELEASED, cached_path, fetch, main
from util.errors import BAD_INPUT, DONE, BadInput

NAME = "mae_vit_tiny_300e"
pytestmark = pytest.mark.usefixtures("only_here")
CHUNK = 512 * 1024  # gdown keeps whole chunks of an interrupted transfer


PAGE = b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>"


# --- behaviours of a server: functions of a request ---


def ranged(request, content=CONTENT):
    """Send the range that the client asks for."""
    asked = request.headers.get("Range")
    if not asked:
        return request.send(content)
    start = int(asked.removeprefix("bytes=").rstrip("-"))
    part = f"bytes {start}-{len(content) - 1}/{len(content)}"
    return request.send(content[start:], 206, Content_Range=part)


def cut(request):
    """Announce the full length, but send only two thirds."""
    request.send(CONTENT[: 2 * len(CONTENT) // 3], length=len(CONTENT))


def page(request):
    request.send(PAGE, Content_Type="text/html")


def moved_to_page(request):
    if request.path == "/login":
        return page(request)
    return request.send(b"", 302, Location="/login")


def torn(request):
    """End early, without announcing a length."""
    request.send_response(200)
    request.end_headers()
    request.wfile.write(CONTENT[: len(CONTENT) // 2])


def altered(request):
    request.send(CONTENT[:900_000] + b"\xff" + CONTENT[900_001:])


def silent(request):
    time.sleep(1)


def visible(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def refusal(**options):
    with pytest.raises(BadInput) as caught:
        fetch(NAME, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_released_name_has_a_known_model_and_its_own_file():
    assert len(RELEASED) == 8
    for name, released in RELEASED.items():
        assert released.model in model_names(masked=True)
        assert name.startswith(released.model.split("_patch")[0])
        assert released.epochs is None or name.endswith(f"_{released.epochs}e")
    assert {len(released.drive_id) for released in RELEASED.values()} == {33}
    assert len({released.drive_id for released in RELEASED.values()}) == 8


def test_a_file_is_fetched_once_and_its_hash_recorded(server, address, capsys):
    path = fetch(NAME)
    assert path == cached_path(NAME)
    assert path.read_bytes() == CONTENT
    assert server.log == [(f"/{RELEASED[NAME].drive_id}", None)]
    assert capsys.readouterr().err.count("terms of their authors") == 1
    recorded = path.with_name(path.name + ".sha256").read_text()
    assert recorded == f"{hashlib.sha256(CONTENT).hexdigest()}  {path.name}\n"
    assert visible(path.parent) == [path.name, path.name + ".sha256"]
    assert path.stat().st_mode & 0o444 == path.parent.stat().st_mode & 0o444 != 0o400
    before = sorted(os.listdir(path.parent))

    (path.parent / f".{path.name}.lock").unlink()  # a complete cache may be read-only
    assert fetch(NAME) == path
    assert len(server.log) == 1
    assert sorted(os.listdir(path.parent)) == [n for n in before if not n.endswith(".lock")]
    assert capsys.readouterr().err == ""


MISFITS = {
    "page": (page, "a web page, not a checkpoint"),
    "moved": (moved_to_page, "a web page, not a checkpoint"),
    "cut": (cut, "the connection was lost"),
    "torn": (torn, "truncated or damaged"),
    "altered": (altered, "checksum"),
    "garbage": (lambda request: request.send(b"\x17garbage" * 1000), "not a PyTorch checkpoint"),
    "zeros": (lambda request: request.send(bytes(1000)), "starts with zeros"),
    "empty": (lambda request: request.send(b""), "empty"),
    "404": (lambda request: request.send(PAGE, 404), "404"),
    "500": (lambda request: request.send(PAGE, 500), "500"),
    "circle": (lambda request: request.send(b"", 302, Location="/again"), "redirects"),
    "silent": (silent, "127.0.0.1 does not answer"),
}


@pytest.mark.parametrize(("answer", "reason"), MISFITS.values(), ids=MISFITS)
def test_a_failed_download_never_gets_the_name_of_the_file(
    answer, reason, server, address, monkeypatch
):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.answer = answer
    line, path = refusal(), cached_path(NAME)
    assert line.startswith(f"{NAME}: download failed: ")
    assert reason in line
    assert f"https://drive.google.com/file/d/{RELEASED[NAME].drive_id}/view" in line
    assert line.endswith(f"save the file as {path}")
    assert visible(path.parent) == []

    server.answer = ranged  # no leftover prevents a later download
    assert fetch(NAME).read_bytes() == CONTENT
    assert not list(path.parent.glob(".*unchecked*"))


def test_without_a_network_the_manual_way_is_explained_and_works(capsys):
    closed = f"http://127.0.0.1:{free_port()}/"
    line = refusal(url=closed)
    assert "127.0.0.1 cannot be reached" in line
    cached_path(NAME).write_bytes(CONTENT)
    assert fetch(NAME, url=closed) == cached_path(NAME)
    assert f"recorded its sha256, {hashlib.sha256(CONTENT).hexdigest()}" in capsys.readouterr().err
    assert fetch(NAME, url=closed).read_bytes() == CONTENT


def test_a_redirect_is_followed(server, address):
    def moved(request):
        if request.path == "/there":
            return whole(request)
        return request.send(b"", 303, Location="/there")

    server.answer = moved
    assert fetch(NAME).read_bytes() == CONTENT


def test_an_interrupted_download_resumes(server, address):
    server.answer = cut
    refusal()
    server.answer = ranged
    assert fetch(NAME).read_bytes() == CONTENT
    assert server.log[-1][1] == f"bytes={2 * CHUNK}-"


def test_a_lost_connection_is_resumed_within_one_call(server, address, monkeypatch):
    monkeypatch.setattr(download, "RETRIES", 2)
    monkeypatch.setattr("random.uniform", lambda *_: 0)  # gdown's pause
    server.answer = lambda request: (ranged if request.headers.get("Range") else cut)(request)
    assert fetch(NAME).read_bytes() == CONTENT
    assert [asked for _, asked in server.log] == [None, f"bytes={2 * CHUNK}-"]


def test_network_failures_keep_what_has_been_downloaded(server, address):
    server.answer = cut
    refusal()
    refusal(url=f"http://127.0.0.1:{free_port()}/")
    server.answer = lambda request: request.send(PAGE, 503)
    refusal()
    server.answer = ranged
    fetch(NAME)
    assert server.log[-1][1] == f"bytes={2 * CHUNK}-"


@pytest.mark.parametrize(
    ("answer", "content"),
    [(whole, CONTENT), (lambda request: ranged(request, weights(2.0)), weights(2.0))],
    ids=["server_ignores_range", "file_was_replaced"],
)
def test_a_partial_file_that_cannot_be_completed_is_dropped(answer, content, server, address):
    server.answer = cut
    refusal()
    server.answer = answer
    assert fetch(NAME).read_bytes() == content
    assert len(server.log) == 4  # cut; the length; the rest; everything


def test_a_file_of_a_process_killed_before_its_check_is_checked_later(server, address):
    path = cached_path(NAME)
    path.parent.mkdir()
    for content in (CONTENT[:-100], CONTENT):
        path.with_name(f".{path.name}.unchecked").write_bytes(content)
        assert fetch(NAME).read_bytes() == CONTENT
        path.unlink()
    assert len(server.log) == 1  # for the first file, which was damaged


def test_google_drives_confirmation_is_given_and_its_refusal_reported(server, monkeypatch):
    """Drive asks for confirmation of files too large for its virus scan, or refuses with a page."""
    get, drive = requests.Session.get, "https://drive.google.com/"
    base = server.url.removesuffix("{id}")
    monkeypatch.setattr(download, "DRIVE", DRIVE)
    monkeypatch.setattr(
        requests.Session, "get", lambda self, url, **o: get(self, url.replace(drive, base), **o)
    )
    server.answer = page
    assert "drive.google.com refuses (quota used up" in refusal()

    def ask(request):
        if request.path == "/get?confirm=t":
            headers = {"Content_Disposition": "attachment", "Content_Type": "application/zip"}
            return request.send(CONTENT, **headers)
        form = (
            f'<form id="download-form" action="{base}get">'
            '<input type="hidden" name="confirm" value="t"></form>'
        )
        return request.send(form.encode(), Content_Type="text/html")

    server.answer = ask
    assert fetch(NAME).read_bytes() == CONTENT
    assert server.log[-2][0] == f"/uc?id={RELEASED[NAME].drive_id}"


def test_a_cached_file_that_changes_is_refused_until_it_is_deleted(server, address):
    path = fetch(NAME)
    path.write_bytes(weights(2.0))
    line = refusal()
    for content in (CONTENT, weights(2.0)):
        assert hashlib.sha256(content).hexdigest() in line
    assert f"{path}: " in line
    path.unlink()
    assert fetch(NAME).read_bytes() == CONTENT


def test_a_replaced_release_is_refused_until_the_old_hash_is_deleted(server, address):
    path = fetch(NAME)
    path.unlink()
    server.answer = lambda request: request.send(weights(2.0))
    assert ".sha256 too, if its authors have replaced it" in refusal()
    path.unlink()
    path.with_name(path.name + ".sha256").unlink()
    assert fetch(NAME).read_bytes() == weights(2.0)


@pytest.mark.parametrize(
    ("content", "reason"), [(PAGE, "a web page"), (CONTENT[:-100], "truncated"), (b"", "empty")]
)
def test_a_manually_saved_file_is_checked(content, reason):
    path = cached_path(NAME)
    path.parent.mkdir()
    path.write_bytes(content)
    line = refusal()
    assert line.startswith(f"{path}: ")
    assert reason in line
    assert visible(path.parent) == [path.name]


def test_a_hash_file_without_a_hash_is_refused(server, address):
    path = fetch(NAME)
    path.with_name(path.name + ".sha256").write_bytes(b"\xff\x00")
    assert hashlib.sha256(CONTENT).hexdigest() in refusal()


def slowly(request):
    time.sleep(0.3)
    whole(request)


def test_concurrent_threads_download_once(server, address, capsys):
    server.answer = slowly
    with ThreadPoolExecutor(4) as pool:
        paths = {future.result() for future in [pool.submit(fetch, NAME) for _ in range(4)]}
    assert paths == {cached_path(NAME)}
    assert len(server.log) == 1
    assert "waiting for another process" in capsys.readouterr().err


def test_concurrent_processes_download_once(server):
    server.answer = slowly
    code = (
        "import gdown, util.checkpoint, util.download as d; print('ready', flush=True); input(); "
        f"print(d.fetch({NAME!r}, url={server.url!r}))"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60) for process in processes]
    assert [out for out, _ in said] == [f"{cached_path(NAME)}\n"] * 2
    assert len(server.log) == 1
    assert sum("waiting for another process" in err for _, err in said) == 1


@pytest.mark.parametrize(
    ("environment", "argument", "folder"),
    [
        ({"HOME": "/h"}, None, "/h/.cache/mae_sfer"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, None, "/x/mae_sfer"),
        ({"XDG_CACHE_HOME": "/x", "MAE_SFER_CACHE": "/m"}, None, "/m"),
        ({"HOME": "/h", "MAE_SFER_CACHE": "~/m"}, "", "/h/m"),
        ({"MAE_SFER_CACHE": "/m"}, "/given", "/given"),
    ],
)
def test_the_cache_folder_comes_from_the_option_then_variables_then_home(
    environment, argument, folder, monkeypatch
):
    for variable in ("HOME", "XDG_CACHE_HOME", "MAE_SFER_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert str(cached_path(NAME, argument)) == f"{folder}/{NAME}.pth"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, server, address):
    (tmp_path / "file").write_text("")
    line = refusal(cache_dir=tmp_path / "file")
    assert str(tmp_path / "file") in line
    assert "--cache_dir or MAE_SFER_CACHE" in line


def test_the_command_fetches_and_lists(server, address, tmp_path, capsys):
    assert main([NAME, "convnextv2_base_affectnet", "--cache-dir", str(tmp_path)]) == DONE
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(tmp_path / f"{NAME}.pth"), f"{tmp_path}/convnextv2_base_affectnet.pth"]

    (tmp_path / f"{NAME}.pth").unlink()
    for argv in (["--list"], []):
        assert main([*argv, "--cache_dir", str(tmp_path)]) == DONE
        table = capsys.readouterr().out
        rows = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line}
        assert rows[NAME] == ["mae_vit_tiny_patch16", "300", "no"]
        assert rows["convnextv2_base_affectnet"] == ["convnextv2_base", "–", "2.1", "MB"]
        assert rows.keys() >= RELEASED.keys()
        assert "pre-trained only: fine-tune one before" in table
        assert "terms of their authors" in table
    assert len(server.log) == 2


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([NAME, "mae_vit_base_300"], "did you mean mae_vit_base_300e"),
        (["resnet"], "choose from mae_vit_base_300e, "),
        ([NAME, "--list"], "--list"),
        ([NAME, "--cachedir", "x"], "did you mean --cache_dir"),
        ([NAME], "127.0.0.1 cannot be reached"),
    ],
)
def test_wrong_options_give_one_error_line_and_exit_code_2(argv, expected, server, capsys):
    assert main(argv) == BAD_INPUT
    *notices, line = capsys.readouterr().err.splitlines()
    assert expected in line
    assert all("downloading to" in notice for notice in notices)
    assert server.log == []


@pytest.mark.parametrize(
    ("program", "options", "named"),
    [
        (main_predict, f"--checkpoint {NAME} .", "--checkpoint"),
        (main_finetune, f"--eval --finetune {NAME}", "--eval --finetune"),
        (main_finetune, f"--eval --resume {NAME}", "--eval --finetune"),
        (main_finetune, f"--data_path synthetic:16 --teacher {NAME}", "--teacher"),
        (
            main_visualize,
            f"--checkpoint {NAME} --data_path synthetic --figures features,attention",
            "--figures attention:",
        ),
        (main_visualize, f"--checkpoint {NAME} --data_path synthetic --classes a,b", "--classes:"),
        (main_export, f"--checkpoint {NAME} --to safetensors --output x --classes a", "--classes:"),
    ],
)
def test_a_program_that_needs_a_classifier_refuses_them_and_downloads_nothing(
    program, options, named, server, address, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    more = ["--output_dir", "out"] if program in (main_finetune, main_visualize) else []
    assert run_here(program, [*options.split(), *more]) == BAD_INPUT
    (line,) = capfd.readouterr().err.splitlines()
    assert f"error: {named} {NAME}: was pre-trained only and has no classifier head; " in line
    assert f"main_finetune.py --finetune {NAME} --data_path …" in line
    assert server.log == []


def test_python_code_that_needs_a_classifier_is_refused_them_too(server, address):
    for use in (open_classifier, lambda name: open_saved(name, classes=("a", "b"))):
        with pytest.raises(BadInput, match=f"{NAME}: was pre-trained only"):
            use(NAME)
    assert server.log == []


def test_a_file_with_the_name_of_released_weights_is_opened(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).write_bytes(b"<html>")
    (tmp_path / "a.png").write_bytes(b"")
    argv = ["--checkpoint", NAME, "--detector", "none", "a.png"]
    assert run_here(main_predict, argv) == BAD_INPUT
    assert f"{NAME}: a web page, not a checkpoint" in capfd.readouterr().err


def test_a_terminal_gets_a_progress_bar(server, address, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    fetch(NAME)
    said = capsys.readouterr().err
    assert "100%" in said
    assert "unchecked" not in said


def test_the_list_needs_no_heavy_imports():
    heavy = "[m for m in ('torch', 'gdown', 'requests') if m in sys.modules]"
    code = f"import sys; from util.download import main; main(['--list']); print({heavy})"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.splitlines()[-1] == "[]"
