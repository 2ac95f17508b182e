"""A PyTorch Lightning project template, worked out on MNIST: copy it and change it."""

__version__ = "0.1.0"
