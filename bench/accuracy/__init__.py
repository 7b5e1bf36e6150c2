"""The evidence: methods × tasks × budgets × seeds at equal budget, one row a run (docs/evidence.md)."""
