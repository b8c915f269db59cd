"""Tasks of lm-eval as metrics, against lm-eval's own log-likelihoods."""

import json
import sys
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import make_model
from trl_dpg import FinetunedStudent, Student
from trl_dpg.metrics import LanguageModelingMetric, lm_eval_tasks


STORIES = [
    "el gato duerme en la casa y la niña mira al gato",
    "la niña come pan en la casa",
    "el perro mira al gato y come el pan",
    "en la casa el perro duerme y el gato mira pan",
    "y la niña duerme",
]
LAMBADA = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{ story.rsplit(' ', 1)[0] }}",
    "doc_to_target": "{{ ' ' + story.rsplit(' ', 1)[1] }}",
}
CHOICES = {"output_type": "multiple_choice", "doc_to_choice": "{{ words }}", "doc_to_target": "right"}
TASKS = {
    "last_word": LAMBADA,
    "solved_examples": {**LAMBADA, "num_fewshot": 2, "fewshot_split": "train", "description": "Cuentos.\n"},
    "choice": {**CHOICES, "doc_to_text": "{{ story.rsplit(' ', 1)[0] }}"},
    "spaces_before_the_choice": {**CHOICES, "doc_to_text": "{{ story }}: \n ", "target_delimiter": ""},
    "choice_within_a_word": {
        **CHOICES,
        "doc_to_text": "{{ story }} ca",
        "doc_to_choice": "{{ ['sa y pan', 'sa y gato'] }}",
        "target_delimiter": "",
    },
    "choice_by_its_text": {**CHOICES, "doc_to_text": "{{ story }}", "doc_to_target": "{{ words[right] }}"},
    "no_context": {**CHOICES, "doc_to_text": ""},
    "several_contexts": {
        **CHOICES,
        "doc_to_text": "right",
        "doc_to_choice": "{{ [story, story.upper()] }}",
        "doc_to_target": "{{ words[0] }}",
    },
    "generation": {"output_type": "generate_until", "doc_to_text": "{{ story }}", "doc_to_target": "{{ words }}"},
    "whole_documents": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "story"},
    "only_train_has_answers": {**CHOICES, "doc_to_text": "story", "doc_to_target": "answer"},
    "generation_without_answers": {"output_type": "generate_until", "doc_to_text": "story", "doc_to_target": ""},
    "about_images": {**LAMBADA, "doc_to_image": "story"},
    "a_class": {"class": "somewhere.Task"},
    "no_documents": {**LAMBADA, "test_split": "empty"},
    "no_documents_in_train": {**LAMBADA, "training_split": "empty"},
}
LIKELIHOODS = list(TASKS)[:8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task YAML files whose data lie beside them; a group and a tag."""
    folder = tmp_path_factory.mktemp("tasks")

    def write(split, stories, answer):
        rows = [
            {"story": story, "words": ["pan", "gato"], "right": k % 2, "answer": k % 2 if answer else -1}
            for k, story in enumerate(stories)
        ]
        (folder / f"{split}.json").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")

    write("train", STORIES[1:4], answer=True), write("test", STORIES, answer=False)
    data_files = {split: str(folder / f"{split}.json") for split in ("train", "test")}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data_files, "cache_dir": str(folder / "cache")},
        "training_split": "train",
        "test_split": "test",
        "tag": "stories",
    }
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, "task": name, **task}), encoding="utf-8")
    (folder / "group.yaml").write_text("group: both\ntask: [last_word, choice]\n", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch):
    """Of lm-eval's own tasks those of one folder: its index of all takes seconds to read."""
    own = Path(lm_eval.tasks.__file__).parent / "lambada_multilingual"
    manager = TaskManager(include_path=own, include_defaults=False)
    monkeypatch.setattr(lm_eval_tasks, "built_in_tasks", lambda: manager)


def make_tokenizer(like):
    """A BPE of bytes without bos like GPT-2's, or one of characters with bos like Llama's."""
    tokenizer = Tokenizer(models.BPE(unk_token=None if like == "gpt2" else "<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder, alphabet = {
        "gpt2": (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
            pre_tokenizers.ByteLevel.alphabet(),
        ),
        "llama": (pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(), []),
    }[like]
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(STORIES, trainer)
    names = dict(pad_token="<pad>", eos_token="<eos>")
    if like == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
        names |= dict(bos_token="<bos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_student(like="gpt2"):
    tokenizer = make_tokenizer(like)
    model = make_model(vocab_size=len(tokenizer))
    model.config.max_position_embeddings = 256
    return Student(model, tokenizer)


def value(metric, student):
    theta = student.initial_theta()
    return metric(FinetunedStudent(student, theta, theta)).item()


def mean_log_likelihood(folder, name, student, **kwargs):
    """lm-eval's own: the log-likelihoods of the right answers over their number of tokens."""
    task = TaskManager(include_path=folder, include_defaults=False).load(name)["tasks"][name]
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    requests = [r for r in task.instances if r.doc["right"] == r.idx or task.OUTPUT_TYPE == "loglikelihood"]
    model = HFLM(
        student.model, tokenizer=student.processing_class, batch_size=2, max_batch_size=2, device="cpu", **kwargs
    )
    counts = [
        len(model._encode_pair(*r.args)[1])
        if r.args[0]
        else len(model.tok_encode(r.args[1], add_special_tokens=False))
        for r in requests
    ]
    return sum(result[0] for result in model.loglikelihood(requests, disable_tqdm=True)) / sum(counts)


@pytest.mark.parametrize("like", ["gpt2", "llama"])
def test_the_metric_is_lm_evals_log_likelihood_per_token(folder, like):
    student = make_student(like)
    for name in LIKELIHOODS:
        metric = LanguageModelingMetric.from_lm_eval(name, include_path=folder)
        assert value(metric, student) == pytest.approx(mean_log_likelihood(folder, name, student), abs=1e-5), name


def test_a_long_context_loses_its_beginning_as_in_lm_eval(folder):
    student = make_student()
    metric = LanguageModelingMetric.from_lm_eval("last_word", include_path=folder, max_length=5)
    whole = LanguageModelingMetric.from_lm_eval("last_word", include_path=folder)
    expected = mean_log_likelihood(folder, "last_word", student, max_length=4)  # without the last token, not fed in
    assert value(metric, student) == pytest.approx(expected, abs=1e-5)
    assert value(metric, student) != pytest.approx(value(whole, student), abs=1e-3)


def test_of_lambada_in_another_language_the_last_word_alone_counts(monkeypatch):
    asked = []

    def load_dataset(path, name, **kwargs):
        asked.append((path, name))
        return datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": STORIES}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for language in ("es", "fr", "de", "it"):
        metric = LanguageModelingMetric.from_lm_eval(f"lambada_openai_mt_{language}", limit=2)
        assert metric.dataset == [
            {"prompt": "el gato duerme en la casa y la niña mira al", "completion": " gato"},
            {"prompt": "la niña come pan en la", "completion": " casa"},
        ]
    assert asked == [("EleutherAI/lambada_openai", language) for language in ("es", "fr", "de", "it")]
    student = make_student()
    (example, _) = lm_eval_tasks.tokenize_pairs(student, metric.dataset, max_length=64)
    word = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != -100]
    assert student.processing_class.decode(word) == " gato"


def test_a_split_a_limit_and_the_options_of_the_metric_can_be_chosen(folder):
    metric = LanguageModelingMetric.from_lm_eval(
        "choice", split="train", limit=2, include_path=str(folder), batch_size=3, add_eos=True
    )
    assert metric.dataset == [
        {"prompt": "la niña come pan en la", "completion": " pan"},
        {"prompt": "el perro mira al gato y come el", "completion": " gato"},
    ]
    assert metric.batch_size == 3
    student = make_student()
    (example, _) = lm_eval_tasks.tokenize_pairs(student, metric.dataset, max_length=64, add_eos=metric.add_eos)
    assert student.processing_class.decode(example.input_ids).endswith("la pan<eos>") and example.labels[-1] == 1


def test_solved_examples_come_from_the_seed(folder):
    def prompts(**kwargs):
        metric = LanguageModelingMetric.from_lm_eval("solved_examples", include_path=folder, **kwargs)
        return [row["prompt"] for row in metric.dataset]

    assert prompts() == prompts() != prompts(seed=1)
    assert all(prompt.count("\n\n") == 1 for prompt in prompts(num_fewshot=1))


def test_of_a_generation_task_the_first_reference_counts(folder):
    metric = LanguageModelingMetric.from_lm_eval("generation", include_path=folder)
    assert metric.dataset == [{"prompt": story, "completion": " pan"} for story in STORIES]


def test_the_metric_without_lm_eval_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "trl_dpg.metrics.lm_eval_tasks")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-dpg\[lm-eval\]'"):
        LanguageModelingMetric.from_lm_eval("lambada_openai_mt_es")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "lambada_openai_mt_sp",
            {},
            "no task 'lambada_openai_mt_sp' in lm-eval or .*Near names: .*lambada_openai_mt_es",
        ),
        ("lastword", {}, "Near names: last_word"),
        ("qqqq", {}, "`lm-eval ls tasks` lists them"),
        ("both", {}, r"'both' is a group of tasks: \['last_word', 'choice'\].*CombinedMetric"),
        ("lambada_multilingual", {}, r"is a group of tasks: \['lambada_openai_mt_de'"),
        ("a_class", {}, "'a_class' is a Python class"),
        ("about_images", {}, "'about_images' is not about text alone"),
        ("whole_documents", {}, "'whole_documents' scores whole documents.*as `text` or"),
        ("last_word", {"split": "validation"}, "'last_word' has no split 'validation'; it has test, train"),
        ("only_train_has_answers", {}, "Document 0 .*split 'test', has no target.*answers: test, train"),
        ("generation_without_answers", {}, "Document 0 .*has no target"),
        ("no_documents", {}, "'no_documents' has no first document: its evaluation split is empty"),
        ("no_documents_in_train", {"split": "train"}, "split 'train' of the task .* has no documents"),
        ("last_word", {"limit": 0}, r"has no documents \(limit: 0\)"),
    ],
)
def test_tasks_that_are_no_metric_raise(folder, monkeypatch, name, kwargs, message):
    if name.startswith("no_documents"):
        empty = datasets.Dataset.from_dict({"story": []})
        full = datasets.Dataset.from_dict({"story": STORIES})
        monkeypatch.setattr(datasets, "load_dataset", lambda **_: {"empty": empty, "train": full, "test": full})
    with pytest.raises(ValueError, match=message):
        LanguageModelingMetric.from_lm_eval(name, include_path=folder, **kwargs)


def test_of_a_completion_that_merges_into_the_prompt_the_last_token_counts():
    student = make_student()
    (example,) = lm_eval_tasks.tokenize_pairs(student, [{"prompt": "la ca", "completion": "sa"}], max_length=64)
    assert student.processing_class.convert_ids_to_tokens(example.input_ids) == ["la", "Ġcasa"]
    assert example.labels == [-100, example.input_ids[1]]


def test_a_student_without_a_tokenizer_cannot_read_a_task(folder):
    with pytest.raises(ValueError, match="no tokenizer"):
        value(LanguageModelingMetric.from_lm_eval("last_word", include_path=folder), Student(make_model()))
