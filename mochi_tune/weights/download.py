"""Downloads one file, resumes a partial download, and refuses other answers than the file."""

import http.client
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from mochi_tune.adapters.hub import TIMEOUT_SECONDS
from mochi_tune.errors import STAND_IN_BYTES, CheckpointError, name_stand_in, one_line
from mochi_tune.files import fsync
from mochi_tune.weights.pull_record import HubFile

CHUNK_BYTES = 2**20
# Advice at the end of messages about a download that can be resumed.
AGAIN = "run the same command again, it continues the download."


def fetch(file: HubFile, partial: Path) -> None:
    """Downloads a file to `partial`, from where it stopped; reconnects as long as each connection brings bytes.

    Raises:
        CheckpointError: a connection brought nothing or something else than the file. The partial file stays.
    """
    try:
        with partial.open("ab") as out, tqdm(desc=file.name, total=file.num_bytes, unit="B", unit_scale=True) as bar:
            while (start := out.seek(0, os.SEEK_END)) < file.num_bytes:
                reason = "the connection was closed"
                try:
                    _download(file, start, out, bar)
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
                        f"connection and {AGAIN}"
                    )
        fsync(partial)
    finally:
        if partial.exists() and not partial.stat().st_size and file.num_bytes:
            partial.unlink()


def _download(file: HubFile, start: int, out, bar: tqdm) -> None:
    """Requests the bytes from `start` on and appends what one connection brings.

    Raises:
        CheckpointError: the answer is not this file; nothing of it is kept.
    """
    from huggingface_hub.utils import build_hf_headers

    request = urllib.request.Request(file.url, headers={"Range": f"bytes={start}-", "Accept-Encoding": "identity"})
    for name, value in build_hf_headers(library_name="mochi-tune").items():
        request.add_unredirected_header(name, value)
    opener = urllib.request.build_opener(_SameHostHeaders)
    with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
        begin = _first_byte(file, start, response)
        chunk = response.read(CHUNK_BYTES)
        if kind := name_stand_in(chunk[:STAND_IN_BYTES]):
            raise _wrong_answer(file, kind, "log in to the network, or check the proxy")
        if begin < start:
            # The server ignores ranges and sends the whole file.
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


def _first_byte(file: HubFile, start: int, response: http.client.HTTPResponse) -> int:
    """Returns the position in the file of the first byte of an answer: `start`, or 0 if the server ignores ranges.

    Raises:
        CheckpointError: the headers are not those of this file.
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
    return CheckpointError(f"{file.name}: {host} answers with {what}, not with the file: {advice}, and {AGAIN}")


class _SameHostHeaders(urllib.request.HTTPRedirectHandler):
    """Does not send the user's token to another host, such as the storage that the hub redirects to."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """Keeps the unredirected headers if the host stays the same."""
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and new.host == req.host:
            for name, value in req.unredirected_hdrs.items():
                new.add_unredirected_header(name, value)
        return new
