from .finetuned import FinetunedStudent
from .student import Student
from .tokenization import Batch, Examples, TokenizedExample


__all__ = ["Batch", "Examples", "FinetunedStudent", "Student", "TokenizedExample"]
