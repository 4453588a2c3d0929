import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qcli.errors import KernelError
from qcli.runtime import nvcc
from tests.conftest import ROOT

REAL = nvcc.find()

# Answers as nvcc does, notes each call, and makes an "image" of its options and of the source.
FAKE = """#!/bin/sh
echo "$@" >> "{folder}/calls"
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0;;
  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\nsm_100\\n'; exit 0;;
esac
if [ -e "{folder}/fails" ]; then cat "{folder}/fails" >&2; exit 2; fi
for last; do :; done
while [ "$1" != -o ]; do options="$options $1"; shift; done
(echo "$options"; cat "$last") > "$2"
"""
HEADER, SOURCE = "constexpr int ONE = 1;\n", '#include "own.cuh"\n#include <cuda_fp16.h>\nKERNEL void some() {}\n'
LINE = "// prebuilt: DTYPE={float,__half} BLOCK_SIZE={64,}\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of its own for sources, cache, package and a fake nvcc, the only one there is."""
    for name in ("sources", "package/runtime", "bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "sources/some.cu").write_text(SOURCE)
    (tmp_path / "sources/own.cuh").write_text(HEADER)
    compiler = tmp_path / "bin/nvcc"
    compiler.write_text(FAKE.format(folder=tmp_path))
    compiler.chmod(0o755)
    monkeypatch.setattr(nvcc, "folder", lambda: tmp_path / "sources")
    monkeypatch.setattr(nvcc, "_packaged", lambda: [])
    monkeypatch.setattr(nvcc.qcli.runtime, "__path__", [str(tmp_path / "package/runtime")])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("NVCC_PREPEND_FLAGS", raising=False)
    monkeypatch.delenv("NVCC_APPEND_FLAGS", raising=False)
    monkeypatch.setenv("QCLI_CACHE", str(tmp_path / "cache"))
    nvcc.version.cache_clear()
    yield tmp_path
    nvcc.version.cache_clear()


def calls(place: Path) -> list[str]:
    """What the fake nvcc was called with since the last look."""
    file = place / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def some(constants=("DTYPE=float", "BLOCK_SIZE=64"), capability=(8, 6)) -> bytes:
    """The image, as a process that has just started gets it."""
    nvcc.version.cache_clear()
    return nvcc.image("some", constants, capability)


def test_what_nvcc_is_asked_for(place):
    image = some()
    version, build = calls(place)
    assert version == "--version"
    assert build.startswith("-cubin -arch=sm_86 -std=c++17 -O3 -DDTYPE=float -DBLOCK_SIZE=64 -o ")
    assert build.endswith("/sources/some.cu") and image.endswith(SOURCE.encode())
    assert b"-arch=sm_90a" in some(capability=(9, 0)) and b"-arch=sm_120 " in some(capability=(12, 0))


def test_a_second_start_never_calls_nvcc(place):
    first = some()
    assert len(calls(place)) == 2
    assert some() == first and some(("BLOCK_SIZE=64", "DTYPE=float")) == first
    assert calls(place) == []


def test_whatever_changes_the_image_changes_its_place_in_the_cache(place, monkeypatch):
    some()
    calls(place)
    some(("DTYPE=__half", "BLOCK_SIZE=64"))
    some(("DTYPE=float",))
    some(capability=(8, 9))
    (place / "sources/own.cuh").write_text(HEADER + "// changed")
    some()
    (place / "sources/some.cu").write_text(SOURCE + "// changed")
    some()
    monkeypatch.setattr(nvcc, "FLAGS", ("-O1",))
    some()
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    some()
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", "-lineinfo")
    some()
    assert len(calls(place)) == 8


def test_another_nvcc_is_asked_for_its_version_and_compiles_anew(place):
    some()
    calls(place)
    compiler = place / "bin/nvcc"
    os.utime(compiler, ns=(1, 1))
    some()
    assert calls(place) == ["--version"]  # the same version: its images serve
    compiler.write_text(compiler.read_text().replace("13.0.88", "13.1.1"))
    os.utime(compiler, ns=(2, 2))
    some()
    version, build = calls(place)
    assert version == "--version" and build.startswith("-cubin")


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 500])
def test_a_damaged_entry_is_built_again(place, damage):
    image = some()
    for file in (place / "cache/cuda").iterdir():
        file.write_bytes(damage)
    calls(place)
    assert some() == image and len(calls(place)) == 2
    assert some() == image and calls(place) == []


def test_entries_appear_whole_and_nothing_else_stays(place, monkeypatch):
    some()
    names = sorted(file.name for file in (place / "cache/cuda").iterdir())
    assert [name.split("-")[0] for name in names] == ["nvcc", "some"]

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nvcc.os, "replace", full)
    assert some(("DTYPE=__half",)) and sorted(file.name for file in (place / "cache/cuda").iterdir()) == names


def test_a_cache_that_cannot_be_written(place, monkeypatch):
    (place / "file").write_text("no folder")
    monkeypatch.setenv("QCLI_CACHE", str(place / "file"))
    assert some() == some() and len(calls(place)) == 4


