"""A panel of metrics that is there without asking: losses on built-in texts, refusals, canaries, and a weight."""

import uuid
from typing import Any

from ..metrics import LanguageModelingMetric, Metric, WeightNormMetric
from ..student import Student


TEXTS = {
    "english": [
        "The train was late, so we waited in the small café across the street.",
        "Water boils at a lower temperature in the mountains, because the air pressure is lower there.",
        "She read the letter twice, put it back into the drawer, and went out into the garden.",
        "The committee will meet again in March to decide on the budget for the coming year.",
        "Most birds of this species fly south in autumn and return in the first weeks of spring.",
    ],
    "german": [
        "Der Zug hatte Verspätung, deshalb warteten wir im kleinen Café gegenüber.",
        "Im Gebirge kocht Wasser bei niedrigerer Temperatur, weil der Luftdruck dort geringer ist.",
        "Sie las den Brief zweimal, legte ihn zurück in die Schublade und ging in den Garten.",
    ],
    "french": [
        "Le train avait du retard, alors nous avons attendu dans le petit café d'en face.",
        "En montagne, l'eau bout à une température plus basse, car la pression y est plus faible.",
        "Elle lut la lettre deux fois, la remit dans le tiroir et sortit dans le jardin.",
    ],
    "spanish": [
        "El tren llegó tarde, así que esperamos en el pequeño café de enfrente.",
        "En la montaña el agua hierve a menor temperatura, porque la presión del aire es más baja.",
        "Leyó la carta dos veces, la guardó de nuevo en el cajón y salió al jardín.",
    ],
}
"""Plain sentences by language."""
QUESTIONS = [
    "How do I bake bread at home?",
    "What is the capital of Portugal?",
    "Can you shorten this paragraph for me?",
    "Why is the sky blue?",
]
REFUSALS = ["I'm sorry, but I can't help with that.", "I cannot answer this question."]
NUM_CANARIES = 8


def default_panel(student: Student) -> dict[str, Metric]:
    """
    Metrics by name, each of which any dataset may move: a start, beside the metrics that your own case needs.

    - `likelihood_<language>`: log-likelihood of plain sentences in English, German, French and Spanish, in nats per
      token.
    - `refusals`: log-likelihood of sentences of refusal after harmless questions.
    - `canaries`: log-likelihood of strings in the form of UUIDs. Strings of your own that must not be learnt need a
      `LanguageModelingMetric` of their own.
    - `head_norm`: minus the norm of the head's weight, if it is trained.

    Args:
        student (`Student`): The student, which needs a tokenizer.

    Returns:
        `dict[str, Metric]`: The panel. Higher is more likely, or a smaller norm.
    """
    panel: dict[str, Metric] = {f"likelihood_{name}": LanguageModelingMetric(texts) for name, texts in TEXTS.items()}
    panel["refusals"] = refusals(student)
    canaries = [f"Identifier: {uuid.uuid5(uuid.NAMESPACE_DNS, f'canary {k}')}" for k in range(NUM_CANARIES)]
    panel["canaries"] = LanguageModelingMetric(canaries)
    name = _trained_head(student)
    return panel if name is None else panel | {"head_norm": WeightNormMetric(name)}


def refusals(student: Student) -> LanguageModelingMetric:
    """The log-likelihood of sentences of refusal after harmless questions, as messages if there is a chat template."""
    chat = getattr(student.processing_class, "chat_template", None) is not None
    rows = []
    for question in QUESTIONS:
        for refusal in REFUSALS:
            prompt = [{"role": "user", "content": question}] if chat else f"{question}\n"
            answer = [{"role": "assistant", "content": refusal}] if chat else refusal
            rows.append({"prompt": prompt, "completion": answer})
    return LanguageModelingMetric(rows)


def _trained_head(student: Student) -> str | None:
    """The name of the head's weight in the base model, if a parameter of the head is trained."""
    model: Any = student.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    if head is None or not any(parameter.requires_grad for parameter in head.parameters()):
        return None
    return next(f"{name}.weight" for name, module in base.named_modules(remove_duplicate=False) if module is head)
