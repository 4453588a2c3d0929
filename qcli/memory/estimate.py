"""The verb `estimate_memory`: what a model needs under each method, whether it fits, and what helps where it does not."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qcli.errors import UsageError
from qcli.memory.components import STORED, Component, Costs, Setting
from qcli.memory.costs.quantizing import refusal
from qcli.memory.costs.weights import ITEMSIZE, METHODS
from qcli.memory.model.opening import Model, open_model
from qcli.memory.model.tensor_rules import with_head
from qcli.memory.placing import verdict
from qcli.memory.placing.hardware import Gpu, gpus
from qcli.memory.placing.split import device_map_auto
from qcli.memory.placing.verdict import FITS, Needs, Placement
from qcli.schemes import BY_BITS, NAMED, UNQUANTIZED, head_bits, named
from qcli.sizes import format_bytes

DEFAULT_CONTEXT = 8192
MOST_BATCH = 1 << 20  # sequences at a time, where memory sets no limit
MOST_CONTEXT = 1 << 24  # tokens, for models that set no limit themselves
_BY_BITS = {"32": "float32", **{str(bits): name for bits, name in BY_BITS.items()}}
RUNTIMES = ("transformers", "vllm")
TRAINING = ("finetune", "qlora", "lora")


@dataclass(frozen=True)
class Reach:
    """The largest context (tokens) or batch (sequences) that fits. All else is as asked. `bound` names what limits it."""

    value: int
    bound: str


@dataclass(frozen=True)
class Advice:
    """What would fit instead. Any one of these is enough; None marks what does not help.

    options: each is an option to add to the command ("--bits nf4"). count: how many of the first GPU named, in place of all named.
    on_cpu: bytes of layers to put into the CPU's memory.
    """

    options: list[str]
    count: int | None
    on_cpu: int | None


@dataclass(frozen=True)
class MethodEstimate:
    """One method. `components` sum to `needs` without its overhead. `overhead` has the sentences on the overhead.
    `placement` and the fields after it are None where no GPU was named.
    """

    method: str
    components: list[Component]
    overhead: Sequence[str]
    needs: Needs
    bits_per_weight: float
    placement: Placement | None = None
    context: Reach | None = None
    batch: Reach | None = None
    advice: Advice | None = None

    def component(self, name: str) -> int:
        """Bytes of the component `name`, 0 where there is none."""
        return sum(part.bytes for part in self.components if part.name == name)


@dataclass(frozen=True)
class Estimate:
    """What was asked, and a row for each method. `assumed` has a sentence for each gap in the config, `notes` for each surprise."""

    model: Model
    setting: Setting
    gpus: list[Gpu]
    methods: list[MethodEstimate]
    assumed: list[str]
    notes: list[str]

    @property
    def fits(self) -> bool:
        """Whether any method fits the GPUs named, with the most overhead. True where no GPU was named."""
        return not self.gpus or any(entry.placement.verdict == FITS for entry in self.methods)


def estimate_memory(
    model: str | None = None,
    *,
    params: str | None = None,
    gpu: Sequence[str] = (),
    context: int | None = None,
    batch: int = 1,
    bits: Sequence[str] = (),
    kv_dtype: str | None = None,
    head: int | None = None,
    runtime: str = "transformers",
    train: str | None = None,
    rank: int = 16,
    revision: str | None = None,
) -> Estimate:
    """Estimates the memory of `model` (a config.json, a folder, a hub id) or of a Llama-like one of `params` ("7B") parameters.

    gpu: sizes or names, as `--gpu` takes them. context: tokens of prompt and answer together; 8,192 by default, or the model's
    limit if that is less. batch: sequences. bits: 32, 16, 8, 4 or methods; by default those that the stored weights can become.
    head: bits of the output head, and of an embedding tied to it, where the rest is quantized: 16, 8 or 4.
    train: None, or training adapters of `rank` on every linear layer: "finetune" as `qcli finetune` does; "qlora" or "lora" as PEFT
    does by its own ways.

    Raises UsageError, CheckpointError, HubError, DeviceError.
    """
    at_least_one(context=context, batch=batch, rank=rank)
    devices = devices_of(gpu, runtime)
    if train is not None:
        _one_of("train", train, TRAINING)
        _one_of("runtime", runtime, ("transformers",), " with --train")
    of_head = head_bits(head)
    opened = open_model(model, params, revision)
    if of_head is not None:
        opened = _with_head(opened, of_head, train, runtime)
    limit = opened.config.max_context
    setting = Setting(
        context=context or min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT),
        batch=batch,
        kv_dtype=kv_dtype,
        runtime=runtime,
        train=train,
        rank=rank,
        dtype=_sixteen_bit(opened),
        head=of_head or 16,
    )
    chosen = _methods(opened, bits, train)
    if of_head is not None and all(method in ITEMSIZE for method in chosen):
        raise UsageError(f"--head {head} was given, and --bits {', '.join(bits)} quantizes nothing", "Add --bits 4 or --bits 8.")
    costs = [Costs(opened, method, setting.dtype) for method in chosen]
    rows = [_estimate(cost, setting, devices) for cost in costs]
    if devices:
        rows = [_advised(cost, row, setting, devices, rows) for cost, row in zip(costs, rows)]
    return Estimate(opened, setting, devices, rows, list(opened.config.assumed), _notes(opened, setting, devices, rows))


def _with_head(model: Model, bits: int, train: str | None, runtime: str) -> Model:
    if train is not None:
        raise UsageError(f"--head and --train {train} were both given", "Leave out one of them.")
    if runtime == "vllm":
        raise UsageError("--head and --runtime vllm were both given", "Leave out --head: vLLM reads no head in fewer bits.")
    if model.config.quantization:
        raise UsageError(f"--head: {model.label} is quantized already", "Leave it out, or name the original checkpoint.")
    found = with_head(model.parameters, bits)
    if found is None:
        raise UsageError(f"--head: {model.label} has no output head", "Leave it out.")
    return replace(model, parameters=found)


def _notes(model: Model, setting: Setting, devices: list[Gpu], rows: Sequence[MethodEstimate]) -> list[str]:
    found, limit = [], model.config.max_context
    if limit and setting.context > limit:
        found.append(f"{setting.context:,} tokens is more than the {limit:,} that {model.label} was made for.")
    quantized = [row.method for row in rows if row.method not in ITEMSIZE and row.method != STORED]
    fused = sum(parameter.numel for parameter in model.parameters if parameter.kind == "experts" and not parameter.quantizable)
    if quantized and not any(parameter.quantizable for parameter in model.parameters):
        found.append(f"transformers 5 quantizes no layer of a {model.config.model_type} model.")
    elif quantized and fused:
        size = format_bytes(fused * ITEMSIZE[setting.dtype])
        found.append(f"Experts are fused parameters, which transformers 5 leaves in {setting.dtype}: {size} under every method.")
    found += [f"{reason}." for method in quantized if (reason := refusal(model.parameters, method)) is not None]
    if setting.runtime == "vllm" and len(devices) > 1:
        found.append("Over several GPUs the layers are split as by vLLM's pipeline parallelism, not within each layer.")
    return found


def _sixteen_bit(model: Model) -> str:
    """The dtype of what is not quantized: the stored one, bfloat16 where that has 32 bits."""
    config = model.config
    if config.dtype not in ITEMSIZE:
        config.assume(f"dtype in {config.label} is {config.dtype!r}: what is not quantized is counted in bfloat16.")
    return config.dtype if config.dtype in ("bfloat16", "float16") else "bfloat16"


def devices_of(named: Sequence[str], runtime: str) -> list[Gpu]:
    """The GPUs that `--gpu` names, each with the memory that `runtime` takes of it. Raises UsageError, DeviceError."""
    _one_of("runtime", runtime, RUNTIMES)
    devices = gpus(list(named))
    return [_taken_by_vllm(device) for device in devices] if runtime == "vllm" else devices


def _taken_by_vllm(gpu: Gpu) -> Gpu:
    share = f"{gpu.said}; vLLM takes 90% of it unless --gpu-memory-utilization says otherwise"
    return replace(gpu, memory=gpu.memory * 9 // 10, said=share)


def at_least_one(**numbers: int | None) -> None:
    """Raises UsageError for an option whose number is less than 1."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}, expected at least 1")