def test_where_the_cache_is(place, monkeypatch):
    assert nvcc.cache_folder() == place / "cache/cuda"
    monkeypatch.delenv("QCLI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert nvcc.cache_folder() == Path("/xdg/qcli/cuda")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert nvcc.cache_folder() == Path("/home/me/.cache/qcli/cuda")


def test_a_failed_compile_is_a_sentence(place):
    (place / "fails").write_text('In file included from some.cu:1:\nsome.cu(3): error: "x" is undefined\n\n1 error detected\n')
    with pytest.raises(KernelError) as e:
        some()
    assert e.value.message == (
        'nvcc failed (exit 2) compiling some.cu with DTYPE=float BLOCK_SIZE=64: some.cu(3): error: "x" is undefined'
    )
    assert e.value.hint is None
    (place / "fails").unlink()
    assert some()  # nothing of the failure is kept


@pytest.mark.parametrize(
    "output, cure",
    [
        ("nvcc fatal   : Unsupported gpu architecture 'sm_120'", "a version of NVIDIA's CUDA toolkit that supports this GPU"),
        ("gcc: No such file or directory\nnvcc fatal   : Failed to preprocess host compiler properties.", "apt install g++"),
        ("host_config.h:164:2: error: #error -- unsupported GNU version! gcc versions later", "-ccbin g++-12"),
        ("probe.cu:3:10: fatal error: cuda_bf16.h: No such file or directory", "lacks its headers"),
    ],
)
def test_what_a_toolkit_lacks_is_named_with_its_cure(output, cure, place):
    (place / "fails").write_text(output + "\n")
    with pytest.raises(KernelError) as e:
        some()
    assert output.splitlines()[-1] in e.value.message and cure in e.value.hint


def test_an_nvcc_that_cannot_run(place):
    (place / "bin/nvcc").write_text("#!/nowhere/sh\n")
    with pytest.raises(KernelError, match="bin/nvcc cannot run, asked for its version: No such file or directory"):
        some()
    (place / "bin/nvcc").write_text("#!/bin/sh\necho hello\n")
    with pytest.raises(KernelError, match="--version gives no version") as e:
        some()
    assert "CUDA toolkit" in e.value.hint


def test_no_nvcc(place, monkeypatch):
    os.remove(place / "bin/nvcc")
    monkeypatch.setenv("PATH", str(place))
    monkeypatch.setattr(nvcc, "USUAL", place / "none")
    with pytest.raises(KernelError, match="there is no nvcc to compile them") as e:
        some()
    assert "put the folder of its nvcc on PATH" in e.value.hint


def test_where_nvcc_is_looked_for(place, monkeypatch):
    def compiler(folder: str) -> str:
        (place / folder).mkdir(exist_ok=True, parents=True)
        shutil.copy(place / "bin/nvcc", place / folder / "nvcc")
        return str(place / folder / "nvcc")

    packaged, usual, on_path = compiler("packaged"), compiler("usual"), compiler("path")
    monkeypatch.setattr(nvcc, "_packaged", lambda: [Path(packaged)])
    monkeypatch.setattr(nvcc, "USUAL", Path(usual))
    monkeypatch.setenv("PATH", f"{place}/path{os.pathsep}/usr/bin")
    assert nvcc.find() == str(place / "bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(place / "elsewhere"))
    assert nvcc.find() == on_path
    os.remove(on_path)
    assert nvcc.find() == usual
    os.remove(usual)
    assert nvcc.find() == packaged


def test_nvcc_of_pypis_packages(tmp_path, monkeypatch):
    for folder in ("cu12/bin", "cu13/bin"):
        (tmp_path / "nvidia" / folder).mkdir(parents=True)
        (tmp_path / "nvidia" / folder / "nvcc").touch(mode=stat.S_IRWXU)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    found = list(nvcc._packaged())
    assert found[0] == tmp_path / "nvidia/cu13/bin/nvcc" and tmp_path / "nvidia/cu12/bin/nvcc" in found


def prebuild(place: Path) -> str:
    """Runs kernels/prebuild.py on the folder's sources; returns what it says."""
    code = (
        "import sys; from pathlib import Path; from qcli.runtime import nvcc; import runpy\n"
        "nvcc.folder = lambda: Path(sys.argv[2])\n"
        f"runpy.run_path({str(ROOT / 'kernels/prebuild.py')!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(place / "package/runtime/prebuilt"), str(place / "sources")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_a_source_lists_its_images(place):
    (place / "sources/some.cu").write_text(LINE + "// prebuilt: NESTED={1}\n" + SOURCE)
    assert nvcc.sources() == ["probe", "some"] and nvcc.instances("probe") == [()]
    assert nvcc.instances("some") == [
        ("DTYPE=float", "BLOCK_SIZE=64"),
        ("DTYPE=float",),
        ("DTYPE=__half", "BLOCK_SIZE=64"),
        ("DTYPE=__half",),
        ("NESTED=1",),
    ]
    (place / "sources/some.cu").write_text("// prebuilt: DTYPE=float\n" + SOURCE)
    with pytest.raises(KernelError, match="some.cu lists 'DTYPE=float' for its prebuilt images, expected NAME={VALUE,VALUE}"):
        nvcc.instances("some")


def test_every_kernel_lists_its_images():
    assert nvcc.folder() == ROOT / "kernels/cuda" and len(nvcc.sources()) > 1
    assert [source for source in nvcc.sources() if not nvcc.instances(source)] == []


def test_prebuilt_images_serve_without_nvcc(place, monkeypatch):
    (place / "sources/some.cu").write_text(LINE + SOURCE)
    assert not nvcc.complete((8, 6))
    assert prebuild(place) == "5 images of CUDA kernels, 5 of them new, 0.0 MB, for 75, 80, 90a, 100\n"
    os.remove(place / "bin/nvcc")
    monkeypatch.setattr(nvcc, "find", lambda: None)
    assert nvcc.complete((8, 6))
    exact = some()
    assert b"-gencode=arch=compute_90a,code=sm_90a" in exact and b"-DBLOCK_SIZE=64" in exact
    assert b"-gencode=arch=compute_100,code=compute_100" in exact and b"-arch=" not in exact
    any_size = some(("DTYPE=float", "BLOCK_SIZE=4096"))
    assert b"-DBLOCK_SIZE" not in any_size and any_size == some(("DTYPE=float",))
    for constants in (("DTYPE=double", "BLOCK_SIZE=64"), ("DTYPE=float", "OTHER=1"), ("BLOCK_SIZE=64",)):
        with pytest.raises(KernelError, match="no nvcc"):
            some(constants)


def test_prebuilt_images_of_other_sources_or_gpus_do_not_serve(place):
    (place / "sources/some.cu").write_text(LINE + SOURCE)
    prebuild(place)
    calls(place)
    assert b"-cubin" not in some() and calls(place) == []
    assert b"-cubin" in some(capability=(7, 0))
    (place / "sources/own.cuh").write_text(HEADER + "// changed")
    assert b"-cubin" in some() and not nvcc.complete((8, 6))
    assert "5 images of CUDA kernels, 4 of them new" in prebuild(place)  # the probe does not include that header
    assert b"-cubin" not in some() and nvcc.complete((8, 6))
    assert len(list((place / "package/runtime/prebuilt").iterdir())) == 6  # stale ones are gone
    with_one_more = (place / "bin/nvcc").read_text().replace("sm_100", "sm_100\\nsm_120")
    (place / "bin/nvcc").write_text(with_one_more)
    assert "5 of them new, 0.0 MB, for 75, 80, 90a, 100, 120" in prebuild(place)


def test_a_source_without_a_list_is_compiled_where_it_is_used(place):
    prebuild(place)
    assert not nvcc.complete((8, 6)) and b"-cubin" in some()


@pytest.mark.parametrize(
    "capability, covered",
    [
        ((7, 5), True),
        ((7, 0), False),
        ((8, 0), True),
        ((8, 7), True),
        ((9, 0), True),
        ((10, 3), True),
        ((11, 0), True),
        ((12, 0), True),
        ((12, 1), True),
    ],
)
def test_which_gpus_prebuilt_images_cover(capability, covered):
    assert nvcc._covers("75 80 86 89 90a 100".split(), capability) is covered


def test_ptx_serves_only_what_comes_after_it():
    assert not nvcc._covers("75 80 120".split(), (9, 0)) and not nvcc._covers("75 80 120".split(), (11, 0))
    assert nvcc._covers("75 80 90a".split(), (10, 0)) and nvcc._covers("90a".split(), (9, 0))


@pytest.mark.skipif(REAL is None, reason="nvcc is not here")
def test_the_real_nvcc(place, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(Path(REAL).parents[1]))
    (place / "sources/some.cu").write_text(
        '#include "own.cuh"\n#include <cuda_fp16.h>\n'
        'extern "C" __global__ void some(DTYPE* out) { out[threadIdx.x] = DTYPE(BLOCK_SIZE + ONE); }\n'
    )
    for capability in ((8, 0), (9, 0)):
        image = some(("DTYPE=__half", "BLOCK_SIZE=64"), capability)
        assert image[:4] == b"\x7fELF" and b"some" in image
    with pytest.raises(KernelError, match=r"compiling some.cu with DTYPE=strange BLOCK_SIZE=1: \S*some.cu\(3\): error: "):
        some(("DTYPE=strange", "BLOCK_SIZE=1"))
    with pytest.raises(KernelError, match="compiling some.cu with DTYPE=float BLOCK_SIZE=1: nvcc fatal .*sm_10'") as e:
        some(("DTYPE=float", "BLOCK_SIZE=1"), (1, 0))
    assert "that supports this GPU" in e.value.hint
