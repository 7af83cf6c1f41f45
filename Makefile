# What is dearer than the default lane of tests (`pytest`); each says what it tried. docs/reliability.md holds the figures.
EXAMPLES ?= 3000
KILLS ?= 200

.PHONY: faults sanitize fuzz readme

faults:  ## 200 kills at random instants, full disks, damaged checkpoints
	ACPO_KILLS=$(KILLS) python -m pytest tests/faults -m "slow or not slow" -s

sanitize:  ## address, undefined-behaviour and thread sanitizers over the C++ code
	tests/sanitize/run

fuzz:  ## thousands of bad arguments and damaged files, other ones each time; the segmenter's inputs
	ACPO_EXAMPLES=$(EXAMPLES) python -m pytest -n $(shell nproc) tests/test_bad_input.py tests/test_bad_files.py --hypothesis-show-statistics
	tests/fuzz/run

readme:  ## the commands of README.md
	python tests/readme.py
