"""Whether completions are in a language, told by their letters and words, without a download."""

from typing import TYPE_CHECKING, Any

from ..text import completion_text


if TYPE_CHECKING:
    from lingua import LanguageDetector


LANGUAGES = {
    "eng": "ENGLISH",
    "spa": "SPANISH",
    "deu": "GERMAN",
    "fra": "FRENCH",
    "ita": "ITALIAN",
    "por": "PORTUGUESE",
}  # ISO 639-3 → the name in lingua


class TargetLanguageReward:
    """
    A TRL reward function: 1.0 for completions in a language, else 0.0. Its mean is the share of the language.

    lingua chooses the most likely one of English, Spanish, German, French, Italian and Portuguese. A completion
    without a word is in none of them. Its models come with its package, so that nothing is downloaded.

    Needs the `rewards` extra (lingua-language-detector).

    Args:
        language (`str`): `"eng"`, `"spa"`, `"deu"`, `"fra"`, `"ita"` or `"por"`.

    Raises:
        `ValueError`: If the language is not one of these.
    """

    __name__ = "target_language"  # the reward's name in TRL's logs

    def __init__(self, language: str):
        if language not in LANGUAGES:
            raise ValueError(f"The language must be one of {', '.join(LANGUAGES)}, got {language!r}.")
        try:
            from lingua import Language, LanguageDetectorBuilder
        except ImportError as error:
            raise ImportError("TargetLanguageReward needs lingua: pip install 'trl-dpg[rewards]'") from error
        languages = [getattr(Language, name) for name in LANGUAGES.values()]
        self.detector: LanguageDetector = LanguageDetectorBuilder.from_languages(*languages).build()
        self.language = getattr(Language, LANGUAGES[language])

    def __call__(self, completions: list[str | list[dict[str, Any]]], **kwargs) -> list[float]:
        """
        Score completions; called by the trainer.

        Args:
            completions (`list`): N completions, texts or messages.

        Returns:
            `list[float]`: N rewards, 0.0 or 1.0.
        """
        texts = [completion_text(completion) for completion in completions]
        return [float(self.detector.detect_language_of(text) == self.language) for text in texts]
