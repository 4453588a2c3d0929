"""What vLLM's CPU build makes of the checkpoints that qcli writes.

    python benchmarks/vllm_formats.py --vllm PYTHON [--only WORDS]

PYTHON is the interpreter of an environment with vLLM; `make test-vllm` makes one. Three models are quantized into the formats
that vLLM reads: the demo model, and random ones of llama's and qwen3's shape with heads of 64. vLLM generates greedily after four
prompts of token ids, in the checkpoint's dtype, which is bfloat16 unless the name says otherwise. The reference is transformers in
float32 on the weights that qcli decodes from the same folder. It reads the text that vLLM wrote. `d` is the largest difference of a
token's log-probability. A token is a first choice if the reference finds none more likely. The floor is the d of the unquantized
model.

`rolled` is d where the reference has each quantized weight a column further, as a wrong reader might. Ends with 1 where a
checkpoint that should load does not, where d is larger than the floor times a factor or `rolled` is not, and where one that
is known to be refused loads or fails otherwise. Writes benchmarks/results/vllm-cpu.json unless --only was given, and vLLM's output
to build/vllm.log. It takes seven minutes on two cores.

What depends on AMX, a part of newer Intel CPUs: vLLM then rounds activations to 8 bits under 4-bit weights, unless
VLLM_CPU_INT4_W4A8 is 0. FP8, and rows without groups, have other kernels there, and are shown without a verdict.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import qcli  # noqa: E402
from benchmarks.measure import machine  # noqa: E402
from qcli import console  # noqa: E402
from qcli.nn.quantized_linear import QuantizedLinear  # noqa: E402
from qcli.recipe import Recipe, recipe_of  # noqa: E402

RESULT = ROOT / "benchmarks/results/vllm-cpu.json"
NEW_TOKENS = 32
PROMPTS = [[0, 312, 411], list(range(40, 49)), list(range(100, 151, 3)), list(range(3, 500, 12))]
SECONDS = 180  # for a checkpoint
UNQUANTIZED = "unquantized"
# Rounding activations to 8 bits changes the demo model's own text, in qcli as in vLLM: int8 is tried on the random models alone.
RANDOM = ("llama", "qwen3")
EVERY = ("demo", *RANDOM)
W4A16 = {"VLLM_CPU_INT4_W4A8": "0"}
# How many times the floor d may be, by what vLLM rounds activations to: nothing, int8, E4M3 with its three bits of mantissa.
KEPT, INT8, E4M3 = 4, 8, 16


@dataclass(frozen=True)
class Case:
    """A checkpoint: the options of qcli.quantize, and what vLLM should make of it.

    models: which have it. factor: how many times the floor d may be. refused: words of the error with which vLLM refuses it.
    four_bits: whether the CPU's kernel of 4-bit integers runs it, which rounds activations with AMX. other_with_amx: whether
    another kernel serves it there.
    """

    options: dict
    models: tuple[str, ...] = ("llama",)
    factor: int = KEPT
    refused: str | None = None
    four_bits: bool = False
    other_with_amx: bool = False


def rtn(group_size: int, models: tuple[str, ...] = ("llama",), **options) -> Case:
    """rtn of 4 bits."""
    four_bits = group_size > 0
    settings = {"method": "rtn", "group_size": group_size} | options
    return Case(settings, models, four_bits=four_bits, other_with_amx=not four_bits)


def hqq(models: tuple[str, ...] = ("llama",), **options) -> Case:
    """hqq of 4 bits in groups of 64."""
    return Case({"method": "hqq"} | options, models, four_bits=True)


def beside_rtn(**of_down_proj) -> dict[str, Recipe]:
    """rtn in groups of 128, and another method for one kind of module."""
    default = {"method": "rtn", "options": {"group_size": 128}}
    return {"recipe": recipe_of({"default": default, "rules": [["*.down_proj", of_down_proj]]}, "a recipe")}


def fp8(refused: str | None = None, **settings) -> Case:
    """fp8."""
    return Case({"method": "fp8", "settings": settings}, factor=E4M3, refused=refused, other_with_amx=True)


ZERO = {"settings": {"zero_point": True}}
LEFT = {"skip": ["model.layers.1"]}
NO_KERNEL = "Failed to find a kernel that can implement the"
CASES = {
    "nf4": Case({"method": "nf4"}, EVERY),
    "nf4-plain": Case({"method": "nf4-plain"}),
    "fp4": Case({"method": "fp4"}),
    "nf4, a layer left alone": Case({"method": "nf4"} | LEFT),
    "llm-int8": Case({"method": "llm-int8"}, EVERY, INT8),
    "rtn, groups of 128": rtn(128, EVERY),
    "rtn, groups of 64": rtn(64, EVERY),
    "rtn, groups of 32": rtn(32, EVERY),
    "rtn, groups of 64, search mse": rtn(64, search="mse"),
    "rtn, groups of 64, a layer left alone": rtn(64, **LEFT),
    "rtn, groups of 64, float16": rtn(64, dtype="float16"),
    "rtn, rows": rtn(-1),
    "rtn, groups of 128, zero points": rtn(128, **ZERO),
    "rtn, groups of 32, zero points": rtn(32, EVERY, **ZERO),
    "hqq": hqq(EVERY),
    "rtn, 8 bits, groups of 64": Case({"method": "rtn", "bits": 8, "group_size": 64}, refused="(uint8b128) not supported"),
    "rtn, 8 bits, rows": Case({"method": "rtn", "bits": 8, "group_size": -1}, refused="(uint8b128) not supported"),
    "rtn, 3 bits, groups of 64": Case({"method": "rtn", "bits": 3, "group_size": 64}, refused="(uint3b4) not supported"),
    "int8": Case({"method": "int8"}, RANDOM, INT8),
    "fp8": fp8(),
    "fp8, one scale": fp8("static_scaled_fp8_quant() expected at most 0 argument(s)", share="tensor"),
    "fp8, blocks": fp8("requires AMX tile support", share="block"),
    "fp8, weights alone": fp8(f"{NO_KERNEL} ScaledMM", activations=False),
    "mxfp4": Case({"method": "mxfp4"}, refused=f"{NO_KERNEL} MXFP4"),
    "nvfp4": Case({"method": "nvfp4"}, refused="Marlin FP4 not available"),
    "nvfp4, activations": Case({"method": "nvfp4", "settings": {"activations": True}}, refused=f"{NO_KERNEL} NVFP4"),
    "rtn 128 beside rtn 32": Case(beside_rtn(method="rtn", options={"group_size": 32}), EVERY, four_bits=True),
    "rtn 128 beside int8": Case(beside_rtn(method="int8"), EVERY, INT8, four_bits=True),
    "gptq, rtn, groups of 128": rtn(128, EVERY, format="gptq"),
    "gptq, rtn, groups of 32": rtn(32, format="gptq"),
    "gptq, rtn, groups of 64, search mse": rtn(64, format="gptq", search="mse"),
    "gptq, rtn, groups of 64, a layer left alone": rtn(64, format="gptq", **LEFT),
    "gptq, rtn, rows": rtn(-1, format="gptq"),
    "gptq, rtn, 8 bits": Case(
        {"method": "rtn", "bits": 8, "group_size": 64, "format": "gptq"}, refused="Marlin does not support weight_bits = uint8b128"
    ),
    "gptq, rtn, 3 bits": Case(
        {"method": "rtn", "bits": 3, "group_size": 64, "format": "gptq"}, refused="Unsupported quantization config: bits=3"
    ),
    "awq, hqq": hqq(EVERY, format="awq"),
    "awq, rtn, groups of 128": rtn(128, format="awq", **ZERO),
    "awq, hqq, a layer left alone": hqq(format="awq", **LEFT),
    "awq, hqq, float16": hqq(format="awq", dtype="float16"),
    "awq, rtn, rows": rtn(-1, format="awq", **ZERO),
}


@dataclass(frozen=True)
class Job:
    """A checkpoint of a model, by its name in CASES, and the environment of its run."""

    model: str
    name: str
    folder: Path
    environment: dict[str, str]


def make_models(folder: Path) -> dict[str, Path]:
    """The models by name. Random weights have a spread at which each layer changes the result."""
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 704}
    shape |= {"num_hidden_layers": 3, "max_position_embeddings": 512, "tie_word_embeddings": False}
    configs = {
        "llama": transformers.LlamaConfig(**shape, intermediate_size=512),
        "qwen3": transformers.Qwen3Config(**shape, intermediate_size=384),
    }
    found = {"demo": ROOT / "examples/demo-model"}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
                else:
                    parameter += 0.1 * torch.randn_like(parameter)
            model.lm_head.weight *= 2
        found[name] = folder / name
        model.to(torch.bfloat16).save_pretrained(found[name])
    return found


def reference(source: Path, checkpoint: Path, roll: bool = False) -> torch.nn.Module:
    """The model in float32 with the weights that qcli decodes; with `roll` each a column further."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if checkpoint != source:
        for name, module in qcli.load(str(checkpoint), dtype="float32")[0].named_modules():
            if isinstance(module, QuantizedLinear):
                weight = module.dequantize(torch.float32)
                model.get_submodule(name).weight.data = weight.roll(1, 1) if roll else weight
    return model


