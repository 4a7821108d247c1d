"""Downloads one file, going on where it stopped, and refuses what is sent in its place."""

import http.client
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from mochi_tune.adapters.hub import TIMEOUT_SECONDS
from mochi_tune.errors import CheckpointError, one_line
from mochi_tune.files import STAND_IN_BYTES, fsync, name_stand_in
from mochi_tune.weights.pull_record import HubFile

CHUNK_BYTES = 2**20
AGAIN = "run the same command again, it goes on from what is there."


def fetch(file: HubFile, partial: Path) -> None:
    """Appends to `partial` until it is complete; a broken connection is taken up again while bytes keep coming.

    Raises:
        CheckpointError: a connection brought nothing, or not the file. What was fetched of it stays.
    """
    try:
        with partial.open("ab") as out, tqdm(desc=file.name, total=file.num_bytes, unit="B", unit_scale=True) as bar:
            while (start := out.seek(0, os.SEEK_END)) < file.num_bytes:
                reason = "the connection was closed"
                try:
                    download(file, start, out, bar)
                except urllib.error.HTTPError as error:
                    if error.code in (401, 403):
                        raise _wrong_answer(
                            file, f"{error.code} {error.reason}", "log in with `hf auth login`, or check the proxy"
                        ) from error
                    reason = one_line(error)
                except (OSError, http.client.HTTPException) as error:
                    reason = one_line(error)
                if out.tell() <= start:
                    raise CheckpointError(
                        f"{file.name} stopped at {start} of {file.num_bytes} bytes ({reason}): check the network "
                        "connection and run the same command again, it goes on from there."
                    )
        fsync(partial)
    finally:
        if partial.exists() and not partial.stat().st_size and file.num_bytes:
            partial.unlink()


def download(file: HubFile, start: int, out, bar: tqdm) -> None:
    """Asks for the bytes from `start` on, and appends what one connection brings.

    Raises:
        CheckpointError: what it brings is not this file; nothing of that is written.
    """
    from huggingface_hub.utils import build_hf_headers

    request = urllib.request.Request(file.url, headers={"Range": f"bytes={start}-", "Accept-Encoding": "identity"})
    for name, value in build_hf_headers(library_name="mochi-tune").items():
        request.add_unredirected_header(name, value)
    opener = urllib.request.build_opener(SameHostHeaders)
    with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
        begin = first_byte(file, start, response)
        chunk = response.read(CHUNK_BYTES)
        if kind := name_stand_in(chunk[:STAND_IN_BYTES]):
            raise _wrong_answer(file, kind, "log in to the network, or check the proxy")
        if begin < start:
            # The server ignores ranges, so this is the whole file.
            out.truncate(0)
            out.seek(0)
        bar.update(begin - bar.n)
        while chunk:
            if out.tell() + len(chunk) > file.num_bytes:
                out.truncate(begin)
                raise _wrong_answer(file, f"more than its {file.num_bytes} bytes", "check the network or the proxy")
            out.write(chunk)
            bar.update(len(chunk))
            chunk = response.read(CHUNK_BYTES)


def first_byte(file: HubFile, start: int, response: http.client.HTTPResponse) -> int:
    """Returns where in the file the body of an answer begins: at `start`, or at 0 from a server that ignores ranges.

    Raises:
        CheckpointError: by its headers, the answer is not this file.
    """
    headers, advice = response.headers, "log in to the network, or check the proxy"
    if headers.get_content_type() == "text/html":
        raise _wrong_answer(file, f"a web page of {urlsplit(response.url).hostname}", advice)
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        said = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", f"bytes {start}-0/*"))
        if said is None or int(said[1]) != start or said[2] not in ("*", str(file.num_bytes)):
            raise _wrong_answer(file, f"another part ({headers.get('Content-Range')})", advice)
        return start
    said = headers.get("Content-Length", str(file.num_bytes))
    if response.status != http.HTTPStatus.OK or said != str(file.num_bytes):
        raise _wrong_answer(file, f"{said} bytes, where it has {file.num_bytes}", advice)
    return 0


def _wrong_answer(file: HubFile, what: str, advice: str) -> CheckpointError:
    host = urlsplit(file.url).hostname
    return CheckpointError(f"{file.name}: {host} answers with {what}, and not with the file: {advice}, and {AGAIN}")


class SameHostHeaders(urllib.request.HTTPRedirectHandler):
    """Keeps the user's token for the hub itself: a redirect to the storage host goes without it."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """Hands the unredirected headers on where the host stays the same."""
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and new.host == req.host:
            for name, value in req.unredirected_hdrs.items():
                new.add_unredirected_header(name, value)
        return new
