"""Compiling for an NVIDIA GPU that is not there, and reading what XLA made of the program.

Needs the wheels jax-cuda12-plugin and jax-cuda12-pjrt of jax's own version, and
nvidia-cuda-nvcc-cu12 for `ptxas`. Nothing runs: memory, kernels and CUDA graphs are what the
compiler says; times and the choice of GEMM algorithms are not known.
"""

import math
import os
import re
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import files
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh

# A line of XLA's list of thunks: "    007: kCustomKernel [...] name grid: [...]  shared_memory: 0".
_THUNK = re.compile(r"^(?P<indent> *)\d+: (?P<kind>k\w+)\s*(?:\[.*?\])?\s*(?P<name>[\w.]*)")
_SHARED = re.compile(r"shared_memory: (\d+) bytes")
# Bytes that a kernel may spill: a few registers cost little, tiles cost a lot. The tile of dk and
# dv that spills 312 is 2.5 times as fast on an H100 as the largest that spills none
# (docs/results/gpu).
_MOST_SPILLED = 64
_MEASURED_SPILLS = {"attention_backward_dkv": 512}
_DUMPING = threading.Lock()
_BY_MOSAIC: dict[tuple[str, ...], list] = {}  # by a program's calls of Mosaic's kernels
_CONTAINERS = ("kCommandBuffer", "kSequential", "kWhile", "kConditional")
_PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\S+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Target:
    """A chip to compile for: its name in the tuning tables, its ptxas architecture, the largest
    shared memory of a block in bytes, and XLA's description of it."""

    name: str
    arch: str
    shared_limit: int
    mesh: AbstractMesh
    sharding: NamedSharding

    @classmethod
    def read(cls, file: Path) -> "Target":
        """A target from XLA's `GpuTargetConfigProto` as text; the file's stem is its name."""
        text = file.read_text(encoding="utf-8")
        topology = topologies.get_topology_desc(
            "", platform="cuda", target_config=text, topology="1x1x1"
        )
        mesh = topologies.make_mesh(topology, (1,), ("x",))
        major = re.search(r"cuda_compute_capability \{ major: (\d+)(?: minor: (\d+))?", text)
        limit = re.search(r"shared_memory_per_block_optin: (\d+)", text)
        assert major is not None and limit is not None
        arch = f"sm_{major[1]}{major[2] or 0}" + ("a" if "ACCELERATED_FEATURES" in text else "")
        sharding = NamedSharding(mesh, PartitionSpec())
        return cls(file.stem, arch, int(limit[1]), mesh.abstract_mesh, sharding)


@dataclass(frozen=True)
class Kernel:
    """A GPU kernel: dynamic shared memory and spills in bytes, registers per thread."""

    name: str
    shared: int
    registers: int
    spilled: int


@dataclass(frozen=True)
class CompiledProgram:
    """What a compiled program is made of.

    kernels: the Pallas kernels. launches: device operations of one run (loops counted once).
    outside_graphs: those that no CUDA graph holds, by kind and name. aliased, donated: bytes that
    the program updates in place, and that it was given to. traced_s: processor time of tracing and
    lowering, seconds.
    """

    temp: int
    traced_s: float
    aliased: int
    donated: int
    kernels: tuple[Kernel, ...]
    launches: int
    outside_graphs: dict[str, int]

    def faults(self, target: Target) -> list[str]:
        """What must not be: copies of donated buffers, more than a few spilled registers, too much
        shared memory."""
        found = []
        if self.aliased < self.donated:
            found.append(f"copies {self.donated - self.aliased:,} donated bytes")
        for kernel in self.kernels:
            if kernel.spilled > _MEASURED_SPILLS.get(kernel.name, _MOST_SPILLED):
                found.append(f"{kernel.name} spills {kernel.spilled} bytes")
            if kernel.shared > target.shared_limit:
                found.append(f"{kernel.name} wants {kernel.shared:,} bytes of shared memory")
        return found

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def lower_only(
    target: Target, function: Callable, arguments: tuple, donated: tuple[int, ...] = ()
) -> jax.stages.Lowered:
    """A function of abstract arguments traced and lowered for the target; what it compiles to can
    be looked at and not be run."""
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target.sharding), arguments
    )
    jitted = jax.jit(function, donate_argnums=donated, keep_unused=True)
    with use_abstract_mesh(target.mesh):
        return jitted.lower(*placed)


