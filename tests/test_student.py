"""The student: what it takes, what it refuses, and how it reads text."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from tests.tiny import FAMILIES, make_model, make_samples, make_tokenizer
from tests.unroll import relative_error
from trl_dpg import FinetunedStudent, InnerLoopConfig, Student, metagradient
from trl_dpg.metrics import LanguageModelingMetric, WeightNormMetric
from trl_dpg.student import TokenizedExample


TOKENIZER = make_tokenizer()


def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def ids(text):
    return TOKENIZER(text)["input_ids"]


# -- text -----------------------------------------------------------------------------------------------------------


def test_texts_are_supervised_throughout_and_end_with_eos():
    (example,) = Student(make_model(), TOKENIZER).tokenize(["w1 w2 w3"], 64)
    assert example.input_ids == example.labels == [*ids("w1 w2 w3"), *ids("<eos>")]
    assert example.num_supervised == 3


def test_eos_is_not_added_twice():
    (example,) = Student(make_model(), TOKENIZER).tokenize(["w1 w2 <eos>"], 64)
    assert example.input_ids == ids("w1 w2 <eos>")


def test_completions_are_supervised_given_their_prompt():
    rows = [{"prompt": "w1 w2 ", "completion": "w3 w4 "}]
    (example,) = Student(make_model(), TOKENIZER).tokenize(rows, 64)
    assert example.input_ids == ids("w1 w2 w3 w4 <eos>")
    assert example.labels == [-100, -100, *ids("w3 w4 <eos>")]


TEMPLATE = (
    "{% for m in messages %}{{ m.role[:1] == 'u' and 'w50 ' or 'w51 ' }}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w51 {% endif %}"
)


def chat_student():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Student(make_model(), tokenizer)


def test_messages_go_through_the_chat_template():
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    (example,) = chat_student().tokenize([{"messages": messages}], 64)
    assert example.input_ids == example.labels == ids("w50 w1 w51 w2")


def test_conversational_prompts_and_completions_go_through_the_chat_template():
    row = {"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "assistant", "content": "w2 w3"}]}
    (example,) = chat_student().tokenize([row], 64)
    assert example.input_ids == ids("w50 w1 w51 w2 w3")
    assert example.labels == [-100] * 3 + ids("w2 w3")


def test_token_ids_are_taken_as_they_are():
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}]
    first, second = Student(make_model()).tokenize(rows, 64)
    assert first.labels == [5, 6, 7] and second.labels == [-100, -100, 7]


def test_modules_that_are_replaced_afterwards_are_trained():
    from copy import deepcopy

    student, metric = Student(make_model(), TOKENIZER), LanguageModelingMetric(["w1 w2 w3"])
    texts, config = ["w1 w2 w3 w4", "w5 w6", "w7 w8 w9"], InnerLoopConfig(learning_rate=0.1, eps_root=1e-6)
    layers = student.model.model.layers
    layers[0] = deepcopy(layers[1])
    for frozen in (False, True):
        layers[1].mlp.gate_proj.weight.requires_grad_(not frozen)
        scores = metagradient(student, texts, metric, config).scores
        assert torch.equal(scores, metagradient(Student(student.model, TOKENIZER), texts, metric, config).scores)
    assert f"{student.initial_theta().numel():,} trainable" in student.describe()
    student.model.lm_head = torch.nn.Sequential(torch.nn.Dropout(0.5), student.model.lm_head)
    with pytest.raises(ValueError, match="active dropout"):
        metagradient(student, texts, metric, config)


def test_datasets_and_lists_give_the_same_scores():
    from datasets import Dataset

    student, metric = Student(make_model(), TOKENIZER), LanguageModelingMetric(["w1 w2 w3"])
    texts = ["w1 w2 w3 w4", "w5 w6", "w7 w8 w9"]
    as_list = metagradient(student, texts, metric).scores
    assert torch.equal(metagradient(student, Dataset.from_dict({"text": texts}), metric).scores, as_list)


@pytest.mark.parametrize("row", [{"text": ""}, {"prompt": "w1 w2", "completion": ""}])
def test_empty_samples_have_nothing_to_learn(row):
    (example,) = Student(make_model(), TOKENIZER).tokenize([row], 64)
    assert example.num_supervised == 0


def test_samples_longer_than_the_models_positions_are_cut_off():
    (example,) = Student(make_model(), TOKENIZER).tokenize(["w1 " * 100], 1024)
    assert len(example.input_ids) == 64 and example.truncated


def test_padding_is_on_the_right_and_never_supervised():
    student = Student(make_model(), TOKENIZER)
    batch = student.collate(student.tokenize(["w1 w2 w3", "w4"], 64))
    assert batch.input_ids[1].tolist() == [*ids("w4 <eos>"), 0, 0]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.targets.tolist() == [1, 2, 3, 5] and batch.labels.tolist()[-1] == ids("<eos>")[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "w1"}, r"columns \['answer'\]"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 `input_ids` but 1 `labels`"),
        ({"input_ids": [1, 61]}, "Token id 61 does not exist.*61 entries"),
    ],
)
def test_bad_samples_raise(row, message):
    with pytest.raises(ValueError, match=message):
        Student(make_model(), TOKENIZER).tokenize([row], 64)


def test_texts_without_a_tokenizer_raise():
    with pytest.raises(ValueError, match="no tokenizer"):
        Student(make_model()).tokenize(["w1"], 64)


HEADS = ["untied", "tied", "frozen", "adapted", "copied", "soft-capped"]


def make_student_with_head(kind):
    model = make_model("llama-tied" if kind == "tied" else "llama", scale=1.0)
    if kind == "frozen":
        model.lm_head.requires_grad_(False)
    if kind == "soft-capped":
        forward = model.forward
        model.forward = lambda **inputs: _soft_capped(forward(**inputs))
    if kind == "adapted":
        return Student(
            model, peft_config=LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        )
    if kind == "copied":
        return Student(model, peft_config=LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    return Student(model)


def _soft_capped(output):
    output.logits = 2 * torch.tanh(output.logits / 2)
    return output


@pytest.mark.parametrize("kind", HEADS)
def test_losses_and_their_gradients_are_those_of_the_models_logits(kind):
    student = make_student_with_head(kind)
    batch = student.collate([TokenizedExample([3, 4, 5, 6], [-100, 4, -100, 6]), TokenizedExample([7, 8], [7, 8])])
    assert batch.targets.tolist() == [1, 3, 5]
    loss_weights = torch.tensor([0.5, 2.0, 3.0])
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    loss, losses = student.loss(student.model, batch, loss_weights)
    gradients = torch.autograd.grad(loss, parameters)
    logits = student.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logits = logits[[0, 0, 1], [0, 2, 0]]
    expected = -logits.log_softmax(-1)[[0, 1, 2], [4, 6, 8]]
    expected_gradients = torch.autograd.grad((loss_weights * expected).sum(), parameters)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(loss, (loss_weights * expected).sum())
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    assert student._head_comes_last == (kind != "soft-capped")


# -- models ---------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_pad_and_eos_raises():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad nor an eos token"):
        Student(make_model(), tokenizer)


def test_a_student_without_trainable_parameters_raises():
    with pytest.raises(ValueError, match="no trainable parameters"):
        Student(make_model().requires_grad_(False))


@pytest.mark.parametrize("kind", ["gpt2", "attention", "lora"])
def test_active_dropout_raises_with_its_name_and_value(kind):
    if kind == "gpt2":
        model, peft_config = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2)), None
    elif kind == "attention":
        model, peft_config = make_model(), None
        model.model.layers[0].self_attn.attention_dropout = 0.1
    else:
        model, peft_config = make_model(), LoraConfig(target_modules="all-linear", lora_dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout.* = 0\.1"):
        Student(model, peft_config=peft_config)


def test_dropout_can_be_disabled():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2))
    student = Student(model, disable_dropout=True)
    metric = LanguageModelingMetric(make_samples(2))
    scores = [metagradient(student, make_samples(4), metric).scores for _ in range(2)]
    assert torch.equal(*scores)


def test_a_path_is_loaded_with_its_tokenizer_and_without_dropout(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    student = Student(str(tmp_path))
    assert student.processing_class.get_vocab() == TOKENIZER.get_vocab()
    assert metagradient(student, ["w1 w2 w3"], LanguageModelingMetric(["w1 w2"])).scores.isfinite().all()


def test_two_adapters_raise():
    with pytest.raises(ValueError, match="`PeftModel` already"):
        Student(get_peft_model(make_model(), lora()), peft_config=lora())


def test_loading_arguments_for_a_loaded_model_raise():
    with pytest.raises(ValueError, match="already loaded"):
        Student(make_model(), quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_dora_merged_and_reentrant_students_raise():
    with pytest.raises(ValueError, match=r"DoRA.*use_dora=False"):
        Student(make_model(), peft_config=LoraConfig(target_modules="all-linear", use_dora=True))
    merged = get_peft_model(make_model(), lora())
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged into its base"):
        Student(merged)
    reentrant = make_model()
    reentrant.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        Student(reentrant)


def test_one_string_instead_of_a_list_raises():
    with pytest.raises(ValueError, match="one string"):
        metagradient(Student(make_model(), TOKENIZER), "w1 w2", WeightNormMetric())


# -- effective weights ----------------------------------------------------------------------------------------------


def finetuned(student):
    theta = student.initial_theta()
    return FinetunedStudent(student, theta + 0.1 * torch.randn_like(theta), theta)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_effective_weights_are_those_of_the_merged_model(family, adapted):
    model = make_model(family)
    model = get_peft_model(model, lora()) if adapted else model
    student = Student(model)
    after = finetuned(student)
    base = make_model(family)
    for name, weight in base.state_dict().items():
        torch.testing.assert_close(after.initial_weight(name), weight)
    with torch.no_grad():
        changed = {name: after.weight(name) for name in base.state_dict()}
        base.load_state_dict(changed)
        samples = torch.randint(0, 61, (2, 8))
        expected, logits = base(input_ids=samples).logits, after(input_ids=samples).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_effective_weights_are_differentiable_in_the_adapters():
    student = Student(get_peft_model(make_model(), lora()))
    theta = student.initial_theta().requires_grad_()
    FinetunedStudent(student, theta, theta.detach()).weight("model.layers.0.mlp.up_proj.weight").sum().backward()
    assert theta.grad.abs().sum() > 0


def test_weights_saved_beside_an_adapter_of_any_name_are_found():
    peft_config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    student = Student(get_peft_model(make_model(), peft_config, adapter_name="mine"))
    theta = student.initial_theta()
    after = FinetunedStudent(student, theta + 0.5, theta)
    torch.testing.assert_close(after.weight("lm_head.weight"), after.initial_weight("lm_head.weight") + 0.5)


def test_weights_of_half_precision_students_are_read_before_rounding():
    student = Student(make_model(dtype=torch.bfloat16))
    theta = student.initial_theta()
    change = (
        FinetunedStudent(student, theta + 1e-6, theta).weight("lm_head.weight") - student.model.lm_head.weight.float()
    )
    assert change.mean().item() == pytest.approx(1e-6, rel=0.05)


def test_a_tied_head_is_one_weight_with_the_embedding():
    student = Student(make_model("llama-tied"))
    theta = student.initial_theta().requires_grad_()
    after = FinetunedStudent(student, theta, theta.detach())
    (head,) = torch.autograd.grad(after.weight("lm_head.weight").sum(), theta)
    (embedding,) = torch.autograd.grad(after.weight("model.embed_tokens.weight").sum(), theta)
    assert torch.equal(head, embedding) and head.sum() == 61 * 32


# -- 4 bits ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    make_model("llama", scale=2.0, vocab_size=64, hidden_size=64).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


def four_bits(compute="float32", **kwargs):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute, **kwargs)


def quantized_student(path, **kwargs):
    torch.manual_seed(4)
    return Student(path, peft_config=lora(), quantization_config=four_bits(**kwargs))


def dequantized_student(path, **kwargs):
    """The same network with ordinary linear layers that hold the dequantised weights."""
    from bitsandbytes.functional import dequantize_4bit

    quantized, plain = quantized_student(path, **kwargs), Student(path, peft_config=lora())
    modules = dict(quantized.model.named_modules())
    with torch.no_grad():
        for name, module in plain.model.named_modules():
            if type(modules[name]).__name__ == "Linear4bit" and hasattr(modules[name].weight, "quant_state"):
                module.weight.copy_(dequantize_4bit(modules[name].weight.data, modules[name].weight.quant_state))
        for name, parameter in plain.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(quantized.model.get_parameter(name))
    return plain


@pytest.mark.parametrize("nested", [False, True])
def test_4bit_scores_match_the_dequantised_network(quantized_path, nested):
    samples, metric = make_samples(16), LanguageModelingMetric(make_samples(4, seed=5))
    config = InnerLoopConfig(batch_size=4, learning_rate=1e-3, eps_root=1e-7)
    kwargs = dict(bnb_4bit_use_double_quant=nested)
    out = metagradient(quantized_student(quantized_path, **kwargs), samples, metric, config)
    expected = metagradient(dequantized_student(quantized_path, **kwargs), samples, metric, config).scores
    assert len(out.losses) == 4
    assert relative_error(out.scores, expected) <= 3e-2
    unquantized = metagradient(Student(quantized_path, peft_config=lora()), samples, metric, config).scores
    assert relative_error(unquantized, expected) > 0.1  # quantisation does change the network
    assert torch.corrcoef(torch.stack([out.scores, expected]))[0, 1] >= 0.999


@pytest.mark.parametrize("batch_size", [4, 16])
def test_4bit_scores_of_several_metrics_are_those_of_calls_of_their_own(batch_size, quantized_path):
    samples = make_samples(16)
    metrics = {str(seed): LanguageModelingMetric(make_samples(4, seed=seed)) for seed in (5, 6)}
    config = InnerLoopConfig(batch_size=batch_size, learning_rate=1e-3, eps_root=1e-7)
    student = quantized_student(quantized_path)
    together = metagradient(student, samples, metrics, config).scores
    for name, metric in metrics.items():
        assert relative_error(together[name], metagradient(student, samples, metric, config).scores) <= 1e-3


def test_4bit_weights_and_adapters_are_bit_identical_afterwards(quantized_path):
    student = quantized_student(quantized_path)
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    metagradient(student, make_samples(4), LanguageModelingMetric(make_samples(2, seed=5)))
    assert all(torch.equal(p, before[name]) for name, p in student.model.named_parameters())


def test_4bit_effective_weights_are_dequantised(quantized_path):
    name = "model.layers.0.mlp.up_proj.weight"
    student = quantized_student(quantized_path)
    theta = student.initial_theta()
    plain = dequantized_student(quantized_path)
    expected = FinetunedStudent(plain, theta + 0.01, theta).weight(name)
    torch.testing.assert_close(FinetunedStudent(student, theta + 0.01, theta).weight(name), expected)


def test_a_quantised_student_without_adapters_raises(quantized_path):
    with pytest.raises(ValueError, match=r"quantised but has no adapters.*peft_config"):
        Student(quantized_path, quantization_config=four_bits())


def test_an_8bit_student_raises(quantized_path):
    with pytest.raises(ValueError, match="8 bits"):
        Student(quantized_path, peft_config=lora(), quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_4bit_layers_that_disagree_with_their_dequantised_weights_raise(quantized_path):
    from bitsandbytes.nn import Linear4bit

    student = quantized_student(quantized_path)
    layer = next(module for module in student.model.modules() if isinstance(module, Linear4bit))
    forward = layer.forward
    layer.forward = lambda x: forward(x.bfloat16() * 1.05).to(x.dtype)  # a kernel that is a little off
    with pytest.raises(ValueError, match=r"4-bit layer .*q_proj.* disagrees with its own dequantised weight"):
        metagradient(student, make_samples(4), WeightNormMetric("model.layers.0.mlp.up_proj.weight"))


def test_4bit_layers_packed_for_inference_raise(quantized_path):
    from bitsandbytes.nn import Linear4bit

    student = quantized_student(quantized_path)
    for module in student.model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True  # as on CPUs that have the inference kernel
    student.model.eval()
    with torch.no_grad():
        student.model(input_ids=torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="repacks a layer for CPU inference"):
        metagradient(student, make_samples(4), LanguageModelingMetric(make_samples(2)))
