"""The rows of benchmarks/peers.py: what each is called, and the arguments that its tool takes (benchmarks/peers_run.py)."""

TOOLS = ("qcli", "bitsandbytes", "hqq", "torchao", "quanto", "llm-compressor", "auto-round", "llama.cpp")


def rows_of(tool: str, group_size: int) -> list[tuple[str, dict]]:
    """(name, arguments) of a tool's rows. What has groups of any size has them of `group_size`, some of twice that."""
    if tool == "qcli":
        return _qcli(group_size)
    return _peers(group_size)[tool]


def order(row: dict, group_size: int) -> tuple[int, int]:
    """The place of a row of a result among all, for sorting. Rows that are no longer made come last."""
    names = [name for name, _ in rows_of(row["tool"], group_size)]
    return TOOLS.index(row["tool"]), names.index(row["row"]) if row["row"] in names else len(names)


def _qcli(size: int) -> list[tuple[str, dict]]:
    """Arguments are the options of qcli.quantize. The format is one whose groups need not divide rows."""
    integers = {"method": "rtn", "format": "qcli"}
    return [
        ("nf4", {"method": "nf4"}),
        ("nf4-plain", {"method": "nf4-plain"}),
        ("nf4 --search mse", {"method": "nf4", "search": "mse"}),
        ("fp4", {"method": "fp4"}),
        *(
            (
                f"rtn, {bits} bits, groups of {group_size}{', zero points' * zero_point}{', --search mse' * (search == 'mse')}",
                integers | {"bits": bits, "group_size": group_size, "search": search, "settings": {"zero_point": zero_point}},
            )
            for bits in (3, 4)
            for group_size in (size, 2 * size)
            for zero_point in (False, True)
            for search in ("none", "mse")
        ),
        (f"rtn, 8 bits, groups of {size}", integers | {"bits": 8, "group_size": size}),
        *((f"hqq, {bits} bits", {"method": "hqq", "bits": bits, "group_size": size, "format": "qcli"}) for bits in (3, 4)),
        ("nf3", {"method": "nf3", "group_size": size}),
        ("nf3 --search mse", {"method": "nf3", "group_size": size, "search": "mse"}),
        *((f"kmeans, {bits} bits", {"method": "kmeans", "bits": bits}) for bits in (3, 4)),
        ("kmeans, 3 bits, sparse 0.005", {"method": "kmeans", "bits": 3, "settings": {"sparse": 0.005}}),
        ("mxfp4", {"method": "mxfp4"}),
        ("nvfp4", {"method": "nvfp4"}),
        ("fp8", {"method": "fp8"}),
        ("int8", {"method": "int8"}),
        ("llm-int8", {"method": "llm-int8"}),
        ("nf4 --calibrate", {"method": "nf4", "calibrate": True}),
        ("nf4-plain --calibrate", {"method": "nf4-plain", "calibrate": True}),
        ("nf3 --calibrate", {"method": "nf3", "group_size": size, "calibrate": True}),
        ("nvfp4 --calibrate", {"method": "nvfp4", "calibrate": True}),
        *(
            (
                f"rtn, {bits} bits, groups of {group_size}, --calibrate",
                integers | {"bits": bits, "group_size": group_size, "calibrate": True},
            )
            for bits, group_size in ((3, size), (4, size), (4, 2 * size), (8, size))
        ),
        (f"awq, groups of {size}", {"method": "awq", "group_size": size, "format": "qcli"}),
        (f"awq, groups of {size}, --calibrate", {"method": "awq", "group_size": size, "calibrate": True, "format": "qcli"}),
    ]


def _peers(size: int) -> dict[str, list[tuple[str, dict]]]:
    def compressed(bits: int, symmetric: bool = True, observer: str = "memoryless_minmax", **modifiers: dict) -> dict:
        weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": size, "observer": observer}
        return {"weights": weights, "modifiers": modifiers}

    def rounded(bits: int, iters: int, sym: bool = True, **settings: object) -> dict:
        return {"bits": bits, "group_size": size, "sym": sym, "iters": iters} | settings

    return {
        "bitsandbytes": [
            ("NF4, double quantization", {"kind": "nf4", "double_quant": True}),
            ("NF4", {"kind": "nf4"}),
            ("FP4", {"kind": "fp4"}),
            ("int8", {"kind": "int8"}),
        ],
        "hqq": [(f"{bits} bits, groups of {size}", {"nbits": bits, "group_size": size}) for bits in (3, 4, 8)],
        "torchao": [
            *(
                (f"int{bits}, groups of {each}", {"config": "IntxWeightOnlyConfig", "bits": bits, "group_size": each})
                for bits, each in ((3, size), (4, size), (4, 2 * size))
            ),
            ("W8A8, its weights", {"config": "Int8DynamicActivationInt8WeightConfig"}),
            ("float8", {"config": "Float8WeightOnlyConfig"}),
        ],
        "quanto": [(kind, {"weights": kind}) for kind in ("qint4", "qint8", "qfloat8")],
        "llm-compressor": [
            ("RTN, 4 bits", compressed(4, QuantizationModifier={})),
            ("RTN, 4 bits, imatrix_mse", compressed(4, observer="imatrix_mse", QuantizationModifier={})),
            ("GPTQ, 4 bits", compressed(4, GPTQModifier={})),
            ("GPTQ, 4 bits, imatrix_mse", compressed(4, observer="imatrix_mse", GPTQModifier={})),
            ("AWQ, 4 bits, zero points", compressed(4, symmetric=False, AWQModifier={}, QuantizationModifier={})),
            ("RTN, 3 bits", compressed(3, QuantizationModifier={})),
            ("GPTQ, 3 bits, imatrix_mse", compressed(3, observer="imatrix_mse", GPTQModifier={})),
        ],
        "auto-round": [
            ("RTN, 4 bits", rounded(4, 0, disable_opt_rtn=True)),
            ("RTN optimized, 4 bits", rounded(4, 0)),
            ("20 steps, 4 bits", rounded(4, 20)),
            ("20 steps, 3 bits", rounded(3, 20)),
        ],
        "llama.cpp": [
            (f"{kind}{', imatrix' * imatrix}", {"type": kind, "imatrix": imatrix})
            for kind in ("Q3_K", "Q4_0", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
            for imatrix in (False, True)
            if not (imatrix and kind == "Q8_0")  # it takes none
        ],
    }
