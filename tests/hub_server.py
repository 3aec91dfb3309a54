"""A Hugging Face Hub of one's own, for tests: what snapshot_download asks for, served from folders on 127.0.0.1."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub_server(models, refusals=None):
    """Yields (endpoint, requests): the URL for HF_ENDPOINT, and the growing list of "METHOD /path" that were asked.

    `models` maps Hub names to folders: {"google-bert/bert-base-uncased": tmp_path / "bert"}; `refusals` some of them to
    (status, X-Error-Code, part of the path that is refused).
    """
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def answer(self):
            path = self.path.partition("?")[0]
            requests.append(f"{self.command} {path}")
            for name, (status, code, part) in (refusals or {}).items():
                if name in path and part in path:
                    self.send(status, b"", **{"X-Error-Code": code} if code else {})
                    return
            match = re.fullmatch(r"/api/models/(.+?)(/revision/\w+|/tree/\w+)?", path)
            if match and match[1] in models:
                top = pathlib.Path(models[match[1]])
                files = {f.relative_to(top).as_posix(): f for f in sorted(top.rglob("*")) if f.is_file()}
                tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": etag(f)} for n, f in files.items()]
                info = {"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": n} for n in files], "tags": []}
                self.send_json(tree if (match[2] or "").startswith("/tree/") else info)
                return
            match = re.fullmatch(r"/(.+?)/resolve/\w+/(.+)", path)
            file = pathlib.Path(models[match[1]]) / match[2] if match and match[1] in models else None
            if file and file.is_file():
                self.send(200, file.read_bytes(), ETag=f'"{etag(file)}"')
            else:
                self.send(404, b"", **{"X-Error-Code": "EntryNotFound" if file else "RepoNotFound"})

        def send_json(self, value):
            self.send(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

        def send(self, status, body, **headers):
            self.send_response(status)
            for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": len(body), **headers}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def etag(file):
    """Returns the git blob hash of a file, which is its ETag on the Hub."""
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
