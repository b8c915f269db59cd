"""A reward for completions in a given language."""

import difflib
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from ..text import completion_text


class LanguageIDReward:
    """
    A TRL reward function: the probability that a completion is in a language, according to a fastText classifier
    (Joulin et al., arXiv 1607.01759). A baseline of the new-language experiment (Thrush et al., arXiv 2604.08423).

    Line breaks are replaced by spaces. fastText's probabilities have an error of about 1e-5, and it does not return
    smaller ones: the reward is then 0. The reward of an empty completion is the probability for an empty line.

    Needs the `rewards` extra. It installs fasttext-numpy2, which has fastText's own bindings, compiled, for any numpy.

    Args:
        language (`str`):
            The classifier's name of the language, e.g. `"es"` in lid.176 and `"spa_Latn"` in the default model.
        model (`str`, *optional*, defaults to `"facebook/fasttext-language-identification"`):
            Path of a classifier (`.bin`, or `.ftz` if it is quantised), e.g. of lid.176.bin. Or the id of a Hub
            repository that has the classifier as `model.bin`; it is downloaded (1.2 GB for the default one).

    Raises:
        `ValueError`: If there is no such file, it cannot be downloaded, or the classifier does not know the language.
    """

    __name__ = "language_id"  # the reward's name in TRL's logs

    def __init__(self, language: str, model: str = "facebook/fasttext-language-identification"):
        try:
            import fasttext
        except ImportError as error:
            raise ImportError("LanguageIDReward needs fastText: pip install 'trl-dpg[rewards]'") from error
        path = model
        if Path(model).suffix not in (".bin", ".ftz"):
            try:
                path = hf_hub_download(model, "model.bin")
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"The classifier {model!r} of the reward language_id could not be downloaded from the Hub. "
                    "Download it where there is a network, or give a classifier's file as `model`, e.g. 'lid.176.bin'."
                ) from error
        self.model = fasttext.load_model(path)
        self.label = f"__label__{language}"
        if self.label not in self.model.labels:
            languages = [label.removeprefix("__label__") for label in self.model.labels]
            near = difflib.get_close_matches(language, languages, n=4, cutoff=0.0)
            raise ValueError(
                f"The classifier {model} knows no language {language!r}. Of its {len(languages)} names, these are the "
                f"most similar: {', '.join(near)}."
            )

    def __call__(self, completions: list[str | list[dict[str, Any]]], **kwargs) -> list[float]:
        """
        Score completions. The trainer calls this.

        Args:
            completions (`list`): N completions, texts or messages.

        Returns:
            `list[float]`: N rewards from 0 to 1.
        """
        lines = [" ".join(completion_text(completion).split()) for completion in completions]
        predictions = zip(*self.model.predict(lines, k=-1), strict=True)
        return [
            min(float(dict(zip(labels, probabilities, strict=True)).get(self.label, 0.0)), 1.0)
            for labels, probabilities in predictions
        ]
