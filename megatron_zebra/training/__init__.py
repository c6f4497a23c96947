"""The loop: step, learning rate, metrics, callbacks for logging, checkpoints and evaluation."""
