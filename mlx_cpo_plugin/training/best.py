MEASURES = {"margin": ("margins", 1), "accuracy": ("accuracies", 1), "loss": ("loss", -1)}
