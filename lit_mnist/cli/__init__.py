"""What a user calls."""

COMMANDS = {
    "fit": "train, with validation after each epoch",
    "validate": "score a checkpoint on the held-out training images",
    "test": "score a checkpoint on the 10,000 test images",
    "predict": "write a checkpoint's answers for the test images to a CSV",
    "demo": "serve a page to draw digits on, with a checkpoint's answers",
    "export": "write a checkpoint's network to an ONNX or PT2 file, or a page to draw on",
    "sweep": "compare settings over several seeds, by a study file",
    "runs": "list the runs under lightning_logs/",
}
