"""Compiles every image of the CUDA kernels that a package contains: machine code for each GPU generation that this nvcc supports,
and PTX of the newest one for later GPUs. `python prebuild.py FOLDER` fills a folder. Images that are already there are kept.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from qcli.errors import KernelError  # noqa: E402
from qcli.runtime import nvcc  # noqa: E402

WANTED = ("75", "80", "86", "89", "90a", "100", "120")


def architectures() -> list[str]:
    """The architectures of WANTED that this nvcc supports."""
    known = nvcc.targets()
    return [name for name in WANTED if f"sm_{name.rstrip('a')}" in known]


def options(names: list[str]) -> list[str]:
    """nvcc's options for one file with machine code for each architecture and PTX of the last."""
    newest = names[-1].rstrip("a")
    code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return ["-fatbin", *code, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def main(folder: Path) -> None:
    """Raises KernelError."""
    names = architectures()
    listing = folder / nvcc.ARCHITECTURES
    kept = listing.exists() and listing.read_text().split() == names
    images = {nvcc.prebuilt_name(source, c): (source, c) for source in nvcc.sources() for c in nvcc.instances(source)}
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if not kept or file.name not in images and file != listing:
            file.unlink()
    missing = [name for name in images if not (folder / name).exists()]

    def build(name: str) -> None:
        source, constants = images[name]
        image = nvcc.build(source, constants, options(names))
        scratch = folder / f"{name}.partial"
        scratch.write_bytes(image)
        scratch.rename(folder / name)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, missing))
    listing.write_text(" ".join(names) + "\n")
    total = sum((folder / name).stat().st_size for name in images)
    print(f"{len(images)} images of CUDA kernels, {len(missing)} of them new, {total / 1e6:.1f} MB, for {', '.join(names)}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except KernelError as e:
        sys.exit(f"error: {e}{f'; {e.hint}' if e.hint else ''}")
