"""What a model's weights and headers show of outliers and of the cost of quantization, without a forward pass.

Weights come piece by piece, from the hub by ranged reads. So only what is looked at is downloaded, and none of it is kept. (`.bin`
shards are fetched whole, since only the file itself says where its tensors are.)
"""

from collections.abc import Callable
from contextlib import closing

from qcli import formats
from qcli.checkpoint import config_json, dtypes
from qcli.checkpoint.layout import Layout, Linear
from qcli.checkpoint.model_dtype import model_dtype
from qcli.checkpoint.names import gain_of, is_down_projection, layer_counts, place
from qcli.checkpoint.safetensors_file import TensorInfo
from qcli.checkpoint.source import Source, open_source, read_pieces
from qcli.errors import CheckpointError, together
from qcli.formats import Weight
from qcli.formats.describe import Description, describe
from qcli.memory.model.plain_layout import layout_of
from qcli.outliers.weights import summary
from qcli.outliers.weights.inspection import Model, Size, WeightInspection
from qcli.outliers.weights.statistics import LinearWeight, NormGain
from qcli.progress import Progress, shown
from qcli.schemes import NAMED, Scheme

_SIZES = ("llm-int8", "nf4-plain", "nf4")  # of qcli.schemes


def inspect_weights(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False, progress: Progress | None = None
) -> WeightInspection:
    """Reads the weights of a folder or hub id. A model that is quantized already has only its norms inspected.

    `progress` is that of qcli.progress. Memory: a few pieces of 4 MiB, and what LinearWeight keeps of one weight.
    Raises CheckpointError, HubError, and PlanError where config.json states a dtype that qcli does not know.
    """
    source = open_source(model, revision, trust_remote_code=trust_remote_code)
    notes = [*source.problems, *source.notes]
    described, gains = describe(source), _norm_gains(source)
    weights, layout = [], None
    if source.quantization:
        notes.append(
            f"{source.label} is quantized already, and its linear weights no longer show what they were: only the norms were "
            "inspected. Give the original 16- or 32-bit checkpoint for the rest."
        )
    else:
        layout, on_layout = _layout(source, trust_remote_code)
        weights, on_weights = _linear_weights(source, layout)
        notes += on_layout + on_weights
    _measure(source, weights + gains, progress)
    linears, norms = [w.finding for w in weights], [g.finding for g in gains]
    return WeightInspection(
        model=_model(source, described),
        modules_decided_by=layout.decided_by if layout else None,
        linears=[summary.shortened(linear) for linear in linears],
        kinds=summary.kinds(weights),
        norms=[summary.shortened_norm(norm) for norm in norms],
        norm_dims=summary.norm_dims(norms),
        super_weights=summary.super_weights(linears),
        sizes=_sizes(source, described, layout),
        notes=notes + summary.nonfinite_notes([*linears, *norms]),
    )


def _layout(source: Source, trust_remote_code: bool) -> tuple[Layout, list[str]]:
    """(modules, notes), as transformers builds them, or by names and shapes where it cannot: nothing has to be loaded later."""
    notes = []
    try:
        layout = layout_of(source, trust_remote_code=trust_remote_code)
    except CheckpointError as e:
        notes.append(f"{e.message}; so linear modules were found by their names and shapes")
        layout = layout_of(source, rules=True)
    notes += layout.notes
    if layout.expert_parameters:
        notes.append(f"fused experts, {layout.expert_parameters:,} parameters, are no linear modules: not inspected")
    return layout, notes


def _norm_gains(source: Source) -> list[NormGain]:
    return [
        NormGain(info, gain_of(name))
        for name, info in source.tensors.items()
        if len(info.shape) == 1 and info.numel > 1 and info.dtype in dtypes.FLOATS and gain_of(name)
    ]