def _one_of(name: str, value: str, allowed: Sequence[str], where: str = "") -> None:
    if value not in allowed:
        raise UsageError(f"--{name} is {value!r}, expected {' or '.join(allowed)}{where}")


def _methods(model: Model, bits: Sequence[str], train: str | None) -> list[str]:
    if model.config.quantization:
        if bits:
            kind = model.config.quantization.get("quant_method", "an unnamed method")
            raise UsageError(
                f"{model.label} is quantized already ({kind}), and --bits {bits[0]} was given",
                "Leave out --bits, or name the original checkpoint.",
            )
        if train == "lora":
            raise _wrong_training(train, f"{model.label} is quantized")
        return [STORED]
    half = _sixteen_bit(model)
    if not bits:
        if train:
            return {"qlora": ["nf4"], "lora": [half], "finetune": [half, "nf4"]}[train]
        return ["float32"] * (model.config.dtype == "float32") + [half, "llm-int8", "nf4"]
    found = method_names(bits, half)
    if train in ("qlora", "lora") and any((method in ITEMSIZE) == (train == "qlora") for method in found):
        raise _wrong_training(train, f"--bits {', '.join(bits)} was given")
    return found


def method_names(bits: Sequence[str], half: str) -> list[str]:
    """The methods that `--bits` names, each once; 16 bits are the dtype `half`. Raises UsageError."""
    found = []
    for text in bits:
        word = text.strip().lower()
        method = _BY_BITS.get(word, half if word == "16" else word)
        if method.isdecimal():
            raise UsageError(f"--bits is {text!r}, expected 32, 16, 8, 4 or one of {', '.join(METHODS[:-1])}")
        found.append(method if method in ITEMSIZE else named(method).name)
        if found[-1] == UNQUANTIZED.name:
            found[-1] = half
    return list(dict.fromkeys(found))


