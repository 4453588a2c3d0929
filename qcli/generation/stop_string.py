"""Texts that end an answer. transformers' rule finds them also where they cross the borders of tokens."""

from transformers.generation.stopping_criteria import StopStringCriteria

from qcli.errors import CheckpointError, first_line


class StopString(StopStringCriteria):
    """transformers' rule. `met` also records whether the last token completed one of the texts."""

    met = False

    def __call__(self, input_ids, scores, **kwargs):
        done = super().__call__(input_ids, scores, **kwargs)
        self.met = bool(done.any())
        return done


def stop_string(tokenizer, texts: str | list[str] | None) -> StopString | None:
    """The rule for `texts`, None if there are none. Raises CheckpointError for a tokenizer that the rule cannot read."""
    if not texts:
        return None
    try:
        return StopString(tokenizer, texts)
    except Exception as e:  # of any type: the rule reads the tokenizer's vocabulary as text
        raise CheckpointError(
            f"stop_strings of the generation config cannot be searched for: {first_line(e)}",
            "Remove the field, or use another tokenizer.",
        ) from e