@torch.no_grad()
def compare(model: torch.nn.Module, found: dict) -> dict[str, float]:
    """d, and the number of first choices, on what vLLM wrote."""
    most, first = 0.0, 0
    for prompt, tokens, logprobs in zip(PROMPTS, found["tokens"], found["logprobs"]):
        at = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = at.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        most = max(most, (own - torch.tensor(logprobs)).abs().max().item())
        first += (at.argmax(-1) == torch.tensor(tokens)).sum().item()
    return {"d": round(most, 4), "first_choices": first}


def run(python: str, jobs: list[Job], folder: Path) -> tuple[dict, list[dict]]:
    """vLLM's versions, and what it made of each job."""
    asked = [
        {
            "folder": str(job.folder),
            "prompts": PROMPTS,
            "new_tokens": NEW_TOKENS,
            "environment": job.environment,
            "seconds": SECONDS,
        }
        for job in jobs
    ]
    (folder / "jobs.json").write_text(json.dumps(asked))
    files = str(folder / "jobs.json"), str(folder / "found.jsonl")
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build/vllm.log", "w") as log:
        subprocess.run([python, str(Path(__file__).with_name("vllm_run.py")), *files], check=True, stdout=log, stderr=log)
    versions, *found = map(json.loads, Path(files[1]).read_text().splitlines())
    return versions, found


