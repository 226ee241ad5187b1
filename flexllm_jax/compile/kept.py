"""What tracing and lowering find out about programs, kept on disk for the next start.

JAX's persistent cache has the executables, each by a key that only tracing and lowering tell, and
those take longer than loading what the key leads to. Kept here are that key and how to call what it
leads to, by all that a program comes from: its arguments, this code, the libraries, the flags and
the device. Executables are read by JAX from its own cache. What does not fit, or cannot be read,
is compiled as if nothing were kept, and takes its place.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import pickle
import platform
import threading
import time
import zlib
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache, lru_cache
from jax._src.compilation_cache_interface import CacheInterface
from jax._src.lib import lapack, xla_client  # pyright: ignore[reportPrivateImportUsage]

log = logging.getLogger(__name__)

_CODE = ("flexllm_jax", "kernels_pallas")  # whose functions are traced
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "jaxtyping", "numpy")
_SUM_BYTES = hashlib.sha256().digest_size
_UNREAD_S = 30 * 86400
_looked_up = threading.local()
_loading = threading.Lock()


class KeptPrograms:
    """What is kept of an engine's programs.

    Args:
        folder: where, in a file of its own for every `source`.
        source: all that the programs' functions depend on beside this code.
        device: the one they run on.
    """

    def __init__(self, folder: Path, source: str, device: Any):
        self._device = device
        digest = hashlib.sha256(json.dumps([source, *_surroundings(device)]).encode())
        self._file = folder.expanduser() / "programs" / digest.hexdigest()[:32]
        self._entries: dict[str, tuple[str, bytes]] = self._read()
        self._added = False
        if device.platform == "cpu":
            # A program finds LAPACK where lowering has looked for it; one that is kept is not
            # lowered, and would call nothing.
            lapack._lapack.initialize()  # pyright: ignore[reportPrivateImportUsage]
        _note_keys(device.client)

    def load(self, name: str, signature: str) -> jax.stages.Compiled | None:
        """A program of that name and signature (`signature_of`), if it is kept."""
        kept = self._entries.get(name)
        if kept is None or kept[0] != signature:
            return None
        try:
            return _Unpickler(io.BytesIO(kept[1]), self._device).load_program()
        except Exception as error:  # by another program of the same JAX, a damaged cache, ...
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            log.warning("program %s of %s is compiled anew (%s)", name, self._file, reason)
            return None

    def add(self, name: str, signature: str, compiled: jax.stages.Compiled, key: str) -> None:
        """Keep a compiled program, which JAX's cache has by `key` (`lookups`)."""
        if entry := _pickled(compiled, key):
            self._entries[name] = signature, entry
            self._added = True

    def save(self) -> None:
        """Write what was added, and drop files that nothing has read for long; what cannot be
        written makes the next start longer."""
        if not self._added:
            return
        payload = zlib.compress(pickle.dumps(self._entries), level=1)
        unfinished = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(hashlib.sha256(payload).digest() + payload)
            unfinished.replace(self._file)
            for file in self._file.parent.iterdir():
                if file.stat().st_mtime < time.time() - _UNREAD_S:
                    file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("programs could not be kept in %s: %s", self._file, error)

    def _read(self) -> dict[str, tuple[str, bytes]]:
        try:
            whole = self._file.read_bytes()
            os.utime(self._file)
        except FileNotFoundError:
            return {}
        except OSError as error:
            log.warning("%s cannot be read (%s): programs are compiled anew", self._file, error)
            return {}
        if hashlib.sha256(whole[_SUM_BYTES:]).digest() != whole[:_SUM_BYTES]:
            log.warning("%s is damaged: programs are compiled anew", self._file)
            return {}
        return pickle.loads(zlib.decompress(whole[_SUM_BYTES:]))


def signature_of(arguments: Any, donated: Sequence[int]) -> str:
    """What a program's arguments say of it."""
    leaves, tree = jax.tree.flatten(arguments)
    return f"{leaves} {tree} {tuple(donated)}"


def compile_noting_key(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str | None]:
    """Compile; also the key by which JAX's persistent cache has the result, if it has it."""
    _looked_up.key = None
    compiled = lowered.compile()
    return compiled, _looked_up.key


