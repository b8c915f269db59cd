"""A reward and a trainer on tiny models, as several test modules use them."""

from datasets import Dataset

from tests.tiny import QUIET, make_model, make_tokenizer
from trl_dpg import DPGConfig, DPGTrainer, InnerLoopConfig, Student
from trl_dpg.metrics import LanguageModelingMetric


TOKENIZER = make_tokenizer()

# A batch of a reward: completions, two of each prompt
TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w2 w2", "w9 w1 w3", "w5 w6", "w7 w8", "w3 w4 w1"]
PROMPTS = ["w1", "w1", "w2", "w2", "w3", "w3", "w4", "w4"]
METRIC = LanguageModelingMetric(["w1 w2 w3 w4"])
CONFIG = InnerLoopConfig(learning_rate=1e-3, eps_root=1e-6, batch_size=4)

# The prompts of a trainer, and its metric
TRAIN_PROMPTS = Dataset.from_dict({"prompt": ["w1 w2", "w3 w4", "w5", "w6"] * 4})
TRAIN_METRIC = LanguageModelingMetric(["w5 w6 w7"])


def make_student():
    return Student(make_model(scale=1.0), processing_class=TOKENIZER)


def dpg_config(tmp_path, **kwargs):
    defaults = dict(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=6,
        max_steps=1,
        logging_steps=1,
        **QUIET,
        student_batch_size=4,
        student_learning_rate=1e-3,
    )
    return DPGConfig(**defaults | kwargs)


def make_trainer(args, **kwargs):
    defaults = dict(
        model=make_model(seed=1, scale=1.0),
        student=make_model(seed=2),
        target_metric=TRAIN_METRIC,
        args=args,
        train_dataset=TRAIN_PROMPTS,
        processing_class=TOKENIZER,
        student_processing_class=TOKENIZER,
    )
    return DPGTrainer(**defaults | kwargs)