def _wrong_training(train: str, found: str) -> UsageError:
    kind, other = ("quantized", "lora") if train == "qlora" else ("unquantized", "qlora")
    return UsageError(f"--train {train} is for {kind} weights, and {found}", f"Use --train {other}.")


def _estimate(costs: Costs, setting: Setting, devices: list[Gpu]) -> MethodEstimate:
    counted = costs.counted(setting, devices)
    needs = counted.needs
    row = MethodEstimate(costs.method, counted.components, counted.overhead, needs, costs.weights.bits_per_weight)
    if not devices:
        return row
    return replace(
        row,
        placement=verdict.place(needs, devices, _automatic(costs, setting, needs, devices)),
        context=_reach(costs, setting, devices, "context"),
        batch=_reach(costs, setting, devices, "batch"),
    )


def _reach(costs: Costs, setting: Setting, devices: list[Gpu], name: str) -> Reach:
    own = costs.model.config.max_context
    limit = MOST_BATCH if name == "batch" else own or MOST_CONTEXT

    def too_large(n: int) -> bool:
        return not verdict.fits(costs.needs(replace(setting, **{name: n}), devices), devices)

    # This is exact: no component shrinks as tokens or sequences are added.
    value = bisect_left(range(1, limit + 1), True, key=too_large)
    stop = "the model's limit" if name == "context" and own else "none larger was tried"
    return Reach(value, stop if value == limit else "memory")


def _automatic(costs: Costs, setting: Setting, needs: Needs, devices: list[Gpu]) -> list[int] | None:
    """The split that the runtime makes without being asked: device_map="auto" in transformers, none in vLLM."""
    if setting.runtime == "vllm":
        return None
    memory = [device.memory for device in devices]
    return device_map_auto(needs.blocks, memory, quantized=costs.method not in ITEMSIZE)


def _advised(
    costs: Costs, row: MethodEstimate, setting: Setting, devices: list[Gpu], rows: Sequence[MethodEstimate]
) -> MethodEstimate:
    if row.placement.verdict == FITS:
        return row
    options = []
    if 0 < row.context.value < setting.context:
        options.append(f"--context {row.context.value}")
    if 0 < row.batch.value < setting.batch:
        options.append(f"--batch {row.batch.value}")
    options += _smaller(costs, row, setting, devices, rows)
    can_offload = setting.runtime == "transformers" and not setting.train
    advice = Advice(
        options=options,
        count=verdict.count_that_fits(lambda gpus: costs.needs(setting, gpus), devices[0]),
        on_cpu=verdict.offload(row.needs, devices) if can_offload else None,
    )
    return replace(row, advice=advice)


def _smaller(costs: Costs, row: MethodEstimate, setting: Setting, devices: list[Gpu], rows: Sequence[MethodEstimate]) -> list[str]:
    """Options for fewer bits that fit. The one that loses least is first."""
    if row.method == STORED:
        return []
    counted = {other.method: other.needs for other in rows}
    if setting.train == "lora":
        needs = Costs(costs.model, "nf4", setting.dtype).needs(replace(setting, train="qlora"), devices)
        return ["--train qlora"] if verdict.fits(needs, devices) else []
    found = []
    for method in (*(name for name in counted if name in ITEMSIZE), *sorted(BY_BITS.values(), key=lambda name: -NAMED[name].bits)):
        needs = counted.get(method) or Costs(costs.model, method, setting.dtype).needs(setting, devices)
        if needs.most < row.needs.most and verdict.fits(needs, devices):
            found.append(f"--bits {method}")
    return found