def compile_for(
    target: Target, function: Callable, arguments: tuple, donated: tuple[int, ...] = ()
) -> CompiledProgram:
    """Compile a function of abstract arguments (pytrees of ShapeDtypeStruct) for the target."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        started = time.thread_time()
        lowered = lower_only(target, function, arguments, donated)
        traced_s = time.thread_time() - started
        compiled, by_mosaic = _compile(lowered, options)
        # The last list is the one with graphs; XLA writes no second one for very short programs.
        thunks = sorted(Path(folder).glob("*.thunk_sequence*.txt"), key=lambda f: len(f.name))[-1]
        shared, launches, outside = _read_thunks(thunks.read_text(encoding="utf-8"))
        names = set(re.findall(r'name = "(\w+)", num_stages', compiled.as_text() or ""))
        kernels = _assemble(sorted(Path(folder).glob("*.ptx")), names, shared, target.arch)
        kernels += by_mosaic
    memory = compiled.memory_analysis()
    assert memory is not None
    return CompiledProgram(
        temp=memory.temp_size_in_bytes,
        traced_s=round(traced_s, 3),
        aliased=memory.alias_size_in_bytes,
        donated=sum(
            math.prod(x.shape) * x.dtype.itemsize
            for x in jax.tree.leaves([arguments[i] for i in donated])
        ),
        kernels=tuple(kernels),
        launches=launches,
        outside_graphs=outside,
    )


def _compile(lowered: jax.stages.Lowered, options: dict) -> tuple[jax.stages.Compiled, list]:
    """The program compiled, and its kernels by Mosaic, of which XLA's dump tells nothing."""
    calls = tuple(re.findall(r"@mosaic_gpu\w*\(.*?\) (.*)", lowered.as_text()))
    if not calls:
        return lowered.compile(compiler_options=options), []
    # Mosaic asks once per process where to dump to, and not every version numbers the kernels
    # across programs: one program at a time. What it has compiled, it does not compile again.
    with _DUMPING:
        folder = Path(_mosaic_folder().name)
        compiled = lowered.compile(compiler_options=options)
        if found := [_read_mosaic(file) for file in sorted(folder.glob("*.ptxas"))]:
            _BY_MOSAIC[calls] = found
        for file in folder.iterdir():
            file.unlink()
        return compiled, _BY_MOSAIC[calls]


@cache
def _mosaic_folder() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder.name
    return folder


def _read_mosaic(ptxas: Path) -> Kernel:
    """A kernel from what `ptxas` said of it, and from the passes that led to it, which say how much
    shared memory its launch asks for."""
    found = _PTXAS.search(ptxas.read_text(encoding="utf-8"))
    passes = ptxas.with_suffix(".mlir-passes.log")
    shared, constants = 0, {}
    with passes.open(encoding="utf-8") as lines:
        for line in lines:
            if constant := re.search(r"(%\w+) = arith.constant (\d+) : i32", line):
                constants[constant[1]] = int(constant[2])
            if launch := re.search(r"dynamic_shared_memory_size (%\w+)", line):
                shared = constants[launch[1]]
                break
    if found is None or not shared:
        raise ValueError(f"{ptxas.stem}: not as Mosaic used to write it")
    return Kernel(
        name=found["name"],
        shared=shared,
        registers=int(found["registers"]),
        spilled=int(found["stores"]) + int(found["loads"]),
    )


def _read_thunks(text: str) -> tuple[dict[str, int], int, dict[str, int]]:
    """Shared memory by kernel, the number of device operations, and those outside CUDA graphs."""
    shared: dict[str, int] = {}
    outside: Counter[str] = Counter()
    launches, graph_indent = 0, None
    for line in text.splitlines():
        thunk = _THUNK.match(line)
        if thunk is None:
            continue
        indent = len(thunk["indent"])
        if graph_indent is not None and indent <= graph_indent:
            graph_indent = None
        if thunk["kind"] == "kCommandBuffer":
            graph_indent = indent
        if thunk["kind"] in _CONTAINERS:
            continue
        launches += 1
        if memory := _SHARED.search(line):
            shared[thunk["name"]] = int(memory[1])
        if graph_indent is None:
            outside[f"{thunk['kind']} {thunk['name']}".strip()] += 1
    return shared, launches, dict(outside)


def _assemble(ptx: list[Path], names: set[str], shared: dict[str, int], arch: str) -> list[Kernel]:
    """Registers and spills of the kernels with these names, from `ptxas`."""
    entry = re.compile(r"\.entry (\w+)")
    wanted = []
    for file in ptx:
        entries = entry.findall(file.read_text(encoding="utf-8"))
        if any(re.sub(r"_\d+$", "", e) in names or e in names for e in entries):
            wanted.append(file)

    def assemble(file: Path) -> list[Kernel]:
        command = [_ptxas(), "-v", f"-arch={arch}", str(file), "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [
            Kernel(
                name=found["name"],
                shared=shared.get(found["name"], 0),
                registers=int(found["registers"]),
                spilled=int(found["stores"]) + int(found["loads"]),
            )
            for found in _PTXAS.finditer(done.stdout + done.stderr)
        ]

    if names and not wanted:
        raise FileNotFoundError(f"XLA wrote no PTX of {', '.join(sorted(names))}")
    with ThreadPoolExecutor(max_workers=2) as pool:
        return [kernel for kernels in pool.map(assemble, wanted) for kernel in kernels]


def _ptxas() -> str:
    for file in files("nvidia-cuda-nvcc-cu12") or ():
        if file.name == "ptxas":
            return str(file.locate())
    raise FileNotFoundError("ptxas not found: pip install nvidia-cuda-nvcc-cu12")
