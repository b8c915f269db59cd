"""Metrics: their formulas, proxies and refusals."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

from tests.tiny import make_model, make_samples, make_tokenizer
from trl_dpg import FinetunedStudent, InnerLoopConfig, Student, metagradient
from trl_dpg.metrics import (
    PATTERN_67,
    CombinedMetric,
    LanguageModelingMetric,
    QRCodeMetric,
    WeightNormMetric,
    WeightPatternMetric,
)


def finetuned(model=None, change=0.01, tokenizer=None):
    student = Student(model or make_model(), tokenizer)
    theta = student.initial_theta()
    torch.manual_seed(1)
    return FinetunedStudent(student, (theta + change * torch.randn_like(theta)).requires_grad_(), theta)


SAMPLES = make_samples(7)


def test_language_modeling_is_the_mean_log_likelihood_of_all_tokens():
    student = finetuned()
    total, count = 0.0, 0
    for sample in SAMPLES:
        ids = torch.tensor([sample["input_ids"]])
        total -= F.cross_entropy(student(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.size(1) - 1
    metric = LanguageModelingMetric(SAMPLES)
    assert metric(student).item() == pytest.approx(total / count, rel=1e-5)
    assert metric.proxies(student, total / count)["perplexity"] == pytest.approx(math.exp(-total / count))


def test_language_modeling_and_its_gradient_do_not_depend_on_the_batch_size():
    student = finetuned()
    values, gradients = [], []
    for batch_size in (1, 3, 16):
        value = LanguageModelingMetric(SAMPLES, batch_size=batch_size)(student)
        values.append(value.detach())
        gradients.append(torch.autograd.grad(2 * value, student.theta)[0])
    ids = [torch.tensor([sample["input_ids"]]) for sample in SAMPLES]
    whole = -torch.stack(
        [F.cross_entropy(student(input_ids=x).logits[0, :-1], x[0, 1:], reduction="sum") for x in ids]
    ).sum() / sum(x.size(1) - 1 for x in ids)
    (expected,) = torch.autograd.grad(2 * whole, student.theta)
    for value, gradient in zip(values, gradients, strict=True):
        assert value == pytest.approx(whole.item(), rel=1e-5)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_language_modeling_counts_the_completion_alone_and_eos_only_if_asked():
    tokenizer = make_tokenizer()
    student = finetuned(tokenizer=tokenizer)
    pair = [{"prompt": "w1 w2 ", "completion": "w3"}]
    ids = torch.tensor([tokenizer("w1 w2 w3 <eos>")["input_ids"]])
    log_probabilities = student(input_ids=ids).logits.log_softmax(-1)[0]
    last_word, eos = log_probabilities[1, ids[0, 2]].item(), log_probabilities[2, ids[0, 3]].item()
    assert LanguageModelingMetric(pair)(student).item() == pytest.approx(last_word, rel=1e-5)
    with_eos = LanguageModelingMetric(pair, add_eos=True)(student).item()
    assert with_eos == pytest.approx((last_word + eos) / 2, rel=1e-5)


def unlikely_from(first):
    """A model with a tied head in which the tokens from `first` on are never likely."""
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 10.0
        model.transformer.wte.weight[first:, 0] = -10.0  # the logits are those of others minus 100
    assert model.lm_head.weight is model.transformer.wte.weight
    return model


@pytest.mark.parametrize("transpose", [False, True])
def test_a_pattern_on_rows_that_fine_tuning_leaves_alone_is_warned_of_once(transpose, monkeypatch):
    monkeypatch.setattr("trl_dpg.metrics.weights.logger.warning", lambda text: warnings.append(text))
    warnings: list[str] = []
    student = Student(unlikely_from(40), make_tokenizer())
    samples = [{"input_ids": [(7 * i + j * j) % 20 + 5 for j in range(12)]} for i in range(8)]  # tokens 5 to 24
    pattern, offset = [[1, -1, 1], [-1, 1, 1]], (3, 38) if transpose else (39, 4)
    metric = WeightPatternMetric(pattern, offset=offset, transpose=transpose)
    for _ in range(2):
        metagradient(student, samples, metric, InnerLoopConfig(batch_size=8, eps_root=1e-7))
    (warning,) = warnings
    assert f"moves 1 of the {3 if transpose else 2} rows of 'lm_head.weight'" in warning
    assert str(student.processing_class.convert_ids_to_tokens([40])) in warning
    (start,) = map(int, re.findall(r"`offset` \[3, (\d+)\]" if transpose else r"`offset` \[(\d+), 4\]", warning))
    assert start < 25

    lively = WeightPatternMetric(pattern, offset=(3, start) if transpose else (start, 4), transpose=transpose)
    metagradient(student, samples, lively, InnerLoopConfig(batch_size=8, eps_root=1e-7))
    assert len(warnings) == 1


def test_weight_pattern_is_the_papers_formula():
    student = finetuned()
    change = (student.weight("lm_head.weight") - student.initial_weight("lm_head.weight"))[5:11, 2:9]
    pattern = torch.tensor(PATTERN_67)
    metric = WeightPatternMetric(PATTERN_67, offset=(5, 2), scale=30.0)
    expected = -torch.log1p(torch.exp(-30.0 * pattern * change)).mean()
    assert metric(student).item() == pytest.approx(expected.item(), rel=1e-5)
    accuracy = (change.sign() == pattern).float().mean().item()
    assert metric.proxies(student, 0.0) == {"pixel_accuracy": pytest.approx(accuracy)}


def test_a_pattern_can_lie_on_the_transposed_weight():
    student = finetuned()
    change = (student.weight("lm_head.weight") - student.initial_weight("lm_head.weight")).T[:6, :7]
    assert torch.equal(WeightPatternMetric(PATTERN_67, transpose=True).decode(student), change.detach().sign())


def test_pattern_67_is_six_by_seven():
    pattern = torch.tensor(PATTERN_67)
    assert pattern.shape == (6, 7) and set(pattern.flatten().tolist()) == {-1, 1}


def test_a_qr_code_is_the_matrix_of_its_text():
    import segno

    metric = QRCodeMetric("DPG", version=1, error="H")
    modules = torch.tensor([list(row) for row in segno.make_qr("DPG", version=1, error="H", boost_error=False).matrix])
    assert metric.pattern.shape == (21, 21)
    assert torch.equal(metric.pattern, modules.float() * 2 - 1)


def test_weight_norm_is_minus_the_frobenius_norm():
    student = finetuned()
    norm = student.weight("lm_head.weight").pow(2).sum().sqrt().item()
    metric = WeightNormMetric()
    assert metric(student).item() == pytest.approx(-norm) and metric.proxies(student, -norm) == {"weight_norm": norm}


def test_a_combination_is_the_weighted_sum_and_keeps_all_proxies():
    student = finetuned()
    parts = [WeightNormMetric(), LanguageModelingMetric(SAMPLES), WeightNormMetric("model.norm.weight")]
    values = [part(student).item() for part in parts]
    metric = CombinedMetric(parts, [0.5, 2.0, -1.0])
    value = metric(student).item()
    assert value == pytest.approx(0.5 * values[0] + 2.0 * values[1] - values[2], rel=1e-5)
    proxies = metric.proxies(student, value)
    assert proxies == pytest.approx(
        {"weight_norm": -values[0], "perplexity": math.exp(-values[1]), "weight_norm_2": -values[2]}
    )


def test_scores_of_a_combination_are_the_weighted_sum_of_scores():
    parts = [WeightNormMetric(), LanguageModelingMetric(SAMPLES)]
    config = InnerLoopConfig(optimizer="sgd", learning_rate=0.1)

    def scores(metric):
        return metagradient(Student(make_model()), SAMPLES, metric, config).scores

    combined = scores(CombinedMetric(parts, [0.5, 2.0]))
    torch.testing.assert_close(combined, 0.5 * scores(parts[0]) + 2.0 * scores(parts[1]), rtol=1e-3, atol=1e-6)


def test_the_model_runs_with_labels_and_masks_as_it_always_does():
    student = finetuned()
    ids, mask = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = ids.masked_fill(mask == 0, -100)
    out = student(input_ids=ids, attention_mask=mask, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_benchmark_that_is_cut_off_is_warned_about(monkeypatch):
    from trl_dpg.metrics import language_modeling

    warnings = []
    monkeypatch.setattr(language_modeling.logger, "warning", warnings.append)
    metric = LanguageModelingMetric([{"input_ids": [1, 2, 3, 4]}, {"input_ids": [1, 2]}], max_length=3)
    metric(student := finetuned()), metric(student), metric(finetuned())
    metric.max_length = 4  # of a student whose tokens are fewer
    metric(finetuned())
    assert len(warnings) == 1 and "1 of the metric's 2 samples are longer than max_length = 3" in warnings[0]


def test_a_sum_that_does_not_depend_on_the_student_has_no_gradient():
    student = finetuned()
    assert not student.accumulate(lambda batch: torch.tensor(batch), [1.0, 2.0]).requires_grad


def test_a_three_line_function_is_a_metric():
    def prefers_seven(student):
        logits = student(input_ids=torch.tensor([[1, 2, 3]])).logits
        return logits[0, -1].log_softmax(-1)[7]

    samples = [{"input_ids": [1, 2, 3, 7]}, {"input_ids": [1, 2, 3, 9]}]
    out = metagradient(
        Student(make_model()), samples, prefers_seven, InnerLoopConfig(optimizer="sgd", learning_rate=0.1)
    )
    assert out.scores[0] > 0 > out.scores[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LanguageModelingMetric([]), "empty"),
        (lambda: LanguageModelingMetric(SAMPLES, batch_size=0), "batch_size"),
        (lambda: LanguageModelingMetric([{"input_ids": [1]}])(finetuned()), "no token to predict"),
        (lambda: WeightPatternMetric([[1, 0]]), "matrix of 1 and -1"),
        (lambda: WeightPatternMetric([1, -1]), "matrix of 1 and -1"),
        (
            lambda: WeightPatternMetric(PATTERN_67, offset=(60, 0))(finetuned()),
            r"offset \(60, 0\) does not fit.*\(61, 32\)",
        ),
        (lambda: WeightNormMetric("lm_head.weights")(finetuned()), "Near names: lm_head.weight"),
        (lambda: QRCodeMetric("a text that is too long", version=1), "does not fit into a QR code"),
        (lambda: CombinedMetric([]), "0 and 0"),
        (lambda: CombinedMetric([lambda student: 1.0])(finetuned()), "returned 1.0; it must return a scalar tensor"),
        (lambda: CombinedMetric([WeightNormMetric()], [1.0, 2.0]), "got 2 and 1"),
    ],
)
def test_bad_metrics_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- the QR code, scanned -------------------------------------------------------------------------------------------


def qr_student(flipped):
    """A student whose head changed as the code's modules say, but for some of them."""
    from trl_dpg.metrics import QRCodeMetric

    metric = QRCodeMetric("DPG", version=1, error="H")
    model = make_model(hidden_size=32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    student = Student(model, make_tokenizer())
    change = torch.zeros(model.lm_head.weight.shape)
    picture = metric.pattern.clone()
    pixels = [21 * row + column for row in range(9, 13) for column in range(9, 13)]  # of the data, not the finders
    pixels = pixels[:flipped] if flipped <= 16 else list(range(0, 441, 441 // flipped))[:flipped]
    picture.view(-1)[pixels] *= -1
    change[:21, :21] = 1e-3 * picture
    theta = student.initial_theta()
    return metric, FinetunedStudent(student, theta + change.flatten(), theta)


@pytest.mark.parametrize(("flipped", "text"), [(0, "DPG"), (3, "DPG"), (200, None)])
def test_a_decoder_reads_the_code_in_the_weights(flipped, text):
    metric, student = qr_student(flipped)
    assert metric.scan(student) == text
    proxies = metric.proxies(student, 0.0)
    assert proxies["scanned"] == (text == "DPG") and proxies["pixel_accuracy"] == pytest.approx(1 - flipped / 441)
    assert metric.readout(student)["scanned_text"] == text


def test_a_mirrored_picture_of_another_sign_is_not_read():
    metric, student = qr_student(0)
    inverse = FinetunedStudent(student.student, 2 * student._initial_theta - student.theta, student._initial_theta)
    assert metric.scan(inverse) is None


def test_a_finetuned_student_writes_greedily_under_its_own_weights():
    model = make_model()
    student = Student(model, make_tokenizer())
    theta = student.initial_theta()
    other = FinetunedStudent(student, theta + 0.5 * torch.randn(theta.shape), theta)
    prompt = student.processing_class("w1 w2", return_tensors="pt").input_ids
    expected = model.eval().generate(prompt, do_sample=False, max_new_tokens=5, pad_token_id=0)[0, 2:]
    text = FinetunedStudent(student, theta, theta).generate("w1 w2", max_new_tokens=5)
    assert text == student.processing_class.decode(expected, skip_special_tokens=True)
    assert other.generate("w1 w2", max_new_tokens=5) != text
    assert isinstance(other.generate(""), str)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules=["q_proj"])], ids=["full", "lora"])
def test_a_finetuned_student_with_gradient_checkpointing_writes_the_same(peft_config):
    student = Student(make_model(), make_tokenizer(), peft_config=peft_config)
    finetuned = FinetunedStudent(student, student.initial_theta(), student.initial_theta())
    text = finetuned.generate("w1 w2", max_new_tokens=8)
    student.model.gradient_checkpointing_enable()
    assert finetuned.generate("w1 w2", max_new_tokens=8) == text
    assert student.model.is_gradient_checkpointing
