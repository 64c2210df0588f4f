"""Released weights by name: downloaded once into a cache folder, and verified at every use.

    python -m util.download --list
    python -m util.download mae_vit_base_300e

The files are on Google Drive, under the terms of the MAE-SFER authors. No hashes by the authors are
known, so the sha256 of the first download is recorded beside the file and compared from then on.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from util.errors import BadInput
from util.files import lock, read_patiently, write_file
from util.options.groups import add_cache_dir
from util.options.parser import Parser
from util.program import run_program
from util.wording import did_you_mean, without_head

# gdown and torch (in util.checkpoint) are imported where a file is downloaded or checked: programs
# look up names here while they parse their options, which must be quick.

DRIVE = "https://drive.google.com/uc?id={id}"  # for gdown, which answers Drive's questions
PAGE = "https://drive.google.com/file/d/{id}/view"  # for a browser
TERMS = "the files come under the terms of their authors (MAE-SFER)"
NO_CLASSIFIERS = "all were pre-trained only: fine-tune one before you predict expressions with it"
TIMEOUT, RETRIES = 30, 3  # seconds without data; reconnections per call


class Released(NamedTuple):
    """A pre-trained model without a classifier head."""

    drive_id: str
    model: str  # our name of the architecture
    epochs: int | None  # of pre-training, on 270,000 images of AffectNet; None: not published


RELEASED = {
    name: Released(drive_id, model, epochs)
    for name, drive_id, model, epochs in (
        ("mae_vit_base_300e", "1mNruds0jDCkstYdH5VkHrkeoRqoRabgS", "mae_vit_base_patch16", 300),
        ("mae_vit_small_300e", "1fPDoyHzrHwSKZI7dU7AcHd5dd2-ntwDk", "mae_vit_small_patch16", 300),
        ("mae_vit_small_600e", "1keVIevQ2sirsOpZ4TE2dSehraUBuWLJl", "mae_vit_small_patch16", 600),
        ("mae_vit_tiny_300e", "1wsXXVXlRP69RsbZiQD7GJUtCkI4JyJN7", "mae_vit_tiny_patch16", 300),
        ("mae_vit_tiny_600e", "1CZvTJRmswwMlX1Z5_48xJSMLdLtYAXq9", "mae_vit_tiny_patch16", 600),
        ("mae_vit_tiny_800e", "11Zz4jFzN7fMqdp9XdJUe8gkVTOgBUUn1", "mae_vit_tiny_patch16", 800),
        ("mae_vit_tiny_1000e", "1GwjtvvhffEtFNZWThWTTukf4Jap1QR5k", "mae_vit_tiny_patch16", 1000),
        ("convnextv2_base_affectnet", "1d56vRmpOu_r9Z8Fy61qxLyp_U6ZXP0YR", "convnextv2_base", None),
    )
}


def find_released(name: str) -> Released:
    """Look up a name. Raises BadInput with the most similar names if it is unknown."""
    if name in RELEASED:
        return RELEASED[name]
    hint = did_you_mean(name, RELEASED) or f"choose from {', '.join(RELEASED)}"
    raise BadInput(f"{name}: no released weights have this name; {hint}")


def check_classifier(source: str | Path, flag: str = "") -> None:
    """Refuse released weights where a classifier is needed, before they are downloaded.

    `flag`: the option that names the source, for the message. Raises BadInput.
    """
    if str(source) in RELEASED and not os.path.exists(source):
        raise BadInput(f"{flag} {without_head(source)}".strip())


def cached_path(name: str, cache_dir: str | Path | None = None) -> Path:
    """Where the file of released weights belongs, whether it is there or not.

    In `cache_dir`, else $MAE_SFER_CACHE, else mae_sfer/ in the user's cache folder.
    """
    folder = cache_dir or os.environ.get("MAE_SFER_CACHE")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mae_sfer"
    return Path(os.path.expanduser(folder)).absolute() / f"{name}.pth"


def fetch(name: str, cache_dir: str | Path | None = None, *, url: str | None = None) -> Path:
    """The file of released weights, downloaded unless it is in the cache.

    Several processes may ask at once: one downloads. `url`: download from there, not from Google
    Drive. Raises BadInput for an unknown name, an unusable folder, a failed download (saying how to
    get the file by hand), and a file that differs from the one first recorded.
    """
    released, path = find_released(name), cached_path(name, cache_dir)
    recorded = path.with_name(f"{path.name}.sha256")
    try:
        # A cache that is complete needs no lock, so it may be shared read-only.
        if not (path.exists() and recorded.exists()):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                _fill(path, recorded, url or DRIVE.format(id=released.drive_id))
        _verify(path, recorded)
    except OSError as error:
        raise BadInput(
            f"{path}: the cache cannot be used ({error.strerror or error}); "
            "name another folder with --cache_dir or MAE_SFER_CACHE"
        ) from None
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from downloading the same file; they wait for this one."""
    with open(path.with_name(f".{path.name}.lock"), "a") as file:
        try:
            lock(file)
        except BlockingIOError:
            print(f"{path.stem}: waiting for another process to download it", file=sys.stderr)
            lock(file, wait=True)
        yield


