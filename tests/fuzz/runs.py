"""Runs a verb on a damaged folder, in this process. It must end with an exit code and a message, within limits of time and memory.

If `quantize` succeeds, its output is decoded here, with separate tables, and compared with the intact model.
"""

import contextlib
import io
import json
import os
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qcli import cli

SECONDS = 60  # the limit for a verb on a model of some ten tensors
NF4 = np.array(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
)  # QLoRA, appendix E, to four places


@dataclass
class Outcome:
    """How a run ended. `fault` says what was wrong with it, or is None."""

    code: int | None
    stdout: str
    stderr: str
    fault: str | None


class TooSlow(BaseException):
    """A run did not end in time."""


def run(arguments: list[str]) -> Outcome:
    """Runs `qcli ARGUMENTS`. A traceback, a wrong exit code, an error without a message, and a run without an end are faults."""
    out, err = io.StringIO(), io.StringIO()
    code, fault = None, None

    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    showed, argv = warnings.showwarning, sys.argv
    warnings.showwarning, sys.argv = cli._warn, ["qcli", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            cli.app(args=arguments, prog_name="qcli")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except TooSlow:
        fault = f"no end after {SECONDS} s:\n{traceback.format_exc()}"
    except BaseException:
        fault = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        warnings.showwarning, sys.argv = showed, argv
    said = err.getvalue()
    if fault is None and (code not in (0, 1, 2, 3) or (code in (1, 2) and "rror" not in said)):
        fault = f"exit code {code} with the words {said[-300:]!r}"
    if fault is None and "Traceback" in said:
        fault = f"a traceback among the words: {said[-800:]}"
    return Outcome(code, out.getvalue(), said, fault)


def wrong_bytes(output: Path, intact: Path) -> str | None:
    """The part of a quantized `output` that does not decode to the weights of the `intact` model. None if all weights do.

    A tensor that the damage removed or replaced is not a fault of the output. The caller therefore passes as `intact` only the
    names whose values the damage did not change.
    """
    original = {}
    for path in sorted(intact.glob("*.safetensors")):
        original |= load_file(path)
    written = {}
    for path in sorted(output.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            written |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    for name, weight in original.items():
        if name not in written:
            continue
        stored = written[name]
        # GPT-2 stores [in, out]. The model's modules transpose it, the rules by name and shape do not.
        ways = [weight, weight.t().contiguous()] if weight.dim() == 2 and "c_" in name else [weight]
        if stored.dtype == torch.uint8 and f"{name}.absmax" in written:
            fault = min((_wrong_4bit(written, name, way) for way in ways), key=bool)
        elif stored.dtype == torch.int8:
            fault = min((_wrong_int8(written, name, way) for way in ways), key=bool)
        elif stored.dtype == torch.float8_e4m3fn:
            values, wide = stored.float() * written[f"{name}_scale"].float(), weight.float()
            near = (values - wide).abs() <= 0.07 * wide.abs() + wide.abs().amax(-1, keepdim=True) / 448 / 64
            fault = None if near.all() or not torch.isfinite(wide).all() else "is not the original's in float8"
        elif weight.is_floating_point():
            same = torch.equal(stored, weight.to(stored.dtype)) or not torch.isfinite(weight.float()).all()
            fault = None if same else "is not the original's"
        else:
            fault = None
        if fault:
            return f"{name} {fault}"
    return None


def _wrong_int8(written: dict, name: str, weight: torch.Tensor) -> str | None:
    stored, absmax = written[name], written[f"{name.removesuffix('weight')}SCB"]
    if stored.shape not in (weight.shape, (weight.numel(), 1)) or absmax.shape != weight.shape[:1]:
        return "has another shape"
    stored, scale = stored.view(weight.shape), absmax.double()[:, None] / 127
    return _beyond((stored.double() * scale - weight.double()).abs(), 0.51 * scale.expand_as(stored))


def _wrong_4bit(written: dict, name: str, weight: torch.Tensor) -> str | None:
    packed = written[name].reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: weight.numel()].long()
    table = written[f"{name}.quant_map"].double()
    state = next(n for n in written if n.startswith(f"{name}.quant_state."))
    state = json.loads(bytes(written[state].tolist()))
    if state["quant_type"] == "nf4" and np.abs(table.numpy() - NF4).max() > 1e-4:
        return "is not decoded by the table of NF4"
    absmax = written[f"{name}.absmax"]
    if absmax.dtype == torch.uint8:
        nested = written[f"{name}.nested_absmax"].double().repeat_interleave(256)[: len(absmax)]
        absmax = written[f"{name}.nested_quant_map"].double()[absmax.long()] * nested + state["nested_offset"]
    spread = absmax.double().repeat_interleave(state["blocksize"])[: weight.numel()]
    # Half of the widest gap of a table (FP4's, 1/6), plus the error of an 8-bit absmax.
    return _beyond((table[codes] * spread - weight.double().reshape(-1)).abs(), 0.2 * spread + 1e-3)


def _beyond(error: torch.Tensor, bound: torch.Tensor) -> str | None:
    return f"is off by up to {error.max().item():.3g}" if (error > bound).any() else None


def limit_memory(more: int) -> None:
    """Limits this process to `more` bytes beyond its present memory. A damaged, huge size then cannot fill the machine."""
    import resource

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.RLIM_INFINITY))
