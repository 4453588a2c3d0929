"""An estimate as JSON: the keys that scripts may rely on."""

from qcli.memory.estimate import Estimate, MethodEstimate


def summary(found: Estimate) -> dict[str, object]:
    """For JSON. Sizes are bytes. A later version may add keys, and changes none.

    model: name, type, parameters, layers, max_context, read (what was counted).
    setting: context, batch, dtype, kv_dtype, runtime, train, rank, head.
    gpus: name, memory, said (a sentence on where the memory is from).
    fits: see `Estimate.fits`. assumed, notes: sentences.
    methods: for each method, bits_per_weight; components: name, bytes, formula (sentences); overhead and total: least, likely and
    most on one GPU. With GPUs named also: verdict ("fits", "tight", "does not fit"), left (on the fullest GPU), split ("device_map
    auto" or "by hand", over several GPUs), gpus (holds, weights, state, activations, overhead, left), largest_context and
    largest_batch (value, bound), and advice (options, count, on_cpu: see `Advice`) or null.
    """
    config = found.model.config
    setting = vars(found.setting) | {"rank": found.setting.rank if found.setting.train else None}
    return {
        "model": {
            "name": found.model.label,
            "type": config.model_type,
            "parameters": found.model.parameter_count,
            "layers": config.layers,
            "max_context": config.max_context,
            "read": found.model.read,
        },
        "setting": setting,
        "gpus": [vars(gpu) for gpu in found.gpus],
        "fits": found.fits if found.gpus else None,
        "assumed": found.assumed,
        "notes": found.notes,
        "methods": [_method_summary(row) for row in found.methods],
    }


def _method_summary(row: MethodEstimate) -> dict[str, object]:
    shown = {
        "method": row.method,
        "bits_per_weight": round(row.bits_per_weight, 4),
        "components": [vars(part) for part in row.components],
        "overhead": _three(row.needs.overhead) | {"formula": list(row.overhead)},
        "total": row.needs.totals,
    }
    if row.placement is None:
        return shown
    loads = [
        {
            "gpu": load.gpu.name,
            "holds": load.holds,
            "weights": load.weights,
            "state": load.state,
            "activations": load.activations,
            "overhead": _three(load.overhead),
            "left": load.left,
        }
        for load in row.placement.loads
    ]
    return shown | {
        "verdict": row.placement.verdict,
        "left": row.placement.left,
        "split": None if len(loads) == 1 else "device_map auto" if row.placement.automatic else "by hand",
        "gpus": loads,
        "largest_context": vars(row.context),
        "largest_batch": vars(row.batch),
        "advice": row.advice and vars(row.advice),
    }


def _three(sizes: tuple[int, int, int]) -> dict[str, object]:
    return dict(zip(("least", "likely", "most"), sizes))
