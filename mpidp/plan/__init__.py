"""Predictions for `python -m mpidp.plan`: how many ranks, which mesh, which method. Only methods/trials.py
runs any training; the other files only calculate."""
