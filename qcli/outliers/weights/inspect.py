"""What a model's weights and headers alone tell of outliers and of what quantization would cost: no forward pass.

Weights come piece by piece, of a hub model by ranged reads, so that nothing is downloaded but what is looked at, and nothing
of that is kept. (`.bin` shards are fetched whole: only such a file itself tells where its tensors lie.)
"""

from collections.abc import Callable
from contextlib import closing, nullcontext

from qcli import __version__, formats
from qcli.checkpoint import config_json, dtypes
from qcli.checkpoint.model_dtype import model_dtype
from qcli.checkpoint.modules import Layout, Linear, find_linears
from qcli.checkpoint.safetensors_file import TensorInfo
from qcli.checkpoint.source import Source, open_source, read_pieces
from qcli.errors import CheckpointError, together
from qcli.formats import Weight
from qcli.formats.describe import Description, describe
from qcli.outliers.tensor_names import gain_of, is_down_projection, layer_counts, place
from qcli.outliers.weights import summary
from qcli.outliers.weights.statistics import LinearWeight, NormGain
from qcli.schemes import NAMED, Scheme

_SIZES = ("llm-int8", "nf4-plain", "nf4")  # of qcli.schemes


def inspect_weights(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, object]:
    """The report of a folder or hub id, as plain JSON values: null where a figure is not defined.

    `linears`, a dict per linear weight: `absmax`; `rms`; `crest`, absmax / rms; central `kurtosis`, 3 for a Gaussian;
    `row_spread` and `block_spread`, greatest / median absmax of the rows, and of the blocks of 64; `row_crest`, the greatest
    absmax / rms of a row; `sqnr` in dB of row-wise int8 and of NF4 with double quantization; `columns`, the input columns
    whose standard deviation is more than 4 of its own standard deviations over its mean, as bitsandbytes' OutlierTracer has
    it; `largest`, for down projections of early layers, the single weights that stand out (see largest_weights). A weight with
    NaN or infinity has their count as `nonfinite` and null for the rest. `quantized`: whether `qcli quantize` would, unasked.
    `kinds`: the same over all layers: medians, worst values, and SQNR of all its weights together.
    `norms`, a dict per norm gain: mean, population std, and the dims more than 3 std away from the mean.
    `norm_dims`: in what share of the norms of as many `channels` a dim is that far away. A `candidate` for an outlier feature
    is so in more than half of them, of which there are two or more (BERT Busters, arXiv:2105.06990).
    `super_weights`: candidates (arXiv:2411.07191), which a forward pass would have to confirm.
    `sizes`: bytes of the whole model as stored, and as each method would write it.

    Of a checkpoint that is quantized already the norms alone are told. `progress(total, done)` gives a context manager with
    advance(bytes, name). Memory: a few pieces of 4 MiB, and what LinearWeight keeps of one weight.
    Raises CheckpointError, HubError, and PlanError where config.json states a dtype that qcli does not know.
    """
    source = open_source(model, revision, trust_remote_code=trust_remote_code)
    notes = [*source.problems, *source.notes]
    told, gains = describe(source), _norm_gains(source)
    weights, layout = [], None
    if source.quantization:
        notes.append(
            f"{source.label} is quantized already, and what is left of its linear weights does not tell what they were: the "
            "norms alone were inspected. Give the original 16- or 32-bit checkpoint for the rest."
        )
    else:
        layout = _layout(source, trust_remote_code, notes)
        weights = _linear_weights(source, layout, notes)
    _measure(source, weights + gains, progress)
    linears, norms = [w.finding for w in weights], [g.finding for g in gains]
    notes += summary.nonfinite_notes(linears + norms)
    report = {
        "format": "qcli-weights",
        "version": 1,
        "qcli": __version__,
        "model": _model(source, told),
        "modules_decided_by": layout.decided_by if layout else None,
        "linears": linears,
        "kinds": summary.kinds(weights),
        "norms": norms,
        "norm_dims": summary.norm_dims(norms),
        "super_weights": summary.super_weights(linears),
        "sizes": _sizes(source, told, layout),
        "notes": notes,
    }
    summary.shorten_dims(report)
    return report


def _layout(source: Source, trust_remote_code: bool, notes: list[str]) -> Layout:
    """By names and shapes where transformers cannot tell: nothing is to be loaded there afterwards."""
    try:
        layout = find_linears(source, trust_remote_code=trust_remote_code)
    except CheckpointError as e:
        notes.append(f"{e.message}; so linear modules were told by their names and shapes")
        layout = find_linears(source, rules=True)
    notes += layout.notes
    if layout.expert_parameters:
        notes.append(f"fused experts, {layout.expert_parameters:,} parameters, are no linear modules: not inspected")
    return layout


