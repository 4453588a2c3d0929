"""One peer of benchmarks/peers.py, in an interpreter of its own, which needs torch, safetensors and that peer's packages.

    PYTHON benchmarks/peers_run.py PEER

Reads jobs from stdin, one JSON object a line, and answers each with a line on stdout: figures, or an error. What libraries print
ends on stderr. The first line of the answers has the versions. A job has `model`, a folder; `linears`, the names of the modules to
quantize; `arguments` of the row; `weights`, the file to write; `text`, `calibration` and `moments`, files as benchmarks/peers.py
writes them. The file to write gets what the quantized weights stand for, float32, by the names of the parameters.

Each job runs in a process of its own, forked after the imports. Seconds are those of quantizing, without reading the model and
without decoding; the peak of resident memory is that of the process until then. Bits are those of codes, scales and zero points as
stored; constant tables and padding that only a kernel wants do not count.
"""

import ctypes
import importlib
import json
import math
import multiprocessing.connection
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]  # by module


class Run:
    """A job and its figures."""

    def __init__(self, job: dict):
        self.model, self.linears, self.arguments = job["model"], job["linears"], job["arguments"]
        self.text, self.calibration, self.moments, self.output = (job[n] for n in ("text", "calibration", "moments", "weights"))
        self.figures: dict[str, float] = {}
        self.others: Weights = {}  # by parameter: what a method changed beside the linears

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What happens inside is quantizing."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.figures["seconds"] = round(time.perf_counter() - wall, 2)
        self.figures["cpu_seconds"] = round(time.process_time() - cpu, 2)
        self.figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def weights(self) -> Weights:
        """The weights as the checkpoint has them."""
        found = {}
        for path in sorted(Path(self.model).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(f"{name}.weight") for name in self.linears if f"{name}.weight" in file.keys()}
        return found

    def transformer(self, dtype: torch.dtype | str = "auto") -> torch.nn.Module:
        """The model in transformers' code."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype)

    def windows(self) -> list[list[int]]:
        """Token ids to calibrate on, all windows of one length."""
        return json.loads(Path(self.calibration).read_text())

    def spent(self, bits: float, weights: Weights) -> None:
        """Notes that these weights are stored in so many bits."""
        self.figures["bits_per_weight"] = bits / sum(w.numel() for w in weights.values())


def size(*tensors: torch.Tensor | None) -> int:
    """Bits of tensors."""
    return sum(8 * t.numel() * t.element_size() for t in tensors if t is not None)


def qcli(run: Run) -> Weights:
    """Arguments of qcli.quantize. The seconds include reading and writing files."""
    import qcli
    from qcli.nn.quantized_linear import QuantizedLinear
    from qcli.quantization.quantize import make_plan, run_plan

    folder = tempfile.mkdtemp(dir=Path(run.output).parent) + "/checkpoint"
    reads = run.arguments.get("calibrate") or run.arguments["method"] == "awq"
    texts = {"text": run.text, "tokens": sum(map(len, run.windows())), "check": False} if reads else {}
    plan = make_plan(run.model, folder, overwrite=True, **run.arguments, **texts)
    with run.timed():
        run_plan(plan, overwrite=True)
    model, found = qcli.load(folder, dtype="float32")[0], {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found[name] = module.dequantize(torch.float32)
    now = dict(model.named_parameters())
    for name, p in run.transformer(torch.float32).named_parameters():
        if name.removesuffix(".weight") not in found and not torch.equal(p, now[name]):
            run.others[name] = now[name].detach()
    stored = {work.linear.module: (work.method.scheme, work.info.dtype) for work in plan.quantized}
    run.spent(sum(8 * stored[name][0].stored_bytes(*w.shape, stored[name][1]) for name, w in found.items()), found)
    return found


def bitsandbytes(run: Run) -> Weights:
    """quant_type nf4 or fp4, with double quantization; or int8."""
    from bitsandbytes import functional

    kind, weights, kept, bits = run.arguments["kind"], run.weights(), {}, 0
    if kind == "int8":
        with run.timed():
            for name, w in weights.items():
                kept[name] = functional.int8_vectorwise_quant(w.half())[:2]
        run.spent(sum(size(*parts) for parts in kept.values()), weights)
        return {name: codes.float() * (scale[:, None] / 127) for name, (codes, scale) in kept.items()}
    double = run.arguments.get("double_quant", False)
    with run.timed():
        for name, w in weights.items():  # in rows that are whole blocks: with others its kernel for AVX-512 decodes wrongly
            kept[name] = functional.quantize_4bit(w.view(-1, 64), blocksize=64, quant_type=kind, compress_statistics=double)
    found = {}
    for name, (codes, state) in kept.items():
        bits += size(codes, state.absmax, *((state.state2.absmax, state.offset) if state.nested else ()))
        state.dtype = torch.float32
        found[name] = functional.dequantize_4bit(codes, state).view(weights[name].shape)
    run.spent(bits, weights)
    return found


def hqq(run: Run) -> Weights:
    """Arguments of BaseQuantizeConfig. Scales and zeros are bfloat16."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    kept, config, weights = {}, BaseQuantizeConfig(**run.arguments), run.weights()
    with run.timed():
        for name, w in weights.items():
            linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
            linear.weight.data = w
            kept[name] = HQQLinear(linear, config, compute_dtype=torch.bfloat16, device="cpu")
    found, bits = {}, 0
    for name, layer in kept.items():
        meta = layer.meta
        bits += meta["shape"].numel() * meta["nbits"] + size(meta["scale"], meta["zero"])
        meta |= {"scale": meta["scale"].float(), "zero": meta["zero"].float(), "compute_dtype": torch.float32}
        found[name] = Quantizer.dequantize(layer.W_q, meta)
    run.spent(bits, weights)
    return found


