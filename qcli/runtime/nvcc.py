"""Images of the CUDA kernels, which the driver loads. They come with the package, else from the cache, else from nvcc.

Each kernels/cuda/NAME.cu lists in comment lines the images that a package contains:

    // prebuilt: DTYPE={float,__half} BLOCK_SIZE={64,}

means one image for every combination. An empty alternative leaves the constant undefined. The kernel then works with any value of
it, so that image also serves values that are not listed. `// prebuilt:` alone means one image without constants.
kernels/prebuild.py builds them all. An image's name contains a hash of its sources, so a stale image is never found.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import qcli.runtime
from qcli.errors import KernelError, NotCompiledError
from qcli.runtime import problems

CACHE = "QCLI_CACHE"
USUAL = Path("/usr/local/cuda/bin/nvcc")
OLDEST = (7, 5)  # compute capability; nvcc 13 supports none before it
FLAGS = ("-std=c++17", "-O3")

ARCHITECTURES = "architectures"  # a file beside the prebuilt images that lists their architectures, in order

_PREBUILT = re.compile(r"^//\s*prebuilt:(.*)$", re.MULTILINE)
_CHOICE = re.compile(r"(\w+)=\{([^{}]*)\}")
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_CHECKSUM = hashlib.sha256().digest_size


def folder() -> Path:
    """The folder of the sources: kernels/cuda of a checkout, else the one installed with the package."""
    kernels = Path(__file__).parents[2] / "kernels"
    installed = Path(__file__).parent / "kernels"
    return kernels / "cuda" if (kernels / "CMakeLists.txt").exists() else installed


def sources() -> list[str]:
    """The names of the kernels' source files; `probe` is always among them."""
    return sorted({"probe", *(path.stem for path in folder().glob("*.cu"))})


def image(source: str, constants: tuple[str, ...], capability: tuple[int, int]) -> bytes:
    """A cubin or fatbin of SOURCE.cu with each "NAME=VALUE" of `constants` defined, for a GPU of that compute capability.

    Raises KernelError if there is no such image and nvcc is absent, cannot run, or rejects the source.
    """
    found = _prebuilt(source, constants, capability)
    if found is not None:
        return found
    arch = architecture(capability)
    key = _key(source, constants, arch, version(require()), *_environment_flags())
    return _cached(f"{source}-{key}.cubin", lambda: build(source, constants, ["-cubin", f"-arch={arch}"]))


def _environment_flags() -> list[str]:
    """The flags that nvcc takes from the environment."""
    given = {name: os.environ.get(name) for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")}
    return [f"{name}={flags}" for name, flags in given.items() if flags]


def complete(capability: tuple[int, int]) -> bool:
    """Whether the package has an image of every source for that GPU. nvcc is then not needed."""
    listed = {source: instances(source) for source in sources()}
    return all(listed.values()) and all(_prebuilt(s, c, capability) for s, every in listed.items() for c in every)


def architecture(capability: tuple[int, int]) -> str:
    """nvcc's name of a compute capability. For 9.0 it includes the instructions of that generation alone, such as wgmma."""
    return "sm_90a" if capability == (9, 0) else f"sm_{capability[0]}{capability[1]}"


def instances(source: str) -> list[tuple[str, ...]]:
    """The constants of each image of SOURCE.cu that a package contains."""
    every = [product(*([(name, value) for value in values] for name, values in line.items())) for line in _lines(source)]
    return [tuple(f"{name}={value}" for name, value in chosen if value) for line in every for chosen in line]


def prebuilt_name(source: str, constants: tuple[str, ...]) -> str:
    """The file name of a prebuilt image of the present sources."""
    return f"{source}-{_key(source, constants)}.fatbin"


def find() -> str | None:
    """nvcc: in CUDA_HOME, on PATH, in the toolkit's usual folder, or in NVIDIA's Python packages."""
    places = [Path(os.environ["CUDA_HOME"], "bin/nvcc")] if os.environ.get("CUDA_HOME") else []
    places += [Path(path) for path in [shutil.which("nvcc")] if path]
    places += [USUAL, *_packaged()]
    return next((str(place) for place in places if os.access(place, os.X_OK)), None)


def _packaged() -> Iterator[Path]:
    """nvcc in the packages nvidia-cuda-nvcc (CUDA 13) and nvidia-cuda-nvcc-cu12, the newest first."""
    spec = find_spec("nvidia")
    for site in map(Path, spec.submodule_search_locations or [] if spec else []):
        yield from sorted(site.glob("cu*/bin/nvcc"), reverse=True)


def require() -> str:
    """As `find`. Raises NotCompiledError if there is none."""
    compiler = find()
    if compiler is None:
        raise NotCompiledError(
            "qcli was installed without compiled CUDA kernels, and there is no nvcc to compile them", problems.NVCC
        )
    return compiler


@cache
def version(compiler: str) -> str:
    """nvcc's version, such as 13.0.88. The answer is cached as long as the file of nvcc does not change."""
    stat = os.stat(os.path.realpath(compiler))
    key = _digest(os.path.realpath(compiler), str(stat.st_mtime_ns), str(stat.st_size))

    def ask() -> bytes:
        found = re.search(r"V(\d+\.\d+\.\d+)", _run([compiler, "--version"], "asked for its version").stdout)
        if not found:
            raise KernelError(f"{compiler} --version gives no version: it is not NVIDIA's nvcc", problems.NVCC)
        return found[1].encode()

    return _cached(f"nvcc-{key}.version", ask).decode()


def targets() -> list[str]:
    """The architectures that nvcc supports, such as sm_80. Raises KernelError."""
    return _run([require(), "--list-gpu-code"], "asked for its targets").stdout.split()


def build(source: str, constants: tuple[str, ...], target: list[str]) -> bytes:
    """Compiles a source. `target` are nvcc's options for the kind of image and the architecture. Raises KernelError."""
    path = _path(source)
    with tempfile.TemporaryDirectory(prefix="qcli-") as scratch:
        output = Path(scratch, "image")
        defined = [f"-D{constant}" for constant in constants]
        _run([require(), *target, *FLAGS, *defined, "-o", str(output), str(path)], f"compiling {path.name}")
        return output.read_bytes()


def _run(command: list[str], task: str) -> subprocess.CompletedProcess:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as e:
        raise KernelError(f"{command[0]} cannot run, {task}: {e.strerror}", problems.NVCC) from e
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        first = next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), (lines or ["no output"])[0])
        defined = [word[2:] for word in command if word.startswith("-D")]
        subject = f"{task} with {' '.join(defined)}" if defined else task
        raise KernelError(f"nvcc failed (exit {done.returncode}) {subject}: {first}", problems.compile_hint(first))
    return done


