"""The practitioner's side: teachers, lengths of reasoning, and mixtures of data."""