@cache
def _surroundings(device: Any) -> tuple[str, ...]:
    """All that a compiled program depends on beside its source."""
    code = hashlib.sha256()
    for package in _CODE:
        folder = Path(__file__).resolve().parents[2] / package
        for file in sorted(folder.rglob("*.py")):
            code.update(file.relative_to(folder.parent).as_posix().encode() + file.read_bytes())
    settings = {k: v for k, v in jax.config.values.items() if not k.endswith("cache_dir")}
    flags = {k: v for k, v in os.environ.items() if k.startswith(("XLA_", "JAX_", "LIBTPU_"))}
    return (
        code.hexdigest(),
        repr([(library, version(library)) for library in _LIBRARIES]),
        repr(sorted((k, v) for k, v in settings.items() if isinstance(v, str | int | float))),
        repr(sorted((k, v) for k, v in flags.items() if not k.endswith("CACHE_DIR"))),
        f"{device.platform} {device.device_kind} {device.client.platform_version} {device.id}",
        _processor() if device.platform == "cpu" else "",
    )


def _processor() -> str:
    """The instructions that the host has: a program may use all of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # another system than Linux
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


class _NotingCache(CacheInterface):
    """JAX's cache, which notes the key that a thread asked for last. An entry that cannot be read,
    as of a process that was killed while writing, is replaced: JAX would meet it at every start."""

    def __init__(self, wrapped: CacheInterface):
        self._wrapped, self._path = wrapped, wrapped._path

    def get(self, key: str) -> bytes | None:
        _looked_up.key = key
        return self._wrapped.get(key)

    def put(self, key: str, value: bytes) -> None:
        found = self._wrapped.get(key)
        if found is not None and not _is_readable(found):
            (self._path / f"{key}{lru_cache._CACHE_SUFFIX}").unlink(missing_ok=True)
        self._wrapped.put(key, value)


def _is_readable(entry: bytes) -> bool:
    try:
        compilation_cache.decompress_executable(entry)  # which has a checksum
    except Exception:  # of whatever library JAX has for it
        return False
    return True


def _note_keys(backend: Any) -> None:
    found = compilation_cache._get_cache(backend)
    if found is not None and not isinstance(found, _NotingCache):
        compilation_cache._cache = _NotingCache(found)


class _Pickler(pickle.Pickler):
    """Leaves out what belongs to a process: of executables the key is kept, of devices the id."""

    def __init__(self, file: io.BytesIO, key: str):
        super().__init__(file)
        self._key = key

    def persistent_id(self, obj: Any) -> tuple | None:
        if isinstance(obj, xla_client.LoadedExecutable):
            return "executable", self._key
        if isinstance(obj, xla_client.Device):
            return "device", obj.id
        return ("client",) if isinstance(obj, xla_client.Client) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, device: Any):
        super().__init__(file)
        self._device = device

    def persistent_load(self, pid: tuple) -> Any:
        if pid == ("client",):
            return self._device.client
        if pid == ("device", self._device.id):
            return self._device
        if pid[0] != "executable":
            raise pickle.UnpicklingError(f"{pid} is not here")
        devices = xla_client.DeviceList((self._device,))
        # One after the other on a CPU, whose client has crashed while two threads did so.
        with _loading if self._device.platform == "cpu" else contextlib.nullcontext():
            found, _ = compilation_cache.get_executable_and_time(
                pid[1], None, self._device.client, devices
            )
        if found is None:
            raise pickle.UnpicklingError("JAX's cache no longer has it")
        return found

    def load_program(self) -> jax.stages.Compiled:
        """As `jax.experimental.serialize_executable` does it."""
        unloaded, leaves, in_tree, out_tree, no_kwargs = self.load()
        arguments = in_tree.unflatten(leaves)
        return jax.stages.Compiled(unloaded.load(), [], arguments, out_tree, no_kwargs=no_kwargs)


def _pickled(compiled: Any, key: str) -> bytes | None:
    """A compiled program without its executable; None for one that has more than can be kept."""
    unloaded = compiled._executable._unloaded_executable
    if compiled._params.const_args or unloaded.host_callbacks or unloaded.keepalive:
        return None
    leaves, in_tree = jax.tree.flatten(compiled.args_info)
    file = io.BytesIO()
    _Pickler(file, key).dump((unloaded, leaves, in_tree, compiled.out_tree, compiled._no_kwargs))
    return file.getvalue()
