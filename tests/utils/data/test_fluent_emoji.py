"""Fetching the pictures of `make photos` from a registry: one on loopback that holds a few."""

import base64
import hashlib
import http.server
import io
import tarfile
import threading

import pytest

from helpers import free_port
from utils.data import fluent_emoji
from utils.errors import UserError

TIME = 499162500  # of all files that npm packs


@pytest.fixture
def archive(monkeypatch):
    """The bytes of a package, whose hash is the expected one."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as file:
        for name in ("package.json", "assets/1f600.webp", "assets/1f601.webp", "../../out.webp"):
            member = tarfile.TarInfo(f"package/{name}")
            member.size, member.mtime = 5, TIME
            file.addfile(member, io.BytesIO(b"image"))
    digest = hashlib.sha512(content.getvalue()).digest()
    monkeypatch.setattr(fluent_emoji, "SHA512", base64.b64encode(digest).decode())
    return content.getvalue()


@pytest.fixture
def registry(archive, monkeypatch, tmp_path):
    """A registry that npm is configured for; gives the paths it was asked for, and the logins."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            login = self.headers.get("Authorization")
            asked.append((self.path, login) if login else self.path)
            folder = self.path.removesuffix(fluent_emoji.ARCHIVE)
            self.send_response(200 if folder in ("/npm/", "/cut/") else 404)
            if folder == "/cut/":
                self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(archive)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/npm")
    yield asked
    server.shutdown()
    server.server_close()


def test_pictures_are_fetched_once(registry, tmp_path, capsys):
    fluent_emoji.main(["pictures/emoji"])
    fluent_emoji.main(["pictures/emoji"])
    found = sorted((tmp_path / "pictures").rglob("*"))
    assert [path.name for path in found] == ["emoji", "1f600.webp", "1f601.webp"]
    assert found[1].read_bytes() == b"image" and found[1].stat().st_mtime == TIME
    assert registry == [f"/npm/{fluent_emoji.ARCHIVE}"]
    assert "already" in capsys.readouterr().out


def test_a_login_is_sent_and_not_shown(registry, monkeypatch, tmp_path, capsys):
    address = fluent_emoji.registry()
    with_login = address.replace("://", "://me:se%40same@")
    monkeypatch.setenv("npm_config_registry", with_login)
    fluent_emoji.main(["emoji"])
    login = "Basic " + base64.b64encode(b"me:se@same").decode()
    assert registry == [(f"/npm/{fluent_emoji.ARCHIVE}", login)]
    monkeypatch.setenv("npm_config_registry", with_login.replace("/npm", "/other"))
    with pytest.raises(UserError, match="cannot get http://127") as error:
        fluent_emoji.main(["more"])
    shown = capsys.readouterr().out + str(error.value)
    assert "same" not in shown and "me:" not in shown and address in shown


def test_an_answer_that_ends_early_gets_a_sentence(registry):
    address = fluent_emoji.registry().replace("/npm", "/cut")
    with pytest.raises(UserError, match="cannot get .*IncompleteRead"):
        fluent_emoji.download(address + fluent_emoji.ARCHIVE)


def test_another_archive_is_refused(registry, monkeypatch, tmp_path):
    monkeypatch.setattr(fluent_emoji, "SHA512", "other")
    with pytest.raises(UserError, match="have another SHA-512"):
        fluent_emoji.main(["emoji"])
    assert not list(tmp_path.iterdir())


def test_without_a_connection_one_sentence_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{free_port()}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match="cannot get http://127.*make photos PHOTOS=") as error:
        fluent_emoji.main([str(tmp_path / "emoji")])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="name the folder"):
        fluent_emoji.main([])


@pytest.mark.parametrize("text, expected", [
    ("fund=false\nregistry=https://npm.example/mirror\n", "https://npm.example/mirror/"),
    ("@lobehub:registry=https://other.example\n", fluent_emoji.REGISTRY),
    ("", fluent_emoji.REGISTRY),
])
def test_the_registry_is_the_one_of_npmrc(text, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".npmrc").write_text(text)
    assert fluent_emoji.registry() == expected
