"""What the heatmap leaves out."""

from qcli.outliers.heatmap import worth_showing


def chart(*columns):
    """Two layers; a dim a column, numbered by tens."""
    layers = [list(layer) for layer in zip(*columns)]
    share = [[value / 100 for value in layer] for layer in layers]
    dims = [10 * d for d in range(len(columns))]
    return {"kind": "ffn input", "layers": [0, 1], "dims": dims, "absmax": layers, "share": share}


def test_outlier_dims_stay_and_ordinary_ones_fill_up_in_their_order():
    shown = worth_showing(chart((9, 1), *[(1, 2)] * 40, (1, 6), (5, 5.9)), 6.0)
    assert shown["dims"] == [10 * d for d in range(23)] + [410]
    assert shown["absmax"] == [[9] + [1] * 22 + [1], [1] + [2] * 22 + [6]]
    assert shown["share"][1] == [0.01] + [0.02] * 22 + [0.06]
    assert shown["kind"] == "ffn input" and shown["layers"] == [0, 1]


def test_many_outlier_dims_all_stay_beside_a_few_ordinary_ones():
    shown = worth_showing(chart(*[(7, 7)] * 30, *[(1, 1)] * 30), 6.0)
    assert shown["dims"] == [10 * d for d in range(38)]


def test_nothing_to_show():
    assert worth_showing(None, 6.0) is None
    assert worth_showing({"dims": [], "absmax": [[]], "share": [[]], "layers": [0]}, 6.0) is None
