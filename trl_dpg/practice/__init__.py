"""The practitioner's side of synthetic data: teachers, lengths of reasoning, mixtures. Each room works without DPG."""
