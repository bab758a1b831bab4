"""How many ranks, which mesh, which method: formulas and tables behind `python -m mpidp.plan`. No training here."""
