"""What the GPU tests and the GPU benchmark will ask nvcc for, looked at without a GPU: every image is compiled beforehand, and
with a value for every constant that its source wants."""

import re
from importlib import import_module
from unittest import mock

import pytest
import torch

from qcli.ops import linear_int8
from qcli.runtime import cuda, nvcc
from tests.emulator.emulator import SHARED
from tests.gpu.checks import KERNELS, kernel
from tests.gpu.images import MORE, Asking, wanted
from tests.gpu.inputs import hostile

_TEXT = re.compile(r'//.*|/\*.*?\*/|"[^"\n]*"')
_NAME = re.compile(r"\b[A-Z][A-Z0-9_]{2,}\b")
_DEFINED = re.compile(r"#\s*define\s+(\w+)|\b([A-Z][A-Z0-9_]+)\s*=(?!=)|template\s*<\s*\w+\s+([A-Z][A-Z0-9_]+)")
_OF_THE_COMPILER = {"INFINITY", "NAN", "QCLI_EMULATOR"}


def constants_of(text: str) -> set[str]:
    """The names in capitals that a source uses and does not define: whoever compiles it has to."""
    text = _TEXT.sub("", text)
    defined = {name for found in _DEFINED.findall(text) for name in found}
    return set(_NAME.findall(text)) - defined - _OF_THE_COMPILER


def text_of(source: str) -> str:
    """kernels/cuda/SOURCE.cu and its headers."""
    return "\n".join(nvcc._texts(nvcc._path(source)))


def problem(source: str, constants: tuple[str, ...]) -> str | None:
    """What is wrong with an image's constants."""
    given, text = {constant.split("=")[0] for constant in constants}, text_of(source)
    if missing := constants_of(text) - given:
        return f"{source} {constants}: {', '.join(sorted(missing))} undefined"
    unknown = given - set(_NAME.findall(text))
    return f"{source} {constants}: no {', '.join(sorted(unknown))} in it" if unknown else None


def asked_for(name: str, capability: tuple[int, int]) -> set[tuple[str, tuple[str, ...]]]:
    """The images that an op's own cases and hostile inputs want on such a GPU, on both products of LLM.int8()."""
    backend = Asking(capability, SHARED[capability])
    fits = lambda x, columns: x.dtype != torch.float32 and columns % 16 == 0  # noqa: E731
    with cuda.using(backend):
        for _, arguments in (*import_module(f"qcli.ops.{name}").cases(), *hostile(name)):
            kernel(name, arguments)
            with mock.patch.object(linear_int8, "_fuses", fits):
                kernel(name, arguments)
    return {(source, constants) for source, _, constants in backend.asked}


def test_what_a_source_needs_is_seen():
    assert constants_of(text_of("linear_int8_gemm")) == {"DTYPE", "STAGES"}
    assert constants_of(text_of("linear_4bit_batch")) == {"DTYPE", "CHUNK", "SCALES", "TOKENS", "STAGES"}
    assert constants_of(text_of("quantize_absmax")) == set()
    text = '#if NESTED\nint a = OTHER; constexpr int HERE = 1, THERE = HERE;\n#endif\nasm("ld.THAT"); // BEHIND\n#define WITH(x)'
    assert constants_of(text) == {"NESTED", "OTHER"}
    assert "STAGES undefined" in problem("linear_int8_gemm", ("DTYPE=__half", "BIAS=float"))
    assert "no STAGE in it" in problem("linear_int8_gemm", ("DTYPE=__half", "STAGES=3", "STAGE=3"))


def test_every_image_has_its_constants():
    every = wanted(MORE)
    assert {source for source, _ in every} == set(nvcc.sources()) and len(every) > 150
    assert [found for one in every if (found := problem(*one))] == []


@pytest.mark.parametrize("capability", SHARED)
def test_every_image_that_the_tests_ask_for_is_compiled_beforehand(capability):
    torch.manual_seed(0)
    asked = set().union(*(asked_for(name, capability) for name in KERNELS))
    assert {source for source, _ in asked} >= {"linear_4bit", "linear_int8", "quantize_4bit", "activation_stats"}
    assert [found for one in asked if (found := problem(*one))] == []
    assert not {(s, tuple(sorted(c))) for s, c in asked} - {(s, tuple(sorted(c))) for s, c in wanted(MORE)}


@pytest.mark.slow
@pytest.mark.skipif(nvcc.find() is None, reason="needs nvcc")
@pytest.mark.parametrize("source", MORE)
def test_every_image_of_the_tests_compiles(source):
    """Minutes. Those that a package carries are compiled by tests/emulator/test_sass.py."""
    for constants in MORE[source]:
        assert nvcc.build(source, constants, ["-ptx", "-arch=compute_90a"]), constants
