"""Run protocols trial by trial, and read their results.

Here belongs what plans, runs and records trials, and the tables and plots made of the records. What a task is and
where its images lie belongs to `protocols`.
"""
