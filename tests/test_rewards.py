"""The rewards that DPG is compared with: their formulas, in TRL's trainer, and their refusals."""

import random
import sys

import numpy as np
import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tests.tiny import QUIET, make_model, make_tokenizer
from trl_dpg import toy
from trl_dpg.rewards import (
    EmbeddingSimilarityReward,
    LanguageIDReward,
    LevenshteinReward,
    TargetLanguageReward,
    language_id,
)
from trl_dpg.scripts.arguments import UsageError
from trl_dpg.scripts.registry import make_rewards


RNG = random.Random(0)
TEXTS_A, TEXTS_B = ([toy.sentence(words, RNG) for _ in range(8)] for words in (toy.LANGUAGE_A, toy.LANGUAGE_B))
TEXTS = [*TEXTS_A[:2], *TEXTS_B[:2], TEXTS_A[2] + "\n" + TEXTS_B[2]]
TOKENIZER = toy.word_tokenizer([*toy.LANGUAGE_A, *toy.LANGUAGE_B])
ENCODER = toy.sentence_encoder(TOKENIZER, embedding_dim=16, seed=0)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("classifier") / "model.bin")
    toy.train_language_id({"A": toy.LANGUAGE_A, "B": toy.LANGUAGE_B}, path, seed=0)
    return path


@pytest.fixture
def rewards(classifier):
    references = TEXTS_B[4:]
    return [
        LevenshteinReward(references),
        EmbeddingSimilarityReward(references, ENCODER),
        LanguageIDReward("B", classifier),
    ]


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def test_levenshtein_is_the_mean_normalized_similarity_with_the_references():
    references = [*TEXTS_B[4:], "lan", "ñ → 木"]
    expected = [
        np.mean([1 - edit_distance(text, reference) / max(len(text), len(reference)) for reference in references])
        for text in TEXTS
    ]
    assert LevenshteinReward(references)(completions=TEXTS) == pytest.approx(expected, rel=1e-5)


def test_embedding_similarity_is_the_cosine_with_the_mean_of_the_references_directions():
    vectors = ENCODER[0].embedding.weight.detach().numpy()

    def direction(text):
        mean = vectors[TOKENIZER(text)["input_ids"]].mean(axis=0)
        return mean / np.linalg.norm(mean)

    mean = np.mean([direction(text) for text in TEXTS_B[4:]], axis=0)
    expected = [direction(text) @ mean / np.linalg.norm(mean) for text in TEXTS]
    assert EmbeddingSimilarityReward(TEXTS_B[4:], ENCODER)(completions=TEXTS) == pytest.approx(expected, abs=1e-5)


def test_language_id_is_the_classifiers_probability(classifier):
    reward = LanguageIDReward("B", classifier)
    model = reward.model
    vectors, outputs = model.get_input_matrix(), model.get_output_matrix()
    for text, value in zip(TEXTS, reward(completions=TEXTS), strict=True):
        rows = [row for word in [*text.split(), "</s>"] for row in model.get_subwords(word)[1]]
        logits = dict(zip(model.labels, outputs @ vectors[rows].mean(axis=0), strict=True))
        expected = 1 / (1 + np.exp(logits["__label__A"] - logits["__label__B"]))
        assert value == pytest.approx(expected, abs=3e-5)


def test_every_reward_prefers_the_language_of_its_references(rewards):
    for reward in rewards:
        assert max(reward(completions=TEXTS_A)) < min(reward(completions=TEXTS_B[:4]))


def test_conversational_completions_are_scored_by_their_text(rewards):
    messages = [[{"role": "assistant", "content": text}] for text in TEXTS]
    for reward in rewards:
        assert reward(completions=messages) == reward(completions=TEXTS)


def test_an_empty_completion_has_a_reward_in_range(rewards):
    for reward in rewards:
        assert 0 <= reward(completions=[""])[0] <= 1


