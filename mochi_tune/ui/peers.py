"""The user at the other end of a connection on this machine, from the kernel's table of sockets."""

import ipaddress
import os
import sys
from pathlib import Path

# Tables of IPv4 and IPv6 sockets. Source: Documentation/networking/proc_net_tcp.rst of Linux.
TABLES = Path("/proc/net/tcp"), Path("/proc/net/tcp6")


def is_of_this_user(client: tuple[str, int] | None, server: tuple[str, int] | None) -> bool:
    """Whether this user or root has the socket that is connected to one of this process.

    It is True where the kernel has no such tables, as on macOS.

    Args:
        client: address and port of the other end; None if unknown.
        server: address and port of this end; None if unknown.
    """
    try:
        first = TABLES[0].read_text()
    except OSError:
        return True
    if client is None or server is None:
        return False
    try:
        tables = (first, TABLES[1].read_text())
    except OSError:
        tables = (first, "")
    # An IPv6 socket may be connected to an IPv4 address, which is then written as ::ffff:127.0.0.1.
    for table, is_six in zip(tables, (False, True), strict=True):
        ends = [_in_table(host, port, is_six) for host, port in (client, server)]
        row = table.partition(f": {' '.join(ends)} ")[2].partition("\n")[0].split()
        # After the addresses: state, queues, timer, retransmits, user, timeout, inode. The row of a socket that its
        # process has closed remains for a while, with user 0 and inode 0.
        if len(row) > 6 and row[6] != "0":
            return int(row[4]) in (os.getuid(), 0)
    return False


def _in_table(host: str, port: int, is_six: bool) -> str:
    """Returns an address as in the tables: words of 32 bits in the byte order of the machine, and the port, in hex."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if is_six and address.version == 4:
        address = ipaddress.IPv6Address(f"::ffff:{address}")
    raw = address.packed
    words = [int.from_bytes(raw[start : start + 4], sys.byteorder) for start in range(0, len(raw), 4)]
    return f"{''.join(f'{word:08X}' for word in words)}:{port:04X}"
