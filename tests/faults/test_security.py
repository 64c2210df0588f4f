"""Security: files that would run code, archives that would escape, hostile names in pages."""

import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import ssl
import struct
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from numpy._core.multiarray import scalar
from test_report import HOSTILE, Page
from torch import nn

import main_export
import main_finetune
import main_pack
import main_predict
import main_pretrain
from datasets import open_labelled
from datasets.packed.store import INDEX, PackedImages, file_digest, manifest_digest, part_name
from layouts_affectnet import write_affectnet_npy
from odd_images import write_faces
from runs import CLASSIFIERS, FAMILIES, SMALL, SMALL_FINETUNE, run_here
from util import download
from util.checkpoint.read import read_checkpoint
from util.download import DRIVE, RELEASED, cached_path, fetch
from util.errors import BAD_INPUT, DONE, BadInput
from util.weights import read_source

NAME = "mae_vit_tiny_300e"


class Canary:
    """When unpickled, it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def sung(tmp_path):
    """The file that a canary would create; no test may leave it behind."""
    path = tmp_path / "sung"
    pickle.loads(pickle.dumps(Canary(path)))
    assert path.exists(), "else nothing is tested"
    path.unlink()
    yield path
    assert not path.exists()


def torch_zip(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def torch_legacy(content):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def torch_tar(content):
    """The format of torch before 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(content)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def zip_with_two_pickles(content):
    """A good pickle and bad ones, also under a name that escapes its folder."""
    buffer = io.BytesIO(torch_zip({"model": {}}))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("../../data.pkl", pickle.dumps(content))
        archive.writestr("archive/data.pkl", pickle.dumps(content))
    return buffer.getvalue()


def as_safetensors(content):
    """A pickle that looks like safetensors at first sight: 8 bytes of length, then JSON."""
    body = b"{}" + pickle.dumps(content)
    return struct.pack("<Q", len(body)) + body


def in_a_numpy_object(content):
    """Misuses the NumPy names that we allow in pickles."""

    class Scalar:
        def __reduce__(self):
            return scalar, (np.dtype("O"), pickle.dumps(content))

    return torch_zip({"model": Scalar()})


FORMATS = {
    "zip": torch_zip,
    "legacy": torch_legacy,
    "tar": torch_tar,
    "pickle": lambda content: pickle.dumps(content, 2),
    "pickle-0": lambda content: pickle.dumps(content, 0),
    "two-pickles": zip_with_two_pickles,
    "like-safetensors": as_safetensors,
    "numpy-object": in_a_numpy_object,
}
PRETRAIN = f"{SMALL} {FAMILIES['mae']} --num_workers 0"
FINETUNE = f"{SMALL_FINETUNE} {CLASSIFIERS['vit']} --data_path synthetic:16:8"
DOORS = {  # program, options; {file} is bad, {out} a run's folder with such files, {new} a new one
    "pretrain --resume": (main_pretrain, f"{PRETRAIN} --output_dir {{new}} --resume {{file}}"),
    "pretrain itself": (main_pretrain, f"{PRETRAIN} --output_dir {{out}}"),
    "finetune --resume": (main_finetune, f"{FINETUNE} --output_dir {{new}} --resume {{file}}"),
    "finetune itself": (main_finetune, f"{FINETUNE} --output_dir {{out}}"),
    "--finetune": (main_finetune, f"{FINETUNE} --output_dir {{new}} --finetune {{file}}"),
    "--finetune NAME": (main_finetune, f"{FINETUNE} --output_dir {{new}} --finetune {NAME}"),
    "--linear_probe": (
        main_finetune,
        f"{FINETUNE} --output_dir {{new}} --linear_probe --finetune {{file}}",
    ),
    "--knn": (main_finetune, f"{FINETUNE} --output_dir {{new}} --knn --finetune {{file}}"),
    "--eval": (main_finetune, f"{FINETUNE} --output_dir {{new}} --eval --finetune {{file}}"),
    "predict": (main_predict, "--checkpoint {file} --detector none {file}"),
    "export --checkpoint": (
        main_export,
        "--checkpoint {file} --to safetensors --output {new}/exported",
    ),
    "--eval itself": (main_finetune, f"{FINETUNE} --output_dir {{out}} --eval"),
}


@pytest.fixture
def bad(tmp_path, only_here):
    """Write bytes wherever checkpoints are read from: a path, a run's folder, the cache."""

    def write(data, name="weights.pth"):
        places = {"file": tmp_path / name, "out": tmp_path / "out", "new": tmp_path / "new"}
        places["out"].mkdir()
        paths = [places["file"], *(places["out"] / f"checkpoint-{n}.pth" for n in ("last", "best"))]
        cached_path(NAME).parent.mkdir()
        for path in [*paths, cached_path(NAME)]:
            path.write_bytes(data)
        return places

    return write


