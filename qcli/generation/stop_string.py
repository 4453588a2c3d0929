"""Texts that end an answer: transformers' rule, which looks for them across the borders of tokens."""

from transformers.generation.stopping_criteria import StopStringCriteria

from qcli.errors import CheckpointError, first_line


class StopString(StopStringCriteria):
    """transformers' rule, which also remembers in `met` whether the last token completed one of the texts."""

    met = False

    def __call__(self, input_ids, scores, **kwargs):
        done = super().__call__(input_ids, scores, **kwargs)
        self.met = bool(done.any())
        return done


def stop_string(tokenizer, texts: str | list[str] | None) -> StopString | None:
    """The rule for `texts`, None where there are none. Raises CheckpointError for a tokenizer that it cannot read."""
    if not texts:
        return None
    try:
        return StopString(tokenizer, texts)
    except Exception as e:  # any kind: it reads the tokenizer's vocabulary as text
        raise CheckpointError(
            f"stop_strings of the generation config cannot be looked for: {first_line(e)}",
            "Remove the field, or use another tokenizer.",
        ) from e
