import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from step1x.engine.errors import InputError
from step1x.engine.folder import locate, version_of

Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("version", "preset"), [("v1.0", "official-v1.0"), ("v1.1", "official-v1.1"), ("v1.2", "diffusers-v1.2")]
)
def test_an_official_folder(official: Make, version: str, preset: str) -> None:
    root = official(version)
    folder = locate(root)
    assert (folder.name, folder.layout, folder.version) == ("official", "official", version)
    assert folder.variant().name == preset
    assert folder.text is None
    assert folder.vae is not None
    assert [path.name for path in folder.vae.files] == ["vae.safetensors"]


def test_a_diffusers_folder(diffusers: Make) -> None:
    folder = locate(str(diffusers()))
    assert (folder.name, folder.layout, folder.version) == ("diffusers", "diffusers", "v1.1")
    assert folder.variant().name == "diffusers-v1.1"


def test_where_the_text_model_is(official: Make, diffusers: Make) -> None:
    root = official()
    (root / "Qwen2.5-VL-7B-Instruct").mkdir()
    assert locate(root).needed_text() == (root / "Qwen2.5-VL-7B-Instruct",) * 2
    root = diffusers()
    (root / "text_encoder").mkdir()
    with pytest.raises(InputError, match=r"no text model here; looked for text_encoder/ and processor/"):
        locate(root).needed_text()
    (root / "processor").mkdir()
    assert locate(root).needed_text() == (root / "text_encoder", root / "processor")


def test_the_version_is_in_the_keys() -> None:
    assert version_of({}) == "v1.1"
    assert version_of({"connector.scale_factor": 0}) == "v1.0"
    assert version_of({"text_token_mapping.weight": 0}) == "v1.2"


def test_a_chosen_preset_must_be_of_the_version(official: Make) -> None:
    folder = locate(official("v1.1"))
    assert folder.variant("diffusers-v1.1").name == "diffusers-v1.1"
    assert folder.variant("v1.1").name == "official-v1.1"
    message = r"v1\.1 weights, but preset official-v1\.0 is for v1\.0; use official-v1\.1"
    with pytest.raises(InputError, match=message):
        folder.variant("official-v1.0")
    with pytest.raises(InputError, match="unknown variant 'v2'"):
        folder.variant("v2")


