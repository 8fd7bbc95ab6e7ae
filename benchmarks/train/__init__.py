"""Parts of ``benchmarks/train_step.py``: the model's shape, the samples of a step, and the two sides."""