def torchao(run: Run) -> Weights:
    """A config of torchao.quantization; for integers in groups also `bits` and `group_size`."""
    from torchao import quantization

    settings, bits_of_code = {}, run.arguments.get("bits", 8)
    if "group_size" in run.arguments:
        settings["granularity"] = quantization.PerGroup(run.arguments["group_size"])
        settings["weight_dtype"] = getattr(torch, f"int{bits_of_code}")
    made, model = getattr(quantization, run.arguments["config"])(**settings), run.transformer(torch.bfloat16)
    wanted = set(run.linears)
    with run.timed():
        quantization.quantize_(model, made, filter_fn=lambda module, name: name in wanted)
    found, bits = {}, 0
    for name in run.linears:
        w = model.get_submodule(name).weight
        bits += w.numel() * bits_of_code + size(w.scale)
        scale = w.scale.float().repeat_interleave(w.shape[1] // w.scale.shape[1], 1)
        if (zero := getattr(w, "zero_point", None)) is not None and zero.any():
            raise NotImplementedError(f"{name} has zero points, expected symmetric codes")
        found[name] = w.qdata.float() * scale
    run.spent(bits, found)
    return found


def quanto(run: Run) -> Weights:
    """A qtype of optimum.quanto for the weights."""
    from optimum import quanto as library

    model, qtype = run.transformer(torch.bfloat16), getattr(library, run.arguments["weights"])
    with run.timed():
        library.quantize(model, weights=qtype, include=run.linears)
        library.freeze(model)
    found, bits = {}, 0
    for name in run.linears:
        w = model.get_submodule(name).weight
        bits += w.numel() * qtype.bits + size(w._scale_shift if hasattr(w, "_scale_shift") else w._scale)
        found[name] = w.dequantize().float()
    run.spent(bits, found)
    return found


def llmcompressor(run: Run) -> Weights:
    """`modifiers`: names and arguments of modifiers; `weights`: arguments of QuantizationArgs."""
    import datasets
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle import fake_quantize
    from llmcompressor import oneshot
    from llmcompressor.modifiers import gptq, quantization
    from llmcompressor.modifiers.transform import awq
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda *_: None  # AWQ pins memory, for which torch wants an accelerator
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**run.arguments["weights"]))
    recipe = []
    for name, settings in run.arguments["modifiers"].items():
        module = next(each for each in (awq, gptq, quantization) if hasattr(each, name))
        grouped = {} if name == "AWQModifier" else {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
        recipe.append(getattr(module, name)(**settings, **grouped))
    windows = run.windows()
    data = datasets.Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(ids) for ids in windows]})
    model = run.transformer("auto")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.removesuffix(".weight") not in run.linears}
    with run.timed():
        oneshot(model, dataset=data, recipe=recipe, num_calibration_samples=len(windows), max_seq_length=len(windows[0]))
    found, bits = {}, 0
    for name in run.linears:
        module = model.get_submodule(name)
        args, scale = module.quantization_scheme.weights, module.weight_scale
        zero = getattr(module, "weight_zero_point", None)
        found[name] = fake_quantize(module.weight.float(), scale.float(), zero, args, getattr(module, "weight_g_idx", None))
        bits += found[name].numel() * args.num_bits + size(scale) + (0 if args.symmetric else zero.numel() * args.num_bits)
    now = dict(model.named_parameters())
    run.others = {name: now[name].float() for name, p in before.items() if not torch.equal(p, now[name])}
    run.spent(bits, found)
    return found


