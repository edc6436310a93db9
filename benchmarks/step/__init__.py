"""The parts of ``meta_step.py``, one subject each. Nothing to run here."""
