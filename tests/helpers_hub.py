"""Hubs on localhost: one that takes uploads, with repositories, large files by LFS and commits, and one that hangs."""

import base64
import contextlib
import hashlib
import json
import socket
from http.server import BaseHTTPRequestHandler

from helpers_server import LocalServer


@contextlib.contextmanager
def silent_hub():
    """Gives the address of a hub that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


class UploadHub(LocalServer):
    """Attributes: `files` by repository and name, `visibility` by repository, and faults to inject."""

    def __init__(self):
        self.files, self.visibility, self.objects = {}, {}, {}
        self.tokens, self.operations = set(), []
        self.refuses_objects = False
        super().__init__(self.handler())

    def handler(hub):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.tokens.add(self.headers.get("Authorization"))
                path = self.path.partition("?")[0]
                if path == "/api/repos/create":
                    return self.create(json.loads(body))
                if path == "/api/validate-yaml":
                    return self.answer({"warnings": [], "errors": []})
                repo = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2]).removesuffix(".git")
                if "/preupload/" in path:
                    return self.answer({"files": [self.mode(file["path"]) for file in json.loads(body)["files"]]})
                if path.endswith(".git/info/lfs/objects/batch"):
                    objects = [self.place(each) for each in json.loads(body)["objects"]]
                    return self.answer({"transfer": "basic", "objects": objects})
                assert "/commit/" in path, path
                return self.commit(repo, [json.loads(line) for line in body.splitlines()])

            def do_PUT(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                if hub.refuses_objects:
                    return self.answer({"error": "no room"}, 403)
                assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/objects/")
                hub.objects[self.path.removeprefix("/objects/")] = content
                return self.answer({})

            def create(self, wanted):
                repo = f"{wanted['organization']}/{wanted['name']}"
                is_there = repo in hub.files
                hub.files.setdefault(repo, {})
                hub.visibility.setdefault(repo, wanted.get("visibility"))
                return self.answer({"url": f"{hub.address}/{repo}"}, 409 if is_there else 200)

            def mode(self, path):
                is_large = path.endswith((".safetensors", ".mp4", ".png"))
                return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}

            def place(self, each):
                return each | {"actions": {"upload": {"href": f"{hub.address}/objects/{each['oid']}"}}}

            def commit(self, repo, operations):
                for operation in operations:
                    value = operation["value"]
                    hub.operations.append(operation["key"])
                    if operation["key"] == "file":
                        hub.files[repo][value["path"]] = base64.b64decode(value["content"])
                    elif operation["key"] == "lfsFile":
                        hub.files[repo][value["path"]] = hub.objects[value["oid"]]
                return self.answer({"commitUrl": f"{hub.address}/{repo}/commit/1", "commitOid": "1" * 40})

            def answer(self, value, status=200):
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        return Handler