def autoround(run: Run) -> Weights:
    """Arguments of AutoRound. It leaves the rounded weights in the model."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    windows, model = run.windows(), run.transformer("auto")
    model.config.name_or_path = model.name_or_path = run.model
    data = [torch.tensor([ids]) for ids in windows]
    rounds = AutoRound(
        model,
        AutoTokenizer.from_pretrained(run.model),
        dataset=data,
        nsamples=len(windows),
        seqlen=len(windows[0]),
        device_map="cpu",
        enable_torch_compile=False,
        **run.arguments,
    )
    with run.timed():
        model, _ = rounds.quantize()
    found, bits = {}, 0
    for name in run.linears:
        module = model.get_submodule(name)
        found[name] = module.weight.float()
        bits += module.weight.numel() * run.arguments["bits"] + 16 * module.scale.numel()
        bits += 0 if run.arguments["sym"] else run.arguments["bits"] * module.scale.numel()
    run.spent(bits, found)
    return found


GGML_TYPES = {"Q4_0": 2, "Q8_0": 8, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_XS": 23}  # of ggml.h


def llamacpp(run: Run) -> Weights:
    """`type` of ggml, and whether the mean squares of inputs weigh its errors (`imatrix`). Super-blocks have 256 weights:
    where rows are no multiple of 256, several rows are joined, while llama-quantize takes a larger type."""
    import xllamacpp

    library = ctypes.CDLL(next(str(p) for p in Path(xllamacpp.__file__).parent.glob("*.so")))
    library.ggml_row_size.restype = library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    library.ggml_blck_size.restype = ctypes.c_int64
    name, number = run.arguments["type"], GGML_TYPES[run.arguments["type"]]
    decode = getattr(library, f"dequantize_row_{name.lower() if name[-1] != 'K' else name[0].lower() + name[1:]}")
    decode.argtypes, decode.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    moments = load_file(run.moments) if run.arguments.get("imatrix") else {}
    weights, kept = {module: w.float().contiguous() for module, w in run.weights().items()}, {}
    library.ggml_quantize_init(number)
    with run.timed():
        for module, w in weights.items():
            columns = math.lcm(w.shape[1], library.ggml_blck_size(number))
            rows, importance = w.numel() // columns, None
            if moments:
                importance = moments[module].repeat(columns // w.shape[1]).contiguous()
            codes = torch.empty(rows * library.ggml_row_size(number, columns), dtype=torch.uint8)
            importance_at = None if importance is None else importance.data_ptr()
            library.ggml_quantize_chunk(number, w.data_ptr(), codes.data_ptr(), 0, rows, columns, importance_at)
            kept[module] = codes
    found = {}
    for module, codes in kept.items():
        found[module] = torch.empty_like(weights[module])
        decode(codes.data_ptr(), found[module].data_ptr(), found[module].numel())
    run.spent(size(*kept.values()), weights)
    return found


# What each imports before the first fork, the packages whose versions count, and what quantizes.
PEERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[Run], Weights]]] = {
    "qcli": (("qcli.quantization.quantize", "qcli.loading.load", "transformers"), ("qcli", "transformers"), qcli),
    "bitsandbytes": (("bitsandbytes",), ("bitsandbytes",), bitsandbytes),
    "hqq": (("hqq.core.quantize",), ("hqq",), hqq),
    "torchao": (("torchao.quantization", "transformers"), ("torchao", "transformers"), torchao),
    "quanto": (("optimum.quanto", "transformers"), ("optimum-quanto", "transformers"), quanto),
    "llm-compressor": (("llmcompressor", "transformers"), ("llmcompressor", "compressed-tensors", "transformers"), llmcompressor),
    "auto-round": (("auto_round", "transformers"), ("auto-round", "transformers"), autoround),
    "llama.cpp": (("xllamacpp",), ("xllamacpp",), llamacpp),
}


def carry_out(quantize: Callable[[Run], Weights], job: dict, answer: multiprocessing.connection.Connection) -> None:
    """One job, in a process of its own."""
    try:
        torch.manual_seed(0)
        run = Run(job)
        found = {f"{name}.weight": w.detach() for name, w in quantize(run).items()} | run.others
        save_file({name: w.float().contiguous() for name, w in found.items()}, job["weights"])
        answer.send(run.figures | {"linears": len(found) - len(run.others), "other_parameters": sorted(run.others)})
    except Exception as e:
        traceback.print_exc()
        answer.send({"error": f"{type(e).__name__}: {e}".splitlines()[0]})


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    modules, packages, quantize = PEERS[sys.argv[1]]
    for name in modules:
        importlib.import_module(name)
    versions = {}
    for package in ("torch", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            versions[package] = None
    print(json.dumps(versions), file=answers)
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        job = json.loads(line)
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=carry_out, args=(quantize, job, there))
        process.start()
        there.close()
        try:
            found = here.recv() if here.poll(job["timeout"]) else {"error": f"not done after {job['timeout']} seconds"}
        except EOFError:
            process.join()
            found = {"error": f"the process ended with {process.exitcode}"}
        process.kill()
        process.join()
        print(json.dumps(found), file=answers)


if __name__ == "__main__":
    main()