@pytest.mark.parametrize("door", DOORS)
def test_code_in_a_checkpoint_is_refused_by_every_program(door, bad, sung, capfd):
    program, options = DOORS[door]
    places = bad(torch_zip({"model": Canary(sung), "args": {}}))
    assert run_here(program, options.format(**places).split()) == BAD_INPUT
    *_, line = capfd.readouterr().err.strip().splitlines()
    assert "could run code" in line
    assert not list(places["new"].glob("checkpoint*"))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("kind", FORMATS)
def test_code_in_any_format_and_under_any_name_is_refused(kind, name, sung, tmp_path):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / name
    path.write_bytes(FORMATS[kind]({"model": {"w": Canary(sung)}}))
    before = sorted(tmp_path.rglob("*"))
    for read in (read_checkpoint, read_source):
        with pytest.raises(BadInput) as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is unpacked"


def test_a_zip_whose_members_escape_their_folder_is_read_in_memory(tmp_path):
    data = torch_zip({"model": {"w": torch.ones(3)}})
    path = tmp_path / "a" / "b" / "weights.pth"
    path.parent.mkdir(parents=True)
    for name in ("../../escaped", "/tmp/escaped-from-a-checkpoint", "archive/../../escaped"):
        path.write_bytes(data)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, "out")
        try:
            assert read_checkpoint(path)["model"]["w"].tolist() == [1, 1, 1]
        except BadInput:
            continue  # also good
        finally:
            assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["weights.pth"]
            assert not os.path.exists("/tmp/escaped-from-a-checkpoint")


def test_a_torchscript_module_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(BadInput, match="TorchScript"):
        read_source(tmp_path / "script.pt")


def test_objects_in_numpy_files_of_data_sets_are_never_unpickled(tmp_path, sung):
    hostile = np.array(Canary(sung), object)
    write_affectnet_npy(tmp_path / "affectnet", {"train": (2,)})
    np.save(tmp_path / "affectnet" / "train_set" / "annotations" / "1_exp.npy", hostile)
    with pytest.raises(BadInput, match="not a NumPy file"):
        open_labelled(str(tmp_path / "affectnet"))


