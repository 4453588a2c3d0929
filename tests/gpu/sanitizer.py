"""How compute-sanitizer is run over every kernel. Nothing is imported here, so that scripts may ask for it."""

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SECONDS = 180  # of a tool
# Torch's allocator would hide an access beyond a tensor inside its own larger block.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def command(tool: str, python: str) -> list[str]:
    """Ends with 1 where it finds something."""
    options = ["--tool", tool, "--print-limit", "20", "--error-exitcode", "1"]
    if tool == "memcheck":  # torch asks the driver for what it may not have, and takes no for an answer
        options += ["--report-api-errors", "no"]
    return ["compute-sanitizer", *options, python, "-m", "tests.gpu.every_kernel"]
