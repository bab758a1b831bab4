"""Predictions for `python -m mpidp.plan`: how many ranks to use, which mesh, and which method. Only methods/trials.py trains
models. All other files only calculate."""