def _path(source: str) -> Path:
    return Path(__file__).with_name("probe.cu") if source == "probe" else folder() / f"{source}.cu"


def _texts(path: Path) -> list[str]:
    """The texts of the source and of the headers of ours that it includes, each once."""
    waiting, seen = [path], {}
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        try:
            seen[path] = path.read_text()
        except OSError as e:
            raise KernelError(f"{path} cannot be read: {e.strerror}", "install qcli again") from e
        beside = (path.parent / name for name in _INCLUDE.findall(seen[path]))
        waiting += (header.resolve() for header in beside if header.exists())
    return list(seen.values())


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _key(source: str, constants: tuple[str, ...], *more: str) -> str:
    return _digest(*_texts(_path(source)), "constants", *sorted(constants), "flags", *FLAGS, *more)


def _lines(source: str) -> list[dict[str, list[str]]]:
    """For each `// prebuilt:` line of a source: the values of each constant. An empty value means undefined."""
    lines = []
    for text in _PREBUILT.findall(_path(source).read_text()):
        lines.append({})
        for word in text.split():
            found = _CHOICE.fullmatch(word)
            if not found:
                raise KernelError(f"{source}.cu lists {word!r} for its prebuilt images, expected NAME={{VALUE,VALUE}}")
            lines[-1][found[1]] = found[2].split(",")
    return lines


def _listed(source: str, constants: tuple[str, ...]) -> tuple[str, ...] | None:
    """The constants of the prebuilt image that serves these constants; None if there is none."""
    wanted = dict(constant.split("=", 1) for constant in constants)
    for line in _lines(source):
        chosen = {name: wanted.get(name, "") for name in line}
        chosen = {name: value if value in line[name] else "" for name, value in chosen.items()}
        if wanted.keys() <= line.keys() and all(value in line[name] for name, value in chosen.items()):
            return tuple(f"{name}={value}" for name, value in chosen.items() if value)
    return None


def _prebuilt(source: str, constants: tuple[str, ...], capability: tuple[int, int]) -> bytes | None:
    """The package's image, if it was made from the present sources and for this GPU. Otherwise None."""
    listed = _listed(source, constants)
    for place in _folders() if listed is not None else []:
        file = place / prebuilt_name(source, listed)
        if file.exists() and _covers((place / ARCHITECTURES).read_text().split(), capability):
            return file.read_bytes()
    return None


def _folders() -> list[Path]:
    """The folders of prebuilt images. An editable install keeps compiled files outside the sources."""
    places = dict.fromkeys(Path(place).resolve() / "prebuilt" for place in qcli.runtime.__path__)
    return [place for place in places if (place / ARCHITECTURES).exists()]


def _covers(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU runs an image of these architectures. Machine code runs on its own generation from its minor version on; if its
    name ends in a letter, only on that very GPU. The image also has PTX of the last architecture, which runs on every later GPU."""
    numbers = [(int(name.rstrip("a")[:-1]), int(name.rstrip("a")[-1]), name.endswith("a")) for name in architectures]
    major, minor = capability
    code = any(of == major and (m == minor if only else m <= minor) for of, m, only in numbers)
    return code or capability >= numbers[-1][:2]


def cache_folder() -> Path:
    """The folder that keeps what nvcc made from one start to the next."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE]) / "cuda"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "qcli" / "cuda"


def _cached(name: str, make: Callable[[], bytes]) -> bytes:
    """The cached bytes of that name. They are made now if they are missing or damaged. A checksum precedes them in the file."""
    file = cache_folder() / name
    try:
        checksum, content = (kept := file.read_bytes())[:_CHECKSUM], kept[_CHECKSUM:]
        if hashlib.sha256(content).digest() == checksum:
            return content
    except OSError:
        pass
    content = make()
    _keep(file, hashlib.sha256(content).digest() + content)
    return content


def _keep(file: Path, content: bytes) -> None:
    """Writes a file so that other processes see all of it or nothing. If it cannot be written, only the next start takes longer."""
    scratch = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as scratch:
            scratch.write(content)
        os.replace(scratch.name, file)
    except OSError:
        if scratch is not None:
            Path(scratch.name).unlink(missing_ok=True)
