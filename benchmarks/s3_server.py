"""S3 servers for benchmarks, on this machine and for this process alone.

    python benchmarks/s3_server.py radosgw --folder ceph    # until Ctrl-C; prints URL, key and secret

``moto`` is a pip package that answers like S3. ``radosgw`` is the gateway of Ceph, a store used in production: Debian's
packages are downloaded and unpacked into the folder (nothing is installed, no root is needed), and one monitor, one
storage daemon that keeps everything in memory, and the gateway are started on loopback addresses.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PYTHON = "/usr/bin/python3"  # Debian's own, for which the bindings of Ceph's command line tool are built
PACKAGES = ("ceph-mon", "ceph-osd", "radosgw")
START_SECONDS = 180
CONFIG = """[global]
fsid = {fsid}
mon host = {mon}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms bind msgr2 = false
run dir = {run}
admin socket = {run}/$name.asok
log file = {run}/$name.log
mon data = {data}/mon
osd data = {data}/osd
osd objectstore = memstore
memstore device bytes = {memory_bytes}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd crush chooseleaf type = 0
osd crush update on start = false
osd class update on start = false
osd fast shutdown = false
mon allow pool size one = true
mon max pg per osd = 1000
mon warn on pool no redundancy = false
plugin dir = {lib}/ceph
erasure code dir = {lib}/ceph/erasure-code
osd class dir = {lib}/rados-classes
osd class load list = *
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw dns name = 127.0.0.1
rgw data = {data}/rgw
"""


@dataclass(frozen=True)
class Server:
    """Where a server listens, and what it takes for credentials."""

    url: str
    key: str
    secret: str

    def environment(self, url: str | None = None) -> dict[str, str]:
        """Variables by which Amazon's tools, and ks4stream, find it; at another URL if there is a proxy."""
        return {
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def serve(kind: str, folder: Path) -> Iterator[Server]:
    """A server of the kind "moto" or "radosgw", for the duration of the block; the folder is its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with {"moto": moto, "radosgw": radosgw}[kind](folder.absolute()) as server:
        yield server


@contextmanager
def moto(folder: Path) -> Iterator[Server]:
    """The server of moto, in a process of its own."""
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, folder / "moto.log"):
        yield _when_it_answers(Server(f"http://127.0.0.1:{port}", "key", "secret"))


@contextmanager
def radosgw(folder: Path, memory_bytes: int = 8 << 30) -> Iterator[Server]:
    """Ceph's S3 gateway over one daemon that keeps everything in memory; nothing survives its end."""
    root = unpack(folder / "debs", folder / "root")
    data, run = folder / f"data-{os.getpid()}", folder / f"run-{os.getpid()}"
    for path in (data / "mon", data / "osd", data / "rgw", run):
        path.mkdir(parents=True)
    (port, mon_port), fsid = (_free_port(), _free_port()), str(uuid.uuid4())
    lib = next((root / "usr/lib").glob("*-linux-gnu"))
    config = folder / f"ceph-{os.getpid()}.conf"
    config.write_text(
        CONFIG.format(
            fsid=fsid, mon=f"v1:127.0.0.1:{mon_port}", run=run, data=data, lib=lib, memory_bytes=memory_bytes, port=port
        )
    )
    libraries = [str(path) for path in (lib, lib / "ceph", root / "lib" / lib.name) if path.is_dir()]
    env = os.environ | {
        "LD_LIBRARY_PATH": ":".join(libraries),
        "PATH": f"{root}/usr/bin:{root}/usr/sbin:{os.environ['PATH']}",
        "PYTHONPATH": f"{root}/usr/lib/python3/dist-packages",
        "CEPH_CONF": str(config),
    }

    def call(command: str) -> str:
        done = subprocess.run(shlex.split(command), env=env, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError(f"{command}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    conf = f"-c {config}"
    with ExitStack() as stack:
        call(f"monmaptool --create --clobber --fsid {fsid} --addv a [v1:127.0.0.1:{mon_port}] {folder}/monmap")
        call(f"ceph-mon {conf} --mkfs -i a --monmap {folder}/monmap")
        stack.enter_context(_running(shlex.split(f"ceph-mon {conf} -f -i a"), run / "mon.out", env))
        osd = str(uuid.uuid4())
        _retry(lambda: call(f"{PYTHON} {root}/usr/bin/ceph {conf} osd new {osd}"))
        call(f"ceph-osd {conf} -i 0 --mkfs --osd-uuid {osd}")
        call(f"{PYTHON} {root}/usr/bin/ceph {conf} osd crush add 0 1.0 root=default")
        stack.enter_context(_running(shlex.split(f"ceph-osd {conf} -f -i 0"), run / "osd.out", env))
        made = _retry(lambda: call(f"radosgw-admin {conf} user create --uid=benchmark --display-name=benchmark"))
        keys = json.loads(made[made.index("{") :])["keys"][0]
        stack.enter_context(_running(shlex.split(f"radosgw {conf} -f -n client.rgw"), run / "rgw.out", env))
        yield _when_it_answers(Server(f"http://127.0.0.1:{port}", keys["access_key"], keys["secret_key"]))


def unpack(debs: Path, root: Path) -> Path:
    """Download and unpack Debian's packages, with all they need that is not installed; once."""
    if (root / "complete").exists():
        return root
    debs.mkdir(parents=True, exist_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    wanted = subprocess.run(
        ["apt-get", "install", "--simulate", "--no-install-recommends", *PACKAGES],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [line.split()[1] for line in wanted.splitlines() if line.startswith("Inst ")]
    subprocess.run(["apt-get", "download", *names], cwd=debs, check=True, stdout=subprocess.DEVNULL)
    for deb in sorted(debs.glob("*.deb")):
        subprocess.run(["dpkg", "-x", deb, root], check=True)
    (root / "complete").touch()
    return root


@contextmanager
def _running(command: list[str], log: Path, env: dict[str, str] | None = None) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _retry(attempt: Callable[[], str]) -> str:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            return attempt()
        except (RuntimeError, subprocess.TimeoutExpired):
            if time.monotonic() > end:
                raise
            time.sleep(2)


def _when_it_answers(server: Server) -> Server:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(server.url, timeout=5).close()
        except urllib.error.HTTPError:
            return server  # it refuses, so it is there
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.3)
        else:
            return server


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("moto", "radosgw"))
    parser.add_argument("--folder", type=Path, default=Path("s3-server"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends with all it has started
    with suppress(KeyboardInterrupt), serve(options.kind, options.folder) as server:
        for name, value in server.environment().items():
            print(f"export {name}={value}", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
