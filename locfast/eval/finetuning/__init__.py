"""End-to-end fine-tuning of a backbone as a classifier: how ImageNet figures of masked image models are made."""
