"""Whether two models have one vocabulary, as a comparison token by token needs."""

from qcli.errors import UsageError
from qcli.streaming.skeleton import Skeleton


def check_same_tokens(model: Skeleton, base: Skeleton) -> None:
    """Raises UsageError unless a token id means the same to both."""
    names = model.source.label, base.source.label
    ours, theirs = (s.tokenizer.get_vocab() for s in (model, base))
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    hint = "A comparison token by token needs one vocabulary; compare bits per byte instead, each model by itself."
    if differing:
        ids = [f"id {v[differing[0]]} in {n}" if differing[0] in v else f"not in {n}" for v, n in zip((ours, theirs), names)]
        raise UsageError(
            f"the vocabularies of {names[0]} and {names[1]} differ in {len(differing):,} tokens: {differing[0]!r} is {ids[0]}, "
            f"{ids[1]}",
            hint,
        )
    sizes = [s.model.get_output_embeddings().out_features for s in (model, base)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"{names[0]} predicts {sizes[0]:,} tokens, {names[1]} {sizes[1]:,}", hint)
