"""How compute-sanitizer is run on every kernel. This module imports nothing, so scripts can use it."""

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SECONDS = 180  # time limit of a tool
# torch's allocator would hide an access beyond a tensor inside its own larger block.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def command(tool: str, python: str) -> list[str]:
    """The command. It ends with 1 if the tool finds something."""
    options = ["--tool", tool, "--print-limit", "20", "--error-exitcode", "1"]
    if tool == "memcheck":  # torch makes driver calls that may fail, and handles the failure
        options += ["--report-api-errors", "no"]
    return ["compute-sanitizer", *options, python, "-m", "tests.gpu.every_kernel"]
