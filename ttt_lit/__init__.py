"""ttt_lit: convert a pretrained dense language model to TTT-E2E inside one training run."""

__version__ = "0.1.0"