def test_settings_of_a_small_model(diffusers: Make) -> None:
    overrides = {"template_tokens": 20, "reference_ids": [1, 0, 0], "guidance": 3.5}
    folder = locate(diffusers(settings={"variant": "official-v1.1", "overrides": overrides}))
    row = folder.variant()
    assert (row.name, row.template_tokens, row.reference_ids) == ("official-v1.1", 20, (1, 0, 0))
    assert folder.variant("diffusers-v1.1").template_tokens == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "v9"}, "unknown variant 'v9'"),
        ({"variant": "v1.0"}, "v1.1 weights, but preset official-v1.0"),
        ({"overrides": {"colour": 1}}, "overrides under step1x_engine: unknown variant field colour"),
        ({"overrides": {"steps": 0}}, "steps at least 1, got 1024 and 0"),
        ({"overrides": {"steps": "many"}}, "overrides under step1x_engine"),
        ({"overrides": [1]}, "must be an object"),
    ],
)
def test_bad_settings(diffusers: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        locate(diffusers(settings=settings)).variant()


def test_settings_must_be_an_object(diffusers: Make) -> None:
    root = diffusers()
    (root / "model_index.json").write_text('{"step1x_engine": 3}')
    with pytest.raises(InputError, match=r"model_index\.json: step1x_engine must be an object"):
        locate(root)


def test_two_models_in_one_folder(official: Make) -> None:
    root = official("v1.1")
    shutil.copy(
        official("v1.0", "other") / "step1x-edit-i1258.safetensors",
        root / "step1x-edit-i1258-FP8.safetensors",
    )
    with pytest.raises(InputError, match=r"several models here .* name the file instead"):
        locate(root)
    assert locate(root, variant="v1.0").version == "v1.0"
    assert locate(root, variant="official-v1.1").version == "v1.1"
    assert locate(root / "step1x-edit-i1258-FP8.safetensors").version == "v1.0"


def test_a_lora_beside_the_model_is_not_the_model(official: Make) -> None:
    root = official()
    save_file({"lora_unet_x.alpha": torch.ones(1)}, root / "step1x-edit-lora256-alpha128-fix-hand.safetensors")
    assert locate(root).version == "v1.1"


def test_a_model_file_of_any_name(official: Make, tmp_path: Path) -> None:
    root = official("v1.0")
    (root / "step1x-edit-i1258.safetensors").rename(root / "community.safetensors")
    folder = locate(root / "community.safetensors")
    assert (folder.name, folder.version, folder.root) == ("community", "v1.0", root)


def test_nothing_there(tmp_path: Path, diffusers: Make) -> None:
    wanted = r"no model here; looked for model_index\.json .*step1x-edit-i1258\.safetensors or step1x-edit-v1p1"
    with pytest.raises(InputError, match=wanted):
        locate(tmp_path)
    (tmp_path / "step1x-edit-i1258.ckpt").touch()
    with pytest.raises(InputError, match=r"i1258\.ckpt: a pickle"):
        locate(tmp_path)
    with pytest.raises(InputError, match=r"i1258\.ckpt: a pickle"):
        locate(tmp_path / "step1x-edit-i1258.ckpt")
    with pytest.raises(InputError, match="no such folder, and not a Hub id"):
        locate(tmp_path / "nowhere")
    root = diffusers()
    part = root / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(InputError, match="a part of a diffusers model; name its folder"):
        locate(part)
    shutil.rmtree(root / "transformer")
    with pytest.raises(InputError, match="no transformer/ beside"):
        locate(root)


def test_no_autoencoder(official: Make) -> None:
    root = official()
    (root / "vae.safetensors").rename(root / "vae.pt")
    with pytest.raises(InputError, match="a pickle"):
        locate(root).needed_vae()
    (root / "vae.pt").unlink()
    with pytest.raises(InputError, match=r"no autoencoder here; looked for vae\.safetensors"):
        locate(root).needed_vae()


# The Hub: a server on this machine that speaks as much of its protocol as a download needs.

API = "/api/models/org/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves the files of `root` as repository org/model."""

    root: ClassVar[Path]
    asked: ClassVar[list[str]]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        paths = {path.relative_to(self.root).as_posix(): path for path in self.root.rglob("*") if path.is_file()}
        head, _, name = self.path.partition(f"/{COMMIT}/")
        if self.path in (f"{API}/revision/main", f"{API}/revision/{COMMIT}"):
            self._send(200, json.dumps({"id": "org/model", "sha": COMMIT}).encode())
        elif self.path.startswith(f"{API}/revision/"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif self.path.startswith(f"{API}/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0"} for name, path in paths.items()
            ]
            self._send(200, json.dumps(tree).encode())
        elif head == "/org/model/resolve" and name in paths:
            self._send(200, paths[name].read_bytes())
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"ETag": f'"{len(body)}"', "X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(diffusers: Make) -> Iterator[str]:
    root = diffusers("repository")
    (root / "pytorch_model.bin").write_bytes(b"a pickle that nobody should fetch")
    handler = type("Handler", (Hub,), {"root": root, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()
    assert not any("pytorch_model.bin" in path for path in handler.asked)


def ask(model: str, cache: Path, endpoint: str, **environment: str) -> str:
    """What `locate` says about a Hub id, in a new process: the library reads its settings at import."""
    script = (
        "import sys\nfrom step1x.engine.folder import locate\n"
        "try: print('found', locate(sys.argv[1]).name)\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", script, model],
        env={**kept, **settings, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


DEAD = "http://127.0.0.1:9"  # nothing listens on the discard port


def test_a_hub_id_is_pinned_to_its_commit_and_then_works_offline(hub: str, tmp_path: Path) -> None:
    cache, found = tmp_path / "cache", f"found org/model@{COMMIT}"
    assert ask("org/model", cache, hub) == found
    assert ask("org/model", cache, hub, HF_HUB_OFFLINE="1") == found
    assert ask("org/model", cache, DEAD) == found
    assert ask(f"org/model@{COMMIT}", cache, DEAD) == found


def test_what_the_hub_does_not_have(hub: str, tmp_path: Path) -> None:
    assert ask("org/model@v7", tmp_path, hub) == "InputError org/model@v7: the Hub has no such revision"
    wanted = "InputError org/none: no such folder, and no such repository on the Hub (or no access)"
    assert ask("org/none", tmp_path, hub) == wanted


def test_a_hub_id_without_network(tmp_path: Path) -> None:
    wanted = "InputError org/model: no such folder, not in the Hub cache, and the Hub cannot be reached"
    assert ask("org/model", tmp_path, DEAD) == wanted
    assert ask("org/model", tmp_path, DEAD, HF_HUB_OFFLINE="1") == wanted
    assert "not a Hub id" in ask("--/..", tmp_path, DEAD)
