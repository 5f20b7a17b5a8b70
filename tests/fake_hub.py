"""As much of the Hugging Face hub as a download needs, on this machine."""

from __future__ import annotations

import hashlib
import json
import os
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote

from source_files import PT_INDEX, ST_INDEX, index_of

COMMIT = "0123abc" + "0" * 33


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as huggingface_hub asks: the tree of a repository, and its files."""

    repositories: dict[str, dict[str, bytes]] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models/").lstrip("/")
        repo = "/".join(path.split("/")[:2])
        files = self.repositories.get(repo)
        if files is None:
            self.answer(404, b"", **{"X-Error-Code": "RepoNotFound"})
            return
        verb, revision, *rest = path.split("/")[2:]
        if revision not in ("main", "v1", COMMIT):
            self.answer(404, b"", **{"X-Error-Code": "RevisionNotFound"})
        elif verb == "tree":
            tree = [{"type": "file", "path": n, "size": len(d), "oid": blob_id(d)} for n, d in files.items()]
            self.answer(200, json.dumps(tree).encode())
        elif verb == "revision":
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        else:
            name = unquote("/".join(rest))
            self.asked.append(f"{repo}: {name}")
            self.answer(200, files[name], ETag=f'"{blob_id(files[name])}"', **{"X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def repository(cache: Path, repo: str, files: dict[str, bytes], commit: str = COMMIT, ref: str | None = "main") -> Path:
    """A snapshot as huggingface_hub lays it out: links into blobs. Returns the snapshot's folder."""
    root = cache / ("models--" + repo.replace("/", "--"))
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    (root / "blobs").mkdir(exist_ok=True)
    for name, data in files.items():
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(os.path.relpath(blob, (folder / name).parent))
    if ref:
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return folder


SMALL = {"config.json": b"{}", "tokenizer.json": b"{}", "tokenizer.model": b"t", "vocab.txt": b"v", "modeling.py": b"#"}
REST = {
    "README.md": b"r", ".gitattributes": b"g", "tf_model.h5": b"h", "flax_model.msgpack": b"f", "model.onnx": b"o",
    "optimizer.pt": b"o", "training_args.bin": b"t", "trainer_state.json": b"{}", "onnx/model.onnx": b"o",
    "rust_model.ot": b"r", "coreml/x.mlmodel": b"c", "picture.png": b"p", "sub/config.json": b"{}",
}  # fmt: skip
TWO = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
REPOSITORIES = {
    "org/single": {
        **SMALL, **REST, "model.safetensors": b"s", "pytorch_model.bin": b"p", "model.fp16.safetensors": b"v",
    },
    "org/sharded": {
        **SMALL, **REST, ST_INDEX: index_of(*TWO, "deep/extra.safetensors"), TWO[0]: b"1", TWO[1]: b"2",
        "deep/extra.safetensors": b"3", "deep/other.safetensors": b"4", PT_INDEX: index_of("p.bin"), "p.bin": b"p",
    },
    "org/pickled": {**SMALL, **REST, "pytorch_model.bin": b"p"},
    "org/brackets": {"config.json": b"{}", "a[0].safetensors": b"a", "a0.png": b"0"},
    "org/stale": {"config.json": b"{}", ST_INDEX: index_of(*TWO), "pytorch_model.bin": b"p"},
    "org/lacking": {"config.json": b"{}", ST_INDEX: index_of(*TWO), TWO[0]: b"1"},
    "org/no-shards": {"config.json": b"{}", ST_INDEX: b"[]", TWO[0]: b"1"},
    "org/several": {"a.pth": b"a", "b.pth": b"b"},
    "org/pipe": {"model_index.json": b"{}", "unet/model.safetensors": b"u", "vae/model.safetensors": b"v"},
    "org/empty": {"README.md": b"r"},
    "org/gguf": {"model.gguf": b"g"},
}  # fmt: skip