def test_the_rewards_train_in_trls_trainer_under_their_names(rewards, tmp_path):
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=1,
        logging_steps=1,
        **QUIET,
    )
    trainer = GRPOTrainer(
        model=make_model(scale=1.0),
        reward_funcs=rewards,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2", "w3"] * 4}),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert all(np.isfinite(log[f"rewards/{name}/mean"]) for name in ("levenshtein", "embedding_similarity"))
    assert 0 < log["rewards/language_id/mean"] < 1


def test_an_encoder_is_loaded_from_its_path(tmp_path):
    ENCODER.save(str(tmp_path))
    loaded = EmbeddingSimilarityReward(TEXTS_B, str(tmp_path))
    assert loaded(TEXTS) == pytest.approx(EmbeddingSimilarityReward(TEXTS_B, ENCODER)(TEXTS), abs=1e-6)


def test_a_hub_classifier_is_its_repositorys_model_bin(classifier, monkeypatch):
    files = {("facebook/fasttext-language-identification", "model.bin"): classifier}
    monkeypatch.setattr(language_id, "hf_hub_download", lambda *file: files[file])
    assert LanguageIDReward("A")(TEXTS) == LanguageIDReward("A", classifier)(TEXTS)


@pytest.mark.parametrize("references", [[], "one bare text"])
def test_references_must_be_a_list_of_texts(references):
    for make in (LevenshteinReward, lambda references: EmbeddingSimilarityReward(references, ENCODER)):
        with pytest.raises(ValueError, match="must be a list of at least one text"):
            make(references)


def test_an_unknown_language_or_file_is_refused(classifier):
    with pytest.raises(ValueError, match=r"knows no language 'spanish'. Of its 2 names, .* (A, B|B, A)"):
        LanguageIDReward("spanish", classifier)
    with pytest.raises(ValueError, match=r"nowhere.bin cannot be opened"):
        LanguageIDReward("A", "nowhere.bin")


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("rapidfuzz.process", lambda: LevenshteinReward(TEXTS_B)),
        ("sentence_transformers", lambda: EmbeddingSimilarityReward(TEXTS_B)),
        ("fasttext", lambda: LanguageIDReward("A")),
        ("lingua", lambda: TargetLanguageReward("spa")),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_has_it(package, make, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'trl-dpg\[rewards\]'"):
        make()


def test_language_id_without_a_network_is_a_usage_error_with_the_remedy():
    """The tests run offline, and the default classifier is not on the disk."""
    with pytest.raises(UsageError, match=r"--reward_kwargs of 'language_id': .*could not be downloaded.*as `model`"):
        make_rewards(["language_id"], {"language_id": {"language": "spa_Latn"}})


def test_an_extra_that_a_reward_lacks_is_a_usage_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "fasttext", None)
    with pytest.raises(UsageError, match=r"'language_id': .*trl-dpg\[rewards\]"):
        make_rewards(["language_id"], {"language_id": {"language": "spa_Latn"}})


SENTENCES = {
    "eng": "Everyone has the right to life, liberty and the security of person.",
    "spa": "Toda persona tiene derecho a la vida, a la libertad y a la seguridad de su persona.",
    "deu": "Jeder hat das Recht auf Leben, Freiheit und Sicherheit der Person.",
    "fra": "Tout individu a droit à la vie, à la liberté et à la sûreté de sa personne.",
    "ita": "Ogni individuo ha diritto alla vita, alla libertà ed alla sicurezza della propria persona.",
    "por": "Todo o indivíduo tem direito à vida, à liberdade e à segurança pessoal.",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_target_language_is_one_for_completions_in_the_language_alone(language):
    reward = TargetLanguageReward(language)
    assert reward(completions=list(SENTENCES.values())) == [float(name == language) for name in SENTENCES]
    message = [{"role": "assistant", "content": SENTENCES[language]}]
    assert reward(completions=[message, "", "1234"]) == [1.0, 0.0, 0.0]


def test_target_language_names_the_languages_it_knows():
    with pytest.raises(ValueError, match="must be one of eng, spa, deu, fra, ita, por, got 'klingon'"):
        TargetLanguageReward("klingon")
