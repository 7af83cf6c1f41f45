"""What made the figures of README.md: `pytest benchmarks/ --benchmark`, `python -m benchmarks.accuracy`, `python -m benchmarks.report`."""
