"""A reader as backup programs are: libnbd's, told line by line what to do.

Answers a line for each: `ok` with what was asked for, or the errno's name and what the server said.
"""

import errno
import sys

import nbd

uri, copy = sys.argv[1:]
said = []


def hear(_context, message):
    if "server message" in message:
        said.append(message.split("server message: ", 1)[1])
    return 0


server = nbd.NBD()
server.set_debug_callback(hear)
server.set_debug(True)
server.add_meta_context("base:allocation")
server.connect_uri(uri)
# What the server says, and not what the library says before it asks.
server.set_strict_mode(0)


def status(length, at):
    found = []
    server.block_status(length, at, lambda _name, _at, entries, _error: found.extend(entries) or 0)
    return " ".join(f"{length}:{flags}" for length, flags in zip(found[::2], found[1::2]))


def perform(verb, at, length):
    if verb == "copy":
        with open(copy, "r+b") as out:
            out.seek(at)
            out.write(server.pread(length, at))
        return ""
    if verb == "status":
        return status(length, at)
    if verb == "trim":
        return server.trim(length, at) or ""
    if verb == "write":
        return server.pwrite(b"x" * length, at) or ""
    if verb == "flags":
        return f"{server.is_read_only()} {server.can_trim()} {server.can_zero()} {server.can_multi_conn()}"
    raise ValueError(verb)


for line in sys.stdin:
    verb, at, length = line.split()
    said.clear()
    try:
        print("ok", perform(verb, int(at), int(length)), flush=True)
    except nbd.Error as error:
        if error.errnum not in (errno.EIO, errno.EPERM, errno.ESHUTDOWN, errno.EINVAL):
            raise
        print(errno.errorcode[error.errnum], *said, flush=True)
