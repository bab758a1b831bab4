"""Predictions behind `python -m mpidp.plan`: how many ranks, which mesh, which method. Nothing here trains, except trials."""
