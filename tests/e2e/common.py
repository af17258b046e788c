"""What the end-to-end suites share: the daemon, the guest, a control client, and `Suite`.

Every suite works in a temporary folder of its own, ends within its time limit, and ends
each process it started by its process id. `EBBTIDE` names the daemon's program; without it,
cargo builds the release one. `KEEP=1` keeps the folder.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
MIB = 1 << 20
BLOCK = 65536  # the tracking unit that the daemon uses unless told otherwise

os.environ["PATH"] += ":/usr/sbin:/sbin"


def program():
    """The daemon's program."""
    if "EBBTIDE" in os.environ:
        return os.environ["EBBTIDE"]
    subprocess.run(
        ["cargo", "build", "--quiet", "--release", "--bin", "ebbtide"], cwd=ROOT, check=True
    )
    os.environ["EBBTIDE"] = str(TARGET / "release/ebbtide")
    return os.environ["EBBTIDE"]


class Suite:
    """Runs named checks one after the other and prints `ok` or `not ok` for each."""

    def __init__(self, limit):
        self.name = pathlib.Path(sys.argv[0]).name
        self.limit = limit
        self.passed = 0
        self.failed = 0

    def __enter__(self):
        signal.signal(signal.SIGALRM, self._late)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        signal.alarm(self.limit)
        self.stack = contextlib.ExitStack()
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=f"ebbtide-{self.name}-"))
        return self

    def _late(self, *_):
        raise TimeoutError(f"the suite took longer than {self.limit} s")

    @contextlib.contextmanager
    def check(self, name):
        """Counts the block inside as one check; whatever it raises fails that check only."""
        start = time.monotonic()
        try:
            yield
            self.passed += 1
            verdict = "ok"
        except Exception:  # pylint: disable=broad-except
            traceback.print_exc(file=sys.stdout)
            self.failed += 1
            verdict = "not ok"
        print(f"{verdict} - {name} ({time.monotonic() - start:.1f} s)", flush=True)

    def start(self, thing):
        """Takes something with a `close` that has to happen at the end of the suite."""
        self.stack.callback(thing.close)
        return thing

    def __exit__(self, kind, error, trace):
        signal.alarm(0)
        if kind is not None and kind is not SystemExit:
            traceback.print_exception(kind, error, trace, file=sys.stdout)
            self.failed += 1
            print(f"not ok - {self.name} came to its end: {error}")
        if self.failed:
            for log in sorted(self.folder.glob("*.log")):
                print(f"--- the end of {log.name}:")
                print("\n".join(log.read_text(errors="replace").splitlines()[-25:]))
        self.stack.close()
        if os.environ.get("KEEP"):
            print(f"# kept {self.folder}")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        print(f"# {self.name}: {self.passed} passed, {self.failed} failed", flush=True)
        if kind is not SystemExit:
            os._exit(1 if self.failed or not self.passed else 0)


def wait_for(condition, seconds, what):
    """Waits until `condition()` is true and returns what it returned."""
    end = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.02)


