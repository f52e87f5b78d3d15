"""One loop: objective, optimizer, frozen prefix, resuming; a run from data to adapter; cross-validation; a forecast.

Here belongs what changes an attached model's tensors. Which method and setting to train belongs to `search`, and
whole tables of trainings to `bench`.
"""