def edited_store(folder, **changes):
    """Change a packed store as an attacker would, with matching hashes."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][INDEX] = file_digest(folder / INDEX)
    manifest |= changes
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_malicious_packed_store_is_refused(tmp_path, sung):
    store = tmp_path / "store"
    options = ["--data_path", write_faces(tmp_path / "faces", 5), "--output", store]
    assert run_here(main_pack, [*map(str, options), "--data_set", "none"]) == DONE
    whole = (store / INDEX).read_bytes()
    manifest = (store / "manifest.json").read_text()
    good = np.load(store / INDEX)
    far, negative = good.copy(), good.copy()
    far[0, 0], negative[1, 1:] = 10**12, -40  # the same area
    hostile = [np.array([Canary(sung)] * 5, object), far, negative, good.astype(float), good[:, :2]]
    huge = good.copy()
    huge[1, 1:] = 2**31, 2**32  # their product overflows 64 bits
    flat = np.insert(good, 1, [good[1, 0], 0, 5], axis=0)
    for index in [*hostile, np.array(5), huge, flat]:
        np.save(store / INDEX, index)
        edited_store(store)
        with pytest.raises(BadInput, match=r"index\.npy|is not a valid store \(ValueError"):
            PackedImages(store)
    (store / INDEX).write_bytes(whole)
    (tmp_path / "secret").write_text("x")
    for part in ("../secret", str(tmp_path / "secret")):
        (store / "manifest.json").write_text(manifest)
        parts = [{"file": part, "bytes": 1, "sha256": ""}]
        edited_store(store, parts=parts)
        with pytest.raises(BadInput, match=r"manifest\.json"):
            PackedImages(store)
    size = json.loads(manifest)["bytes"]
    one, two = ({"file": part_name(k), "bytes": size // 2} for k in range(2))
    (store / part_name(1)).write_bytes(bytes(size // 2))
    os.truncate(store / part_name(0), size // 2)
    for change in (
        *({"parts": 3}, {"parts": [1]}, {"files": []}, {"splits": {"all": 6}}, {"bytes": "x"}),
        *({"files": {"/dev/zero": "0"}}, {"splits": {"a": -1, "b": 6}}, {"parts": [one, two]}),
    ):
        (store / "manifest.json").write_text(manifest)
        edited_store(store, **change)
        with pytest.raises(BadInput, match="packed store"):
            PackedImages(store)


# Downloads


def https(server, tmp_path, name):
    """Put the server behind TLS with a self-signed certificate for `name`; -> the certificate."""
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    request = f"req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -subj /CN={name}"
    names = f"-addext subjectAltName={name}"
    subprocess.run(["openssl", *request.split(), *names.split()], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return certificate


def test_downloads_use_tls_only():
    assert DRIVE.startswith("https://")
    assert download.PAGE.startswith("https://")


@pytest.mark.usefixtures("only_here")
@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl")
@pytest.mark.parametrize(
    ("name", "trusted"),
    [("IP:127.0.0.1", False), ("DNS:example.org", True), ("IP:127.0.0.1", True)],
    ids=["unknown", "of another host", "good"],
)
def test_only_a_trusted_certificate_for_the_same_host_is_accepted(
    name, trusted, server, tmp_path, monkeypatch
):
    contexts, wrap = [], ssl.SSLContext.wrap_socket

    def watched(self, *args, **options):
        contexts.append((self.verify_mode, self.check_hostname))
        return wrap(self, *args, **options)

    certificate = https(server, tmp_path, name)
    if trusted:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", watched)
    url = f"https://127.0.0.1:{server.server_port}/"
    if trusted and name.startswith("IP"):
        assert fetch(NAME, url=url).exists()
        assert server.log
    else:
        with pytest.raises(BadInput, match=r"TLS certificate of 127\.0\.0\.1 cannot be trusted"):
            fetch(NAME, url=url)
        assert server.log == []
    clients = [c for c in contexts if c != (ssl.CERT_NONE, False)]  # the server asks for none
    assert clients
    assert {mode for mode, _ in clients} == {ssl.CERT_REQUIRED}


@pytest.mark.usefixtures("only_here")
@pytest.mark.parametrize("kind", ["zip", "legacy", "tar", "pickle"])
def test_code_in_a_downloaded_file_is_not_run(kind, server, address, sung, tmp_path, capfd):
    data = FORMATS[kind]({"model": {"w": Canary(sung)}})
    server.answer = lambda request: request.send(data)
    assert download.main([NAME]) == DONE
    assert cached_path(NAME).read_bytes() == data
    options = f"{FINETUNE} --output_dir {tmp_path / 'new'} --finetune {NAME}"
    assert run_here(main_finetune, options.split()) == BAD_INPUT
    assert str(cached_path(NAME)) in capfd.readouterr().err


def test_no_name_leads_out_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_SFER_CACHE", str(tmp_path / "cache"))
    for name in ("../../etc/passwd", f"../{NAME}", "/etc/passwd", "", "."):
        with pytest.raises(BadInput, match="no released weights"):
            fetch(name)
    assert list(tmp_path.iterdir()) == []
    assert len(RELEASED) == 8


# Files of a run

# Without a slash, as it is used in file names.
TAG = '<script>alert("x")<img src=x onerror=alert(1)>&amp;\''


def test_a_report_shows_hostile_names_as_text(tmp_path):
    data, out = tmp_path / "data", tmp_path / f"out{TAG}"
    for split, count in (("train", 30), ("test", 2)):
        for name in (f"a{TAG}", "b"):
            write_faces(data / split / name, count)
    (data / "train" / "b" / f"0{TAG}.jpg").write_bytes(b"<html>")
    options = f"{SMALL_FINETUNE} {CLASSIFIERS['vit']} --epochs 2".split()
    options += ["--data_path", str(data), "--output_dir", str(out), "--model_prefix", HOSTILE]
    assert run_here(main_finetune, options) == DONE
    page = Page(out / "report.html")
    page.check_self_contained()
    for text in (f"out{TAG}", f"a{TAG}", f"0{TAG}.jpg", HOSTILE):
        assert text in page.text, text
    assert HOSTILE not in page.source
    assert "alert(1)>" not in page.source


def test_no_file_of_a_run_contains_environment_variables(tmp_path, monkeypatch):
    secret = hashlib.sha256(b"token").hexdigest()
    names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "ANYTHING_ELSE")
    for name in names:
        monkeypatch.setenv(name, secret)
    out = tmp_path / "out"
    assert (
        run_here(main_pretrain, f"{PRETRAIN} --epochs 1 --vis_freq 1 --output_dir {out}".split())
        == DONE
    )
    fine = tmp_path / "fine"
    more = (
        f"--epochs 1 --output_dir {fine} --finetune {out / 'checkpoint-last.pth'} --input_size 48"
    )
    assert run_here(main_finetune, f"{FINETUNE} {more} --patch_size 16".split()) == DONE
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        data = path.read_bytes()
        assert secret.encode() not in data, path
        assert not any(name.encode() in data for name in names), path


def test_a_run_in_one_process_opens_no_port(tmp_path, monkeypatch):
    opened, listen = [], socket.socket.listen
    monkeypatch.setattr(socket.socket, "listen", lambda s, *n: (opened.append(s), listen(s, *n)))
    assert run_here(main_pretrain, f"{PRETRAIN} --epochs 1 --output_dir {tmp_path}".split()) == DONE
    assert opened == []