def make_jobs(models: dict[str, Path], folder: Path, words: tuple[str, ...], amx: bool) -> list[Job]:
    """Quantizes what begins with one of `words`."""
    jobs = []
    for model, source in models.items():
        jobs.append(Job(model, UNQUANTIZED, source, {}))
        for number, (name, case) in enumerate(CASES.items()):
            if model in case.models and name.startswith(words):
                output = folder / f"{model}-{number}"
                qcli.quantize(str(source), output, **case.options)
                jobs += [Job(model, name, output, {})] + [Job(model, name, output, W4A16)] * (amx and case.four_bits)
    return jobs


def verdict(job: Job, row: dict, floors: dict[str, float], amx: bool) -> str:
    """ "as expected", "not judged", or what is wrong."""
    case, error = CASES.get(job.name), row.get("error")
    if case is None:
        return "as expected" if error is None else "does not run"
    if amx and case.other_with_amx:
        return "not judged"
    if error is not None or case.refused:
        return (
            "as expected" if error is not None and case.refused and case.refused in error else f"expected: {case.refused or 'runs'}"
        )
    factor = max(case.factor, INT8) if amx and case.four_bits and not job.environment else case.factor
    limit = factor * floors.get(job.model, 0.0)
    row["limit"] = round(limit, 4)
    if row["d"] > limit:
        return "d is above the limit"
    return "as expected" if row["rolled"] > limit else "rolled weights are below the limit: no proof"


def measure(python: str, folder: Path, words: tuple[str, ...]) -> dict:
    """The result of all that begins with one of `words`."""
    models, amx = make_models(folder), "amx_int8" in Path("/proc/cpuinfo").read_text()
    jobs = make_jobs(models, folder, words, amx)
    versions, found = run(python, jobs, folder)
    rows, floors = [], {}
    for job, made in zip(jobs, found):
        row = {"model": job.model, "checkpoint": job.name, "environment": job.environment, "seconds": made["seconds"]}
        if "error" in made:
            row["error"] = made["error"]
        else:
            row |= compare(reference(models[job.model], job.folder), made)
            if job.name == UNQUANTIZED:
                floors[job.model] = row["d"]
            else:
                row["rolled"] = compare(reference(models[job.model], job.folder, roll=True), made)["d"]
        row["verdict"] = verdict(job, row, floors, amx)
        rows.append(row)
    tokens = NEW_TOKENS * len(PROMPTS)
    return {
        "machine": machine("compressed-tensors"),
        "amx": amx,
        "vllm": versions,
        "tokens": tokens,
        "floors": floors,
        "rows": rows,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="the interpreter of an environment with vLLM")
    parser.add_argument("--only", default="", help="checkpoints that begin with one of these words, separated by commas; not saved")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.vllm, Path(folder), tuple(options.only.split(",")))
    shown = [
        (row["model"], row["checkpoint"], row.get("d", "-"), row.get("first_choices", "-"), row.get("rolled", "-"), row["verdict"])
        for row in result["rows"]
    ]
    heads = ("model", "checkpoint", "d", f"first choices of {result['tokens']}", "rolled", "")
    console.table("", heads, [tuple(map(str, row)) for row in shown], left=(0, 1, 5))
    for row in result["rows"]:
        if "error" in row:
            console.out(f"{row['model']}, {row['checkpoint']}: {row['error']}")
    if not options.only:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        console.out(f"wrote {RESULT.relative_to(ROOT)}")
    sys.exit(any(row["verdict"] not in ("as expected", "not judged") for row in result["rows"]))


if __name__ == "__main__":
    main()
