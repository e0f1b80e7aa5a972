"""Fetch pictures to learn from: 3,391 emoji drawn in 3D, 256x256 pixels each, 16 MB.

    python -m utils.data.fluent_emoji pictures/fluent_emoji

These are Microsoft's Fluent Emoji (MIT licence), as the npm package @lobehub/fluent-emoji-3d brings
them; npm itself is not needed. The registry is npm's own, or the one that npm is configured for: by
the variable npm_config_registry, or by a line `registry=` of ~/.npmrc.
"""

import base64
import hashlib
import http.client
import io
import os
import re
import shutil
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path, PurePosixPath

from utils.errors import UserError, run_tool
from utils.files import make_folder

REGISTRY = "https://registry.npmjs.org/"
ARCHIVE = "@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.1.0.tgz"
SHA512 = "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="
FOLDER = PurePosixPath("package/assets")  # in the archive
COUNT = 3391
SECONDS = 60  # without an answer
REMEDY = "try again, or learn from images of your own: make photos PHOTOS=/path/to/folder"


def registry():
    """The address of the npm registry, which ends with a slash."""
    address = os.environ.get("npm_config_registry") or os.environ.get("NPM_CONFIG_REGISTRY")
    settings = Path.home() / ".npmrc"
    if not address and settings.is_file():
        text = settings.read_text(errors="replace")
        lines = re.findall(r"^\s*registry\s*=\s*[\"']?(https?://[^\s\"']+)", text, re.MULTILINE)
        address = lines[-1] if lines else None
    return (address or REGISTRY).rstrip("/") + "/"


def without_login(address):
    """(an address without its user:password@, the header that says these to the server, a dict)."""
    found = re.match(r"([^/]*//)([^/]*)@", address)
    if not found:
        return address, {}
    coded = base64.b64encode(urllib.parse.unquote_to_bytes(found[2])).decode()
    return found[1] + address[found.end() :], {"Authorization": f"Basic {coded}"}


def download(address):
    """The bytes at an address; UserError where they do not come, or are not those of SHA512."""
    address, login = without_login(address)
    try:
        request = urllib.request.Request(address)
        for header, value in login.items():
            request.add_unredirected_header(header, value)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            content = answer.read()
    # urllib's own errors are OSErrors; an answer that ends early is an HTTPException
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"cannot get {address} ({error}): {REMEDY}") from None
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != SHA512:
        raise UserError(f"{address} is not the archive that it should be: its {len(content)} bytes "
                        f"have another SHA-512; {REMEDY}")
    return content


def unpack(content, folder):
    """Write the pictures of the archive `content` into a new folder, which is there with all of
    them or not at all.

    Their times are those of the archive: caches are tied to the times of files.
    """
    make_folder(folder.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if member.isfile() and path.parent == FOLDER:
                    picture = temporary / path.name
                    picture.write_bytes(archive.extractfile(member).read())
                    os.utime(picture, (member.mtime, member.mtime))
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"cannot unpack the pictures into {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv=None):
    """Fetch the pictures into the folder that `argv` (or the command line) names."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        raise UserError("name the folder that the pictures are to be put into, and nothing else")
    folder = Path(arguments[0])
    if folder.is_dir() and any(folder.iterdir()):
        print(f"pictures are in {folder} already")
        return
    address = registry() + ARCHIVE
    print(f"fetching {COUNT} emoji, 16 MB: {without_login(address)[0]}", flush=True)
    unpack(download(address), folder)
    print(f"pictures are in {folder}")


if __name__ == "__main__":
    run_tool(main)
