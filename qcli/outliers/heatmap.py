"""Which dimensions the heatmap of the page and of the figure shows."""

_ROWS = 24  # in all, unless more dims are outliers
_ORDINARY = 8  # ordinary dims at least, to compare with


def worth_showing(chart: dict | None, threshold: float) -> dict | None:
    """A summary's heatmap, cut to the dims that reach the threshold in some layer, and some ordinary ones, in their order.

    None where there is nothing to show.
    """
    if not chart or not chart["dims"]:
        return None
    reaches = [any(layer[d] >= threshold for layer in chart["absmax"]) for d in range(len(chart["dims"]))]
    ordinary = [d for d, reached in enumerate(reaches) if not reached][: max(_ROWS - sum(reaches), _ORDINARY)]
    kept = sorted([d for d, reached in enumerate(reaches) if reached] + ordinary)
    return chart | {
        "dims": [chart["dims"][d] for d in kept],
        "absmax": [[layer[d] for d in kept] for layer in chart["absmax"]],
        "share": [[layer[d] for d in kept] for layer in chart["share"]],
    }