def _norm_gains(source: Source) -> list[NormGain]:
    return [
        NormGain(info, gain_of(name))
        for name, info in source.tensors.items()
        if len(info.shape) == 1 and info.numel > 1 and info.dtype in dtypes.FLOATS and gain_of(name)
    ]


def _linear_weights(source: Source, layout: Layout, notes: list[str]) -> list[LinearWeight]:
    dtype = model_dtype(source, "auto")
    chosen = {linear.tensor for linear in layout.quantizable()}
    found, of_no_use = [], {}
    for name, linear in layout.linears.items():
        info = source.tensors[name]
        expected = (linear.in_features, linear.out_features) if linear.transposed else (linear.out_features, linear.in_features)
        if info.shape != expected:
            notes.append(f"{name} is {list(info.shape)}, the model expects {list(expected)}: not inspected")
        elif info.dtype not in dtypes.FLOATS:
            of_no_use.setdefault(info.dtype, []).append(name)
        elif info.numel:
            found.append((info, linear))
    notes += [together(f"weights stored as {code} were not inspected", names) for code, names in of_no_use.items()]
    layers = layer_counts(linear.module for _, linear in found)

    def early(module: str) -> bool:
        """The first quarter of the layers, and always four: where the paper found super weights, but for a few."""
        at = place(module)
        return at.layer is not None and at.layer < max(4, layers[at.stack] / 4)

    return [
        LinearWeight(
            info,
            linear,
            dtype,
            quantized=info.name in chosen,
            early_down=is_down_projection(linear.module) and early(linear.module),
        )
        for info, linear in found
    ]


def _measure(source: Source, works: list[LinearWeight | NormGain], progress: Callable | None) -> None:
    """Reads every tensor once, in the order in which they lie in their files."""
    files = {file: i for i, file in enumerate(source.files)}
    works = sorted(works, key=lambda work: (files[work.info.file], work.info.start))
    pieces = [(work, start, count) for work in works for start, count in work.pieces()]
    total = sum(work.info.nbytes for work in works)
    wanted = ((work.info.file, work.info.start + start, count) for work, start, count in pieces)
    with closing(read_pieces(source, wanted)) as read, progress(total, 0) if progress else nullcontext() as shown:
        for (work, start, count), data in zip(pieces, read, strict=True):
            work.take(start, data)
            if shown:
                shown.advance(count, work.info.name)


def _model(source: Source, told: Description) -> dict[str, object]:
    hidden = (part.get(key) for _, part in config_json.parts(source.config) for key in ("hidden_size", "n_embd", "d_model"))
    stored = source.quantization
    return {
        "name": source.label,
        "architecture": told.architecture,
        "layers": max(layer_counts(source.tensors).values(), default=0),
        "hidden_size": next((size for size in hidden if isinstance(size, int)), None),
        "parameters": told.parameters,
        "quantization": stored.get("quant_method", "unnamed") if stored else None,
        "dtype": dtypes.TORCH_NAMES[model_dtype(source, "auto")],
    }


def _sizes(source: Source, told: Description, layout: Layout | None) -> list[dict[str, object]]:
    """Bytes of all tensors: as stored, and by each method with the modules that `qcli quantize` would choose."""
    sizes = {"as stored": told.bytes}
    if layout is not None:
        dtype = model_dtype(source, "auto")
        quantizable = {linear.tensor: linear for linear in layout.quantizable()}
        for name in _SIZES:
            sizes[name] = sum(
                _written(info, quantizable.get(info.name), NAMED[name], layout, dtype) for info in source.tensors.values()
            )
    return [
        {"method": label, "bytes": count, "bits_per_weight": 8 * count / max(told.parameters, 1)} for label, count in sizes.items()
    ]


def _written(info: TensorInfo, linear: Linear | None, scheme: Scheme, layout: Layout, dtype: str) -> int:
    """Bytes of a tensor as `qcli quantize` would write it, the model's dtype being `dtype`."""
    if linear is not None:
        return formats.stored_bytes(scheme, Weight(info.name, linear.out_features, linear.in_features, dtype))
    if info.dtype in dtypes.FLOATS:
        return info.numel * dtypes.ITEMSIZE["F32" if layout.stays_fp32(info.name, dtype) else dtype]
    return info.nbytes