def _linear_weights(source: Source, layout: Layout) -> tuple[list[LinearWeight], list[str]]:
    """(weights, notes on those that cannot be inspected), in the order of the files."""
    dtype = model_dtype(source, "auto")
    chosen = {linear.tensor for linear in layout.quantizable()}
    found, misshaped, of_no_use = [], [], {}
    for info in sorted((source.tensors[name] for name in layout.linears), key=_reading_order(source)):
        name, linear = info.name, layout.linears[info.name]
        expected = (linear.in_features, linear.out_features) if linear.transposed else (linear.out_features, linear.in_features)
        if info.shape != expected:
            misshaped.append(f"{name} ({list(info.shape)}, the model expects {list(expected)})")
        elif info.dtype not in dtypes.FLOATS:
            of_no_use.setdefault(info.dtype, []).append(name)
        elif info.numel:
            found.append((info, linear))
    notes = [together("tensors whose shape is not the model's", misshaped)] if misshaped else []
    notes += [together(f"weights stored as {code} were not inspected", names) for code, names in of_no_use.items()]
    layers = layer_counts(linear.module for _, linear in found)

    def early(module: str) -> bool:
        """Whether it is in the first quarter of the layers, or the first four: there the paper found nearly all super weights."""
        at = place(module)
        return at.layer is not None and at.layer < max(4, layers[at.stack] / 4)

    weights = [
        LinearWeight(
            info,
            linear,
            dtype,
            quantized=info.name in chosen,
            early_down=is_down_projection(linear.module) and early(linear.module),
        )
        for info, linear in found
    ]
    return weights, notes


def _reading_order(source: Source) -> Callable[[TensorInfo], tuple[int, int]]:
    """A sort key for tensors, in the order of the bytes: the file's number, and the first byte in it."""
    files = {file: i for i, file in enumerate(source.files)}
    return lambda info: (files[info.file], info.start)


def _measure(source: Source, works: list[LinearWeight | NormGain], progress: Progress | None) -> None:
    """Reads every tensor once, in the order of the files."""
    order = _reading_order(source)
    works = sorted(works, key=lambda work: order(work.info))
    pieces = [(work, start, count) for work in works for start, count in work.pieces()]
    total = sum(work.info.nbytes for work in works)
    wanted = ((work.info.file, work.info.start + start, count) for work, start, count in pieces)
    with closing(read_pieces(source, wanted)) as read, shown(progress, total) as advance:
        for (work, start, count), data in zip(pieces, read, strict=True):
            work.take(start, data)
            advance(count, work.info.name)


def _model(source: Source, described: Description) -> Model:
    hidden = (part.get(key) for _, part in config_json.parts(source.config) for key in ("hidden_size", "n_embd", "d_model"))
    stored = source.quantization
    return Model(
        name=source.label,
        architecture=described.architecture,
        layers=max(layer_counts(source.tensors).values(), default=0),
        hidden_size=next((size for size in hidden if isinstance(size, int)), None),
        parameters=described.parameters,
        quantization=stored.get("quant_method", "unnamed") if stored else None,
        dtype=dtypes.TORCH_NAMES[model_dtype(source, "auto")],
    )


def _sizes(source: Source, described: Description, layout: Layout | None) -> list[Size]:
    """Bytes of all tensors: as stored, and by each method with the modules that `qcli quantize` would choose."""
    sizes = {"as stored": described.bytes}
    if layout is not None:
        dtype = model_dtype(source, "auto")
        quantizable = {linear.tensor: linear for linear in layout.quantizable()}
        for name in _SIZES:
            sizes[name] = sum(
                _written(info, quantizable.get(info.name), NAMED[name], layout, dtype) for info in source.tensors.values()
            )
    return [Size(label, count, 8 * count / max(described.parameters, 1)) for label, count in sizes.items()]


def _written(info: TensorInfo, linear: Linear | None, scheme: Scheme, layout: Layout, dtype: str) -> int:
    """Bytes of a tensor as `qcli quantize` would write it. `dtype` is the code of the model's dtype."""
    if linear is not None:
        return formats.stored_bytes(scheme, Weight(info.name, linear.out_features, linear.in_features, dtype))
    if info.dtype in dtypes.FLOATS:
        return info.numel * dtypes.ITEMSIZE["F32" if layout.stays_fp32(info.name, dtype) else dtype]
    return info.nbytes