def run(*command, timeout=60, status=0, **options):
    """Runs a program, expects its exit status, and returns what it printed."""
    options.setdefault("stdin", subprocess.DEVNULL)
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=timeout,
        text=True,
        **options,
    )
    if status is not None and done.returncode != status:
        words = " ".join(str(word) for word in command)
        raise AssertionError(
            f"{words}: exit {done.returncode}, not {status}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(4 * MIB):
            digest.update(piece)
        return digest.hexdigest()


def make_image(path, size):
    """Makes a sparse image file."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def blocks_of(path):
    """Yields the blocks of a file, one tracking unit each."""
    with open(path, "rb") as file:
        while piece := file.read(BLOCK):
            yield piece


def differing_blocks(one, other):
    """The numbers of the tracking units in which two files of one size differ."""
    return {
        number
        for number, (a, b) in enumerate(zip(blocks_of(one), blocks_of(other), strict=True))
        if a != b
    }


class QmpError(Exception):
    """An error answer; `kind` is its class."""

    def __init__(self, error):
        super().__init__(f"{error['class']}: {error['desc']}")
        self.kind = error["class"]


class Qmp:
    """A control connection made of nothing but a socket and `json`."""

    def __init__(self, path, negotiate=True):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("rb")
        self.events = []
        self.greeting = self.receive()
        if negotiate:
            self.execute("qmp_capabilities")

    def send_raw(self, data):
        """Sends bytes as they are."""
        self.socket.sendall(data)

    def receive(self):
        """The next message of any kind."""
        line = self.lines.readline()
        if not line:
            raise ConnectionError("the daemon closed the control connection")
        return json.loads(line)

    def answer(self):
        """The next answer; events that come before it are kept in `events`."""
        while True:
            message = self.receive()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(message["error"])
            else:
                return message["return"]

    def execute(self, command, **arguments):
        """Runs a command and returns its answer."""
        request = {"execute": command}
        if arguments:
            request["arguments"] = {
                name.replace("_", "-"): value for name, value in arguments.items()
            }
        self.send_raw(json.dumps(request).encode())
        return self.answer()

    def close(self):
        """Ends the connection."""
        self.lines.close()
        self.socket.close()


class Daemon:
    """`ebbtide serve` with some disks; their images are `NAME.img` in the suite's folder."""

    def __init__(self, folder, disks, options=""):
        self.folder = folder
        self.disks = disks
        self.control = folder / "control.sock"
        self.nbd = folder / "nbd.sock"
        self.log = open(folder / "daemon.log", "ab")
        self.command = [program(), "serve", "--control", self.control, "--nbd", self.nbd]
        for disk in disks:
            image, vhost = folder / f"{disk}.img", self.socket(disk)
            self.command += ["--disk", f"name={disk},path={image},socket={vhost}{options}"]
        self.process = None
        self.begin()

    def socket(self, disk):
        """The vhost-user socket of a disk."""
        return self.folder / f"{disk}.sock"

    def begin(self):
        """Starts the process and waits until it listens."""
        self.process = subprocess.Popen(
            [str(word) for word in self.command],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        wait_for(self.listens, 20, "the daemon to listen")

    def listens(self):
        """Whether the control socket takes connections and every disk has its socket."""
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon ended with status {self.process.returncode}")
        try:
            Qmp(self.control).close()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return all(self.socket(disk).exists() for disk in self.disks)

    def qmp(self, command, **arguments):
        """Runs one control command on a connection of its own."""
        connection = Qmp(self.control)
        try:
            return connection.execute(command, **arguments)
        finally:
            connection.close()

    def cli(self, *words, **options):
        """Runs the command-line client."""
        return run(program(), *words, "--control", self.control, **options)

    def snapshot(self, name):
        """Freezes all disks together."""
        return self.qmp("snapshot-create", disks=self.disks, name=name)

    def uri(self, export):
        """The NBD address of an export."""
        return f"nbd+unix:///{export}?socket={self.nbd}"

    def copy(self, export, path):
        """Copies an export into a file and returns the file's path."""
        run("nbdcopy", self.uri(export), path, timeout=120)
        return path

    def changed_blocks(self, export, since):
        """The numbers of the tracking units that an export's bitmap calls changed."""
        context = f"qemu:dirty-bitmap:{since}"
        extents = json.loads(run("nbdinfo", f"--map={context}", "--json", self.uri(export)))
        blocks = set()
        for extent in extents:
            if extent["type"] & 1:
                first = extent["offset"] // BLOCK
                past = -(-(extent["offset"] + extent["length"]) // BLOCK)
                blocks.update(range(first, past))
        return blocks

    def kill(self):
        """Ends the process at once, as a crash would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self):
        """Asks the process to end and returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def close(self):
        """Ends the process if it still runs."""
        if self.process.poll() is None:
            self.kill()
        self.log.close()


def archive_of(folder, programs):
    """An archive that adds programs to a guest, under /bin."""
    place = pathlib.Path(tempfile.mkdtemp(dir=folder)) / "bin"
    place.mkdir()
    for program_path in programs:
        shutil.copy(program_path, place)
    names = "bin\n" + "".join(f"bin/{path.name}\n" for path in sorted(place.iterdir()))
    return subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc"],
        cwd=place.parent, input=names.encode(), stdout=subprocess.PIPE, check=True,
    ).stdout  # fmt: skip


def qemu_is_before(version):
    """Whether the installed QEMU is older than a version such as (9, 2)."""
    text = run("qemu-system-x86_64", "--version")
    return tuple(int(part) for part in re.search(r"(\d+)\.(\d+)", text).groups()) < version


def load_program(folder):
    """Builds `load.c` and returns an archive that adds it to a guest as /bin/load."""
    place = folder / "load"
    place.mkdir(parents=True)
    source = pathlib.Path(__file__).with_name("load.c")
    run("cc", "-O2", "-Wall", "-static", "-pthread", "-o", place / "load", source)
    return archive_of(folder, [place / "load"])


class Guest:
    """A virtual machine that runs scripts we send it, on the disks of a daemon.

    The processor is emulated unless `EBBTIDE_ACCEL` names another accelerator.
    """

    def __init__(
        self, daemon, vcpus=1, queues=1, memory=256, fio=False, load=False, archive=b"", drives=()
    ):  # fmt: skip
        self.folder = daemon.folder
        archives = pathlib.Path(run(ROOT / "images/guest", timeout=300).strip())
        initramfs = self.folder / "initramfs"
        with open(initramfs, "wb") as whole:
            for part in ["initramfs", "initramfs-fio"] if fio else ["initramfs"]:
                whole.write((archives / part).read_bytes())
            if load:
                whole.write(load_program(self.folder))
            whole.write(archive)
        port = self.folder / "guest.sock"
        retry = "reconnect=1" if qemu_is_before((9, 2)) else "reconnect-ms=200"
        command = [
            "qemu-system-x86_64", "-M", "q35", "-accel", os.environ.get("EBBTIDE_ACCEL", "tcg"),
            "-cpu", "Nehalem,+rdrand", "-smp", vcpus, "-m", f"{memory}M", "-nodefaults", "-display", "none",
            "-object", f"memory-backend-memfd,id=mem,size={memory}M,share=on",
            "-numa", "node,memdev=mem",
            "-kernel", archives / "vmlinuz", "-initrd", initramfs,
            # The kernel's test of timers fails where the host is busy, and it waits for ever then.
            "-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check"
            " GUEST_TTY=ttyS1",
            "-serial", f"file:{self.folder}/guest-console.log",
            "-chardev", f"socket,id=port,path={port},server=on,wait=off",
            "-serial", "chardev:port",
        ]  # fmt: skip
        if drives:
            # One that is reset comes up again.
            self.monitor = self.folder / "qemu-monitor.sock"
            command += ["-qmp", f"unix:{self.monitor},server=on,wait=off"]
        else:
            command += ["-no-reboot"]
        for drive in drives:
            command += ["-drive", f"file={drive},format=raw,if=virtio,cache=writeback"]
        for disk in daemon.disks:
            command += [
                "-chardev", f"socket,id={disk},path={daemon.socket(disk)},{retry}",
                "-device", f"vhost-user-blk-pci,chardev={disk},num-queues={queues}",
            ]  # fmt: skip
        self.log = open(self.folder / "qemu.log", "wb")
        self.process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL,
            stdout=self.log, stderr=self.log,
        )  # fmt: skip
        self.port = wait_for(lambda: self._connect(port), 20, "QEMU to start")
        self.received = b""
        self.wait_until_up()

    def _connect(self, path):
        if self.process.poll() is not None:
            raise AssertionError("QEMU ended: " + (self.folder / "qemu.log").read_text())
        port = socket.socket(socket.AF_UNIX)
        try:
            port.connect(str(path))
            return port
        except (FileNotFoundError, ConnectionRefusedError):
            port.close()
            return None

    def _line(self, wanted, seconds):
        """Reads lines up to one that is wanted; returns those before it, and it."""
        end = time.monotonic() + seconds
        lines = []
        while True:
            while b"\n" in self.received:
                line, self.received = self.received.split(b"\n", 1)
                line = line.decode(errors="replace").rstrip("\r")
                if wanted(line):
                    return lines, line
                lines.append(line)
            if not select.select([self.port], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"no answer from the guest in {seconds} s: {lines[-5:]}")
            data = self.port.recv(65536)
            if not data:
                raise ConnectionError(f"the guest is gone: {lines[-5:]}")
            self.received += data

    def wait_until_up(self):
        """Waits until the guest takes scripts, after its start or a reset; returns the lines before."""
        return self._line(lambda line: "@@ready" in line, 90)[0]

    def next_line(self, wanted, seconds):
        """Waits for a line that a script prints and that begins with `wanted`."""
        return self._line(lambda line: line.startswith(wanted), seconds)[1]

    def reset(self):
        """Takes the power away from under the guest, and gives it back."""
        Qmp(self.monitor).execute("system_reset")

    def begin(self, script):
        """Sends a script and does not wait for it."""
        self.port.sendall((script.strip("\n") + "\n@@run\n").encode())

    def result(self, timeout):
        """Waits for the script to end; returns its exit status and what it printed."""
        lines, last = self._line(lambda line: line.startswith("@@exit"), timeout)
        return int(last.split()[1]), "\n".join(lines)

    def run(self, script, timeout=60):
        """Runs a script to its end, expects success, and returns what it printed."""
        self.begin(script)
        status, output = self.result(timeout)
        if status != 0:
            raise AssertionError(f"exit {status} in the guest of:\n{script}\n{output}")
        return output

    def power_off(self):
        """Switches the guest off and waits for QEMU to end."""
        self.port.sendall(b"@@off\n")
        status = self.process.wait(30)
        assert status == 0, f"QEMU ended with status {status}"

    def close(self):
        """Ends QEMU if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self.port.close()
        self.log.close()