def _fill(path: Path, recorded: Path, url: str) -> None:
    """Ensure that the file, downloaded or put there by hand, and its recorded hash exist."""
    from util.checkpoint.container import check_container

    if path.exists():
        read_patiently(path, lambda: check_container(path))
    else:
        print(f"{path.stem}: downloading to {path.parent}; {TERMS}", file=sys.stderr)
        _download(url, path)
    if not recorded.exists():
        digest = _sha256(path)
        write_file(recorded, f"{digest}  {path.name}\n")  # as `sha256sum --check` reads it
        print(f"{path}: recorded its sha256, {digest}", file=sys.stderr)


def _download(url: str, path: Path) -> None:
    """Download to another name, check the file, and only then rename it to `path`.

    Resumes what an earlier call left, or starts over if that fails.
    """
    from util.checkpoint.container import check_container

    arriving = path.with_name(f".{path.name}.unchecked")
    earlier = _pieces(arriving)
    try:
        if not arriving.exists():  # else complete: killed before the check
            _transfer(url, arriving)
        read_patiently(arriving, lambda: check_container(arriving))
    except BadInput as error:
        arriving.unlink(missing_ok=True)  # exists only if the check failed
        if earlier and not _pieces(arriving):
            return _download(url, path)
        reason = str(error).replace(f"{arriving}:", "the downloaded file is").partition(";")[0]
        link = PAGE.format(id=RELEASED[path.stem].drive_id)
        raise BadInput(
            f"{path.stem}: download failed: {reason}; to do it by hand, open {link} in a browser "
            f"and save the file as {path}"
        ) from None
    # gdown's files are private; make this one as readable as its folder.
    arriving.chmod(path.parent.stat().st_mode & 0o666)
    os.replace(arriving, path)


def _pieces(arriving: Path) -> list[Path]:
    """What has been downloaded: gdown's partial file, or the complete one before its check."""
    return list(arriving.parent.glob(f"{arriving.name}*"))


def _transfer(url: str, arriving: Path) -> None:
    """Download with gdown, resuming a partial file if there is one; a terminal shows progress.

    Raises BadInput if the network, Drive or the server fails; OSError if the disk does.
    """
    import gdown
    from requests import exceptions as http

    try:
        gdown.download(
            url,
            str(arriving),
            quiet=not sys.stderr.isatty(),
            log_messages={"output": ""},  # do not print the temporary name
            use_cookies=False,  # the files are public
            resume=True,
            timeout=TIMEOUT,
            retries=RETRIES,
        )
    except (gdown.DownloadError, http.RequestException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, http.RequestException) else error
        if type(cause) is gdown.DownloadError:
            for piece in _pieces(arriving):  # the server cannot resume from them
                piece.unlink()
        host = urlsplit(url).hostname
        reasons = (
            (gdown.FileURLRetrievalError, f"{host} refuses (quota used up, or no such file)"),
            (gdown.DownloadError, f"the connection was lost, and {host} cannot resume"),
            (http.ChunkedEncodingError, "the connection was lost (try again to resume)"),
            (http.SSLError, f"the TLS certificate of {host} cannot be trusted"),
            (http.Timeout, f"{host} does not answer"),
            (http.ConnectionError, f"{host} cannot be reached"),
            (Exception, str(cause)),
        )
        raise BadInput(next(why for kind, why in reasons if isinstance(cause, kind))) from None


def _sha256(path: Path) -> str:
    """Raises OSError, ReadFault."""

    def read() -> str:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    return read_patiently(path, read)


def _verify(path: Path, recorded: Path) -> None:
    """Compare with the recorded hash. Raises BadInput that names both."""
    known = recorded.read_text(errors="replace").lower().partition(" ")[0].strip()
    if (found := _sha256(path)) != known:
        raise BadInput(
            f"{path}: its sha256 is {found}, but {known!r} was first recorded; delete it to "
            f"have it downloaded again (and {recorded.name} too, if its authors have replaced it)"
        )


def released_table(cache_dir: str | Path | None = None) -> str:
    """The released weights, and which of them are in the cache."""
    row = "{:27}{:23}{:>6}   {}".format
    lines = [row("name", "model", "epochs", "cached")]
    for name, released in RELEASED.items():
        path = cached_path(name, cache_dir)
        size = f"{path.stat().st_size / 1e6:.1f} MB" if path.is_file() else "no"
        lines.append(row(name, released.model, released.epochs or "–", size))
    return "\n".join([*lines, "", f"cache: {path.parent}", NO_CLASSIFIERS, TERMS])


def build_parser() -> Parser:
    parser = Parser(
        "Download weights released by the MAE-SFER authors and print their paths; without a name, "
        "list what there is."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "names", nargs="*", default=[], metavar="NAME", help="names of the weights to download"
    )
    what.add_argument(
        "--list", action="store_true", help="list all names and which files are downloaded already"
    )
    add_cache_dir(parser)
    return parser


def work(command: argparse.Namespace) -> None:
    """Print the table, or the path of each file asked for; all names are checked first."""
    for name in command.names:
        find_released(name)
    for name in command.names:
        print(fetch(name, command.cache_dir))
    if not command.names:
        print(released_table(command.cache_dir))


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_program(build_parser, lambda _: None, work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
