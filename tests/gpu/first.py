"""The first products on a GPU: a layer of a 7B model in 4 and in 8 bits, for few tokens and for many.

python -m tests.gpu.first             compares them with the references; ends with 1 at the first wrong result
python -m tests.gpu.first --launch    only launches them, for a profiler
"""

import sys
from collections.abc import Iterator

import torch

from qcli.runtime import cuda
from tests.gpu.checks import kernel, noting, wrong_in_rows
from tests.gpu.inputs import LAYERS, layer_4bit, layer_8bit

FEW, MANY = (1, 8), (32, 100)


def products(device: torch.device, shape: tuple[int, int], every_tokens: tuple[int, ...]) -> Iterator[tuple[str, int, dict]]:
    """(op, tokens, arguments)."""
    for tokens in every_tokens:
        yield "linear_4bit", tokens, layer_4bit(tokens, *shape, torch.bfloat16, bias=torch.bfloat16, device=device)
        yield "linear_int8", tokens, layer_8bit(tokens, *shape, torch.bfloat16, outliers=6, device=device)


def check(device: torch.device, shape: tuple[int, int] = LAYERS["llama-7b-up"]) -> str | None:
    """The first problem, or None. Prints what has run."""
    rows = torch.linspace(0, shape[0] - 1, 64).long()
    for name, tokens, arguments in products(device, shape, FEW + MANY):
        with noting() as launched:
            problem = wrong_in_rows(name, arguments, rows)
        kernels = ", ".join(sorted(launched)) or "no kernel"
        print(f"{name}, {tokens} tokens, {shape[0]}x{shape[1]} ({kernels}): {problem or 'agrees'}", flush=True)
        if problem or tokens in FEW and not launched:
            return problem or f"{name} launched no kernel"
    return None


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA GPU")
    device = torch.device("cuda", 0)
    if problem := cuda.problem(device):
        sys.exit(f"{problem.message}; {problem.hint}")
    torch.manual_seed(0)
    if sys.argv[1:] == ["--launch"]:
        for name, _, arguments in products(device, LAYERS["llama-7b-up"], FEW):
            kernel(name, arguments)
        torch.cuda.synchronize()
    elif problem := check(device):
        sys.exit(problem)


if __name__ == "__main__":
    main()
